"""Functions of the user that text names, as MODULE:FUNCTION."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


class FunctionNotFoundError(ValueError):
    """There is no such module or function. The message names the argument."""


def find_function(name: str, place: str) -> Callable[..., Any]:
    """Import the function at ``package.module:function`` for the argument ``name``.

    Modules in the current folder are found as well, and found first, as ``python -m`` does.

    Raises:
        FunctionNotFoundError: There is no such module or function.
        Exception: What the import of the module raises.
    """
    module_name, _, path = place.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        value = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Not a module that this one imports.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise FunctionNotFoundError(
            f"{name}: expected MODULE:FUNCTION with a module that Python finds, got {place} "
            f"({error}); run the command in the folder of the module, or install it"
        ) from error
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise FunctionNotFoundError(
                f"{name}: expected MODULE:FUNCTION with a function of the module, got {place} "
                f"({error})"
            ) from error
    if not callable(value):
        raise FunctionNotFoundError(
            f"{name}: expected a function, got {place}, a {type(value).__name__}"
        )
    return value
