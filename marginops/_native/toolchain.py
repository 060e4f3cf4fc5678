"""Finds the tools of a build: C++ compiler, ninja, CUDA toolkit.

``setup.py`` uses this file without importing marginops.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from . import process

OLDEST_COMPILERS = {"GCC": 11, "clang": 12}
# Programs that may stand before a compiler in a command. nvcc takes the compiler without them.
_LAUNCHERS = {"buildcache", "ccache", "distcc", "env", "icecc", "ionice", "nice", "sccache", "time"}
_ANSWER_TIME = 20.0  # seconds for a program to say its version


class ToolchainError(Exception):
    """A tool of the build is missing. The message names it and says what to do."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler: its command in words, its path, and the first line of its version text."""

    command: tuple[str, ...]
    path: str
    version: str

    @property
    def program(self) -> str:
        """The compiler alone, without arguments and without a launcher such as ccache."""
        for word in self.command:
            if Path(word).name not in _LAUNCHERS and not word.startswith("-") and "=" not in word:
                path = shutil.which(word)
                if path is not None:
                    return os.path.abspath(path)
        return self.path

    @property
    def too_old(self) -> str | None:
        """What is wrong with the version of this compiler; None if nothing is known to be."""
        clang = re.search(r"\bclang version (\d+)\.(\d+)", self.version)
        gcc = re.search(r"^\S*(?:g\+\+|gcc|c\+\+|cc)\S* \(.*?\)+ (\d+)\.(\d+)", self.version)
        for name, found in (("clang", clang), ("GCC", gcc)):
            if found and int(found.group(1)) < OLDEST_COMPILERS[name]:
                needed = " or ".join(f"{name} {major}" for name, major in OLDEST_COMPILERS.items())
                version = ".".join(found.groups())
                return f"{self.path} is {name} {version}, but marginops needs {needed}, or later"
        return None


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit: its folder and its version, such as ``13.0``."""

    home: Path
    version: str

    @property
    def nvcc(self) -> Path:
        """The CUDA compiler."""
        return self.home / "bin/nvcc"

    @property
    def include(self) -> Path:
        """The folder of the headers."""
        return _include_folder(self.home)

    @property
    def runtime(self) -> Path:
        """The library to link with. Toolkits from wheels have only the one with a number."""
        folders = [self.home / name for name in ("lib64", "lib") if (self.home / name).is_dir()]
        for pattern in ("libcudart.so", "libcudart.so.*"):
            for folder in folders:
                for path in sorted(folder.glob(pattern)):
                    return path
        # A compiler finds the libraries of its system without being told where they are.
        return Path("libcudart.so")


def find_compiler() -> Compiler:
    """The compiler named by ``CXX``, else the first of c++, g++ and clang++ that runs."""
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        return _compiler(wanted, f"CXX: expected the command of a C++ compiler, got {wanted}")
    reasons = []
    for command in ("c++", "g++", "clang++"):
        try:
            return _compiler(command, command)
        except ToolchainError as error:
            if shutil.which(command) is not None:
                reasons.append(str(error))
    raise ToolchainError(
        "; ".join(["no C++ compiler: install g++ or clang++, or set CXX", *reasons])
    )


def _compiler(command: str, subject: str) -> Compiler:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ToolchainError(f"{subject} ({error})") from error
    if not words or "\n" in command:
        raise ToolchainError(f"{subject} (a command is one line with at least one word)")
    program = os.path.expanduser(words[0])
    path = shutil.which(program)
    if path is None:
        raise ToolchainError(f"{subject} ({program} {_obstacle(program)})")
    # The build runs in another folder.
    words = [os.path.abspath(path), *(_absolute(word) for word in words[1:])]
    try:
        done = process.run([*words, "--version"], limit=_ANSWER_TIME)
    except process.ProgramError as error:
        raise ToolchainError(f"{subject} ({shlex.join(words)} --version: {error})") from error
    line = first_line(done.output)
    if done.status != 0:
        failure = f"{shlex.join(words)} --version fails with exit status {done.status}: {line}"
        raise ToolchainError(f"{subject} ({failure})")
    return Compiler(tuple(words), words[0], line)


def _absolute(word: str) -> str:
    return os.path.abspath(word) if word.startswith(("./", "../")) else word


def _obstacle(program: str) -> str:
    if "/" not in program:
        return "is not on PATH"
    if os.path.isdir(program):
        return "is a folder"
    return "is not executable" if os.path.exists(program) else "does not exist"


def first_line(text: str, longest: int = 300) -> str:
    """The first line of an output that has text, cut off where it is very long."""
    lines = (line.strip() for line in text.splitlines())
    line = next((line for line in lines if line), "")
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= longest else line[:longest] + " ..."


def host_compiler_flags(compiler: Compiler) -> list[str]:
    """Flags that make nvcc use the compiler of the C++ files, unless the user has named another.

    As in torch, ``CC`` names a host compiler for nvcc only. nvcc itself reads ``NVCC_CCBIN``,
    ``NVCC_PREPEND_FLAGS`` and ``NVCC_APPEND_FLAGS``.
    """
    if os.environ.get("NVCC_CCBIN"):
        return []
    for variable in ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"):
        if re.search(r"(?:^|\s)(?:-ccbin|--compiler-bindir)", os.environ.get(variable, "")):
            return []
    wanted = os.environ.get("CC", "").strip()
    if wanted:
        compiler = _compiler(wanted, f"CC: expected a host compiler for nvcc, got {wanted}")
    return ["-ccbin", compiler.program]


def find_ninja() -> str:
    """The ninja program. pip may install it to a folder that is not on ``PATH``.

    The package is not imported, because another one may own the name ``ninja``.
    """
    reasons = []
    for path in dict.fromkeys(_ninja_programs()):
        if not (os.path.isfile(path) and os.access(path, os.X_OK)):
            continue
        try:
            done = process.run([path, "--version"], limit=_ANSWER_TIME)
        except process.ProgramError as error:
            reasons.append(f"{path} --version: {error}")
            continue
        # The system's loader may write lines of its own, for example about LD_PRELOAD.
        if done.status == 0 and re.search(r"^\d+\.\d+", done.output, re.MULTILINE):
            return path
        reasons.append(f"{path} --version gives {first_line(done.output) or 'nothing'}")
    raise ToolchainError("; ".join(["ninja is missing: run pip install ninja", *reasons]))


def _ninja_programs() -> Iterator[str]:
    yield os.path.join(sysconfig.get_path("scripts"), "ninja")
    for distribution in importlib.metadata.distributions(name="ninja"):
        for file in distribution.files or []:
            if file.name == "ninja" and file.parent.name == "bin":
                yield os.path.abspath(str(distribution.locate_file(file)))
    user = sysconfig.get_preferred_scheme("user")
    yield os.path.join(sysconfig.get_path("scripts", user), "ninja")
    path = shutil.which("ninja")
    if path is not None:
        yield os.path.abspath(path)


def find_cuda_toolkit() -> CudaToolkit:
    """The toolkit with the CUDA major version of torch.

    A folder is a toolkit if it has ``bin/nvcc`` and ``cuda_runtime.h``. An ``nvcc`` on ``PATH``
    alone is not enough, because it may be a wrapper script in another folder.
    """
    wanted = str(torch.version.cuda)
    unfit = []
    for home in dict.fromkeys(_toolkit_folders()):
        include = _include_folder(home)
        if not ((home / "bin/nvcc").is_file() and (include / "cuda_runtime.h").is_file()):
            continue
        version = _toolkit_version(include)
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
            yield Path(os.environ[variable]).absolute()
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parent.parent
    yield Path("/usr/local/cuda")
    yield from sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels.submodule_search_locations or []) if wheels else []:
        yield from sorted(Path(folder).glob("cu[0-9]*"), reverse=True)


def _include_folder(home: Path) -> Path:
    # Toolkits of conda have their headers in targets/<machine>/include only.
    folders = [home / "include", *sorted(home.glob("targets/*/include"))]
    return next((each for each in folders if (each / "cuda_runtime.h").is_file()), folders[0])


def _toolkit_version(include: Path) -> str:
    header = include / "cuda_runtime_api.h"
    found = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace"))
    number = int(found.group(1)) if found else 0
    return f"{number // 1000}.{number % 1000 // 10}"
