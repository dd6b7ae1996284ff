"""Every flag of every command is given a value other than its default somewhere in the tests that name the command.

Those of npu_config.Options are read by one function for all commands, so a test of any command counts. It reads the tests' text:
--flag=value, --flag on its own or --noflag for what is true or false, and flag=value as a Config takes it.
"""
import dataclasses
import glob
import importlib
import os
import re

import pytest
from conftest import ROOT

import npu_config

COMMANDS = ("pretraining", "linearevaluation", "finetuning", "embed")
TESTS = {path: open(path, encoding="utf-8").read() for path in glob.glob(os.path.join(ROOT, "tests", "test_*.py")) if path != __file__}
# What a value looks like in a text: --flag=value, --flag value in a line of words, flag=value in Python, "flag": value.
GIVEN = r"(?:--%(name)s(?:[= ]|[\"'], )|\b%(name)s=|[\"']%(name)s[\"']: )[\"']?([^\s\"',)\]}]+)"


def given(text, name, default):
    """Whether the text gives the flag another value than its default."""
    values = set(re.findall(GIVEN % {"name": name}, text))
    if isinstance(default, bool):
        alone = re.search(r"--%s%s\b(?!=)" % ("no" if default else "", name), text)
        return bool(alone) or str(not default) in values
    return any(value not in (str(default), "None") for value in values)


def without_test(command, texts):
    """The flags of a command that none of the texts gives."""
    config = importlib.import_module(command).Config
    shared = {field.name for field in dataclasses.fields(npu_config.Options)}
    return [field.name for field in dataclasses.fields(config)
            if not any(given(text, name, field.default) for text in texts if command in text or field.name in shared
                       for name in (field.name, field.metadata["alias"]) if name)]


@pytest.mark.parametrize("text, name, default, expected", [
    ("--seed=1", "seed", 0, True), ("--seed=0", "seed", 0, False), ("Config(seed=3)", "seed", 0, True), ("'seed': 3", "seed", 0, True),
    ("--seeds=1", "seed", 0, False), ("--knn", "knn", False, True), ("--knn=False", "knn", False, False),
    ("knn=True", "knn", False, True),
    ("--noresume", "resume", True, True), ("--resume", "resume", True, False), ("--knn_every=2", "knn", False, False),
    ("--data_dir=None", "data_dir", None, False), ("'--data_dir', 'x'", "data_dir", None, True)])
def test_what_counts_as_given(text, name, default, expected):
    assert given(text, name, default) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_run_with_another_value_than_its_default(command):
    assert without_test(command, TESTS.values()) == []


def test_a_new_flag_without_a_test_is_noticed(monkeypatch):
    import pretraining

    new = dataclasses.make_dataclass("Config", [("unheard_of", int, pretraining.flag(1, "New."))], bases=(pretraining.Config,),
                                     frozen=True)
    monkeypatch.setattr(pretraining, "Config", new)
    assert without_test("pretraining", TESTS.values()) == ["unheard_of"]
