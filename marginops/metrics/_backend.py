"""Lets matplotlib be imported where a notebook's variable names a backend that is missing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

_PREFIX = "module://"


@contextmanager
def usable_backend() -> Iterator[None]:
    """Hide ``MPLBACKEND`` inside the context if it names a module that is not installed.

    torchmetrics imports matplotlib, which reads the variable once. A notebook sets it to
    ``module://matplotlib_inline.backend_inline``, also for the programs that its cells start. In an
    environment without that module matplotlib raises an error as soon as it is imported. After the
    context the variable is as before, for programs that start from here.
    """
    backend = os.environ.get("MPLBACKEND", "")
    module = backend.removeprefix(_PREFIX).split(".")[0]
    if not backend.startswith(_PREFIX) or (module and find_spec(module) is not None):
        yield
        return
    del os.environ["MPLBACKEND"]
    try:
        yield
    finally:
        os.environ["MPLBACKEND"] = backend
