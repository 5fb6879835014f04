"""What is read from the local variables of PEFT's and transformers' loaders is there."""

import importlib
import inspect

import pytest

from trl_steer.tuners.steering.load_in_progress import _LOADERS


@pytest.mark.parametrize("loader", _LOADERS, ids="-".join)
def test_loaders_of_peft_and_transformers_have_the_variables_that_are_read(loader):
    module, name = loader
    classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    found = [vars(owner)[name] for _, owner in classes if owner.__module__ == module and name in vars(owner)]
    assert found
    for function in found:
        code = getattr(function, "__func__", function).__code__  # of a class method
        assert code.co_name == name
        assert [v for v in _LOADERS[loader] if v not in code.co_varnames + code.co_cellvars] == []
