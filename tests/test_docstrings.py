"""The examples in docstrings do what they show."""
import doctest
import glob
import importlib
import os

import pytest
from conftest import ROOT

MODULES = sorted(os.path.basename(path)[:-3] for path in glob.glob(os.path.join(ROOT, "*.py")) if ">>> " in open(path).read())


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
