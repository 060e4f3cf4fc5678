"""The names of the CUDA kernels, read from their sources."""

import re

from helpers.emulation import harness

CUDA = harness.SOURCES / "cuda"
FILES = sorted(path.name for path in CUDA.glob("*.cu"))


def included(file: str) -> set[str]:
    """The ``.cuh`` headers that a file includes, directly or not."""
    found = set(re.findall(r'#include "(\w+\.cuh)"', (CUDA / file).read_text()))
    return found.union(*map(included, found))


def declared(file: str) -> set[str]:
    """The names of the kernels in a file and the headers that it includes."""
    text = "".join((CUDA / name).read_text() for name in (file, *included(file)))
    return set(re.findall(r"__global__ void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\(", text))
