"""Finds what a build needs here: C++ compiler, ninja, CUDA toolkit, GPU architectures."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


class ToolchainError(Exception):
    """Something that a build needs is missing; the text says what, and what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: the command to run, where it is, and the first line of its version text."""

    command: str
    path: str
    version: str


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: its folder and its version, such as ``13.0``."""

    home: Path
    version: str


def find_compiler() -> Compiler:
    """The compiler named by ``CXX``, else the first usual one on ``PATH``."""
    wanted = os.environ.get("CXX", "").strip()
    for command in [wanted] if wanted else ["c++", "g++", "clang++"]:
        program, *arguments = shlex.split(command)
        path = shutil.which(program)
        if path is not None:
            return Compiler(command, path, _version_text([path, *arguments, "--version"]))
    if wanted:
        raise ToolchainError(f"no C++ compiler: CXX={wanted} cannot be run")
    raise ToolchainError("no C++ compiler: install g++ or clang++, or set CXX")


def _version_text(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ToolchainError(f"no C++ compiler: {shlex.join(command)} failed: {error}") from error
    return done.stdout.partition("\n")[0].strip()


def find_ninja() -> Path:
    """The folder with the ninja program; pip puts it where ``PATH`` often does not look."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return Path(ninja.BIN_DIR)
    path = shutil.which("ninja")
    if path is None:
        raise ToolchainError("ninja is missing: pip install ninja")
    return Path(path).parent


def find_cuda_toolkit() -> CudaToolkit:
    """The toolkit that fits torch's CUDA major version.

    A folder counts when it has ``bin/nvcc`` and ``include/cuda_runtime.h``: an ``nvcc`` on ``PATH``
    may be a wrapper script that says nothing about where the toolkit is.
    """
    wanted = str(torch.version.cuda)
    unfit = []
    for home in dict.fromkeys(_toolkit_folders()):
        if not ((home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file()):
            continue
        version = _toolkit_version(home)
        if version.partition(".")[0] == wanted.partition(".")[0]:
            return CudaToolkit(home, version)
        unfit.append(f"{version} in {home}")
    if unfit:
        found = "; ".join(unfit)
        raise ToolchainError(f"torch is built with CUDA {wanted}, but the toolkit found is {found}")
    raise ToolchainError(f"no CUDA toolkit with nvcc: install CUDA {wanted} or set CUDA_HOME")


def _toolkit_folders() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or []) if wheels else []:
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


def _toolkit_version(home: Path) -> str:
    header = home / "include/cuda_runtime_api.h"
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    number = int(found.group(1)) if found else 0
    return f"{number // 1000}.{number % 1000 // 10}"


def find_archs() -> list[str]:
    """The GPU architectures to compile for: asked for, else those of the visible GPUs."""
    for variable in ("MARGINOPS_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST"):
        wanted = re.split(r"[\s;,]+", os.environ.get(variable, "").strip())
        if wanted != [""]:
            return sorted(set(wanted))
    capabilities = visible_capabilities()
    if not capabilities:
        raise ToolchainError(
            "no GPU is visible to tell the architecture: set MARGINOPS_CUDA_ARCH_LIST, e.g. 9.0"
        )
    return [f"{major}.{minor}" for major, minor in capabilities]


def visible_capabilities() -> list[tuple[int, int]]:
    """The compute capabilities of the visible GPUs, each once, lowest first."""
    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(device) for device in devices})


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` runs on a GPU: same major version, or translated from PTX."""
    for arch in archs:
        found = re.match(r"(\d+)\.(\d)(a|f)?(\+PTX)?$", arch)
        if found is None:
            return True
        version = (int(found.group(1)), int(found.group(2)))
        if found.group(3) == "a":
            fits = version == capability
        else:
            fits = version <= capability and version[0] == capability[0]
        if fits or (found.group(4) and version <= capability):
            return True
    return False
