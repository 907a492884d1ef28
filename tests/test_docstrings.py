"""The examples in the public docstrings are there, are run, and are run by plain `pytest`."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import sdkernels

PUBLIC = [name for name in sdkernels.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring(name):
    thing = getattr(sdkernels, name)
    assert inspect.getdoc(thing)
    module = importlib.import_module(thing.__module__)
    found = doctest.DocTestFinder().find(thing, name, module=module)
    examples = [example for test in found for example in test.examples]
    assert examples


MODULES = ["sdkernels." + module.name for module in pkgutil.iter_modules(sdkernels.__path__)]


# Triton need not be there, and what stands above it has no examples.
@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith(("._C", ".triton"))])
def test_examples(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_pytest_collects_the_examples(pytestconfig):
    assert "--doctest-modules" in pytestconfig.getini("addopts")
    assert "sdkernels" in pytestconfig.getini("testpaths")
