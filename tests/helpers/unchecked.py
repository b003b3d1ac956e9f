"""A module as its users import it: without the run-time check of types that tests have."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType


def unchecked(module: ModuleType) -> ModuleType:
    """A second copy of a module whose own functions take any argument."""
    assert module.__file__ is not None
    name = f"{module.__name__}_unchecked"
    spec = spec_from_file_location(name, module.__file__)
    assert spec is not None and spec.loader is not None
    copy = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
