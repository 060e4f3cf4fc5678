"""Functions of the user that an option names: finds them, calls them, and tells what they raise."""

from __future__ import annotations

import contextlib
import inspect
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .._functions import FunctionNotFoundError, find_function
from .options import UsageError

_LONGEST_MESSAGE = 200


def find(option: str, place: str) -> Callable[..., Any]:
    """Import the function at ``package.module:function``.

    Modules in the current folder are found as well, and found first, as ``python -m`` does.

    Raises:
        UsageError: There is no such module or function, or the import raised an error.
    """
    with told(option, f"the import of {place.partition(':')[0]}"):
        try:
            return find_function(option, place)
        except FunctionNotFoundError as error:
            raise UsageError(str(error)) from error


def call(option: str, place: str, **arguments: Any) -> Any:
    """Call the function at ``package.module:function`` with keyword arguments.

    Raises:
        UsageError: It cannot be found, does not take these arguments, or raised an error.
    """
    function = find(option, place)
    with contextlib.suppress(ValueError):  # a function of C may not tell its arguments
        signature = inspect.signature(function)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            text = ", ".join(f"{name}={value}" for name, value in arguments.items())
            raise UsageError(
                f"{option}: expected a function that can be called as "
                f"{place.partition(':')[2]}({text}), got {place} with the arguments {signature} "
                f"({error})"
            ) from error
    with told(option, place):
        return function(**arguments)


@contextlib.contextmanager
def told(option: str, who: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Tell an error of the user's code as a UsageError, with the file and line of its origin.

    Errors of the types ``passing`` stay as they are.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, (UsageError, *passing)) or is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0][:_LONGEST_MESSAGE]}".removesuffix(": ")
        raise UsageError(f"{option}: {who} raised {text}{_origin(error)}") from error


def _origin(error: BaseException) -> str:
    """Where an error comes from: the last line that belongs to no installed package."""
    others = [Path(__file__).parents[1], Path(sysconfig.get_path("stdlib"))]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        installed = {"site-packages", "dist-packages"}.intersection(path.parts)
        if path.is_file() and not installed and not any(map(path.is_relative_to, others)):
            return f" ({path.name}, line {frame.lineno})"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error tells that the memory was too small."""
    # On the CPU torch has no type of its own for this error.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            text in str(error) for text in ("allocate memory", "enough memory", "size calculation")
        )
    )
