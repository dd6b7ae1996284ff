"""What the list of files promises: which modules there are, that none is long, and that they import one another in one direction."""
import ast
import os

import pytest
from conftest import ROOT

LONGEST = 320  # lines


def modules():
    """Dotted name -> path of the product's own modules, benchmarks and tests left out."""
    found = {}
    for folder in ("", "devices", "sources"):
        for name in os.listdir(os.path.join(ROOT, folder)):
            if name.endswith(".py"):
                parts = [folder] * bool(folder) + [name[:-3]] * (name != "__init__.py")
                found[".".join(parts)] = os.path.join(ROOT, folder, name)
    return found


MODULES = modules()


def imports(path):
    """The product's modules that a file imports anywhere in it, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(open(path, encoding="utf-8").read())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {"%s.%s" % (node.module, alias.name) for alias in node.names}
    return found & set(MODULES) - {"devices", "sources"}  # the packages themselves hold only a line of text


def circle(graph):
    """Names that lead from one module back to it; empty if there are none."""
    done = set()

    def visit(name, way):
        if name in way:
            return way[way.index(name):] + [name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (visit(other, way + [name]) for other in sorted(graph[name]))), [])

    return next(filter(None, (visit(name, []) for name in sorted(graph))), [])


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c", "e"}, "e": {"d"}}) == ["d", "e", "d"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_no_two_modules_import_each_other_in_a_circle():
    graph = {name: imports(path) for name, path in MODULES.items()}
    assert "losses" in graph["pretraining"] and "devices.base" in graph["devices.host"]
    assert circle(graph) == []


@pytest.mark.parametrize("low, high", [
    (("losses", "schedules", "transforms", "commands"), ()),
    (("augmentation",), ("transforms",)),
    (("models",), ("commands",)),
    (("devices.base", "devices.convolutions"), ("commands", "models")),
])
def test_what_is_below_knows_nothing_of_what_is_above(low, high):
    for name in low:
        assert imports(MODULES[name]) <= set(high), name


def test_sources_and_devices_know_no_command_and_nothing_of_the_method():
    for name, path in MODULES.items():
        if name.startswith(("sources.", "devices.")):
            own = name.split(".")[0] + "."
            assert {other for other in imports(path) if not other.startswith(own)} <= {"commands", "models"}, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_file_is_long(name):
    assert len(open(MODULES[name], encoding="utf-8").readlines()) <= LONGEST


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_the_readmes_name_every_module(readme):
    text = open(os.path.join(ROOT, readme), encoding="utf-8").read()
    names = {os.path.basename(path)[:-3] for path in MODULES.values()} - {"__init__"}
    assert not [name for name in names if name + ".py" not in text and "`%s`" % name not in text]
