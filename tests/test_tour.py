"""The notebook docs/tour.ipynb runs from top to bottom, without a network, and shows what it says."""
import os
import re
import sys

import pytest
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat and nbclient, which are for Python 3.10 and newer here")
nbclient = pytest.importorskip("nbclient")
PATH = os.path.join(ROOT, "docs", "tour.ipynb")
NUMBER = r"(\d+\.\d+)"


def printed(notebook):
    """What its cells have printed on stdout; what they said on stderr is a fault."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"] == []
    return "".join(output.text for output in outputs if output.output_type == "stream")


def check(text):
    """The notebook's story: what collapses, what does not, and which encoder is better."""
    spread = {name: float(re.search("^%s.* -> %s$" % (name, NUMBER), text, re.M).group(1))
              for name in ("BYOL", "without predictor", "target that stays")}
    assert spread["without predictor"] < 0.03 < 0.045 < spread["BYOL"] < spread["target that stays"]
    for line in ("k-NN accuracy", "with 500 labels"):
        found = re.search("%s: random weights %s %%, cifar10-narrow %s %%" % (line, NUMBER, NUMBER), text)
        random, trained = map(float, found.groups())
        assert trained > 1.3 * random


def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("CIFAR10", raising=False)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    before = sorted(os.listdir(os.path.dirname(PATH)))
    notebook = nbformat.read(PATH, 4)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": os.path.dirname(PATH)}}).execute()
    check(printed(notebook))
    assert sorted(os.listdir(os.path.dirname(PATH))) == before


def test_what_it_shows_is_small_and_of_a_whole_run():
    notebook = nbformat.read(PATH, 4)
    check(printed(notebook))
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])) == 4
    assert os.path.getsize(PATH) < 500000
