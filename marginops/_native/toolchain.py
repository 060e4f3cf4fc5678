"""Finds the tools of a build: C++ compiler, ninja, CUDA toolkit, GPU architectures."""

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
    """A tool of the build is missing. The message names it and says what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command, its path, and the first line of its version text."""

    command: str
    path: str
    version: str


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: its folder and its version, such as ``13.0``."""

    home: Path
    version: str


def find_compiler() -> Compiler:
    """The compiler named by ``CXX``, else the first of c++, g++ and clang++ on ``PATH``."""
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
    """The folder of the ninja program. pip may install it to a folder that is not on ``PATH``."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        return Path(ninja.BIN_DIR)
    path = shutil.which("ninja")
    if path is None:
        raise ToolchainError("ninja is missing: run pip install ninja")
    return Path(path).parent


def find_cuda_toolkit() -> CudaToolkit:
    """The toolkit with the CUDA major version of torch.

    A folder is a toolkit if it has ``bin/nvcc`` and ``include/cuda_runtime.h``. An ``nvcc`` on
    ``PATH`` alone is not enough, because it may be a wrapper script in another folder.
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
        raise ToolchainError(f"no CUDA toolkit: torch needs CUDA {wanted}, but there is {found}")
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
    """The GPU architectures to compile for.

    ``MARGINOPS_CUDA_ARCH_LIST`` or ``TORCH_CUDA_ARCH_LIST`` names them, or else they are those of
    the visible GPUs.
    """
    for variable in ("MARGINOPS_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST"):
        wanted = re.split(r"[\s;,]+", os.environ.get(variable, "").strip())
        if wanted != [""]:
            return sorted(set(wanted))
    capabilities = visible_capabilities()
    if not capabilities:
        raise ToolchainError(
            "no GPU is visible, so its architecture is unknown: "
            "set MARGINOPS_CUDA_ARCH_LIST, e.g. to 9.0"
        )
    return [f"{major}.{minor}" for major, minor in capabilities]


def visible_capabilities() -> list[tuple[int, int]]:
    """The distinct compute capabilities of the visible GPUs, lowest first."""
    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(device) for device in devices})


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for ``archs`` runs on a GPU of this compute capability.

    Machine code runs on GPUs of the same major version. PTX is translated for newer GPUs.
    """
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
