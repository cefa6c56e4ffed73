"""Starts the keeper by path, in an interpreter that needn't know Seamark: its parts are beside this file."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

NAME = "seamark_keeper"
"""Of the package in the job's interpreter: no other's there, `seamarkd` of another version included."""


def package(directory: str) -> ModuleType:
    """The package of this directory, without a place for it in the job's `sys.path`."""
    init = os.path.join(directory, "__init__.py")
    spec = importlib.util.spec_from_file_location(NAME, init, submodule_search_locations=[directory])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    # The directory of this file is no place for a job to import from.
    if not sys.flags.safe_path:
        del sys.path[0]
    package(os.path.dirname(os.path.abspath(__file__)))
    importlib.import_module(f"{NAME}.program").run(sys.argv[1:])
