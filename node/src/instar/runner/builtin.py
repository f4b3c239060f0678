"""Modules that ride in the program: one-shot Python modules below `instar.modules`."""

from __future__ import annotations

import importlib

from instar.modules.context import Context
from instar.runner.kinds import ModuleSpec
from instar.runner.python import PythonModule


def load(module: ModuleSpec, context: Context) -> PythonModule:
    """`module.name` is one of BUILT_IN (request.py)."""
    return PythonModule(importlib.import_module(f"instar.modules.{module.name}"))
