"""The plan for the build of one native library: sources, flags, and the key in the cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .._version import __version__
from . import architectures, recipe, toolchain


class UnavailableError(Exception):
    """There are no native kernels.

    Args:
        reason: Why, in one sentence for the user.
        asked_for: Whether the user or the kind of machine wants it so. Then there is no warning.
    """

    def __init__(self, reason: str, asked_for: bool = False) -> None:
        super().__init__(reason)
        self.asked_for = asked_for


def csrc_folder() -> Path:
    """The folder of the C++ and CUDA sources.

    An installed package holds it. In a source checkout it lies next to the package.
    """
    package = Path(__file__).resolve().parent.parent
    installed = package / "csrc"
    return installed if (installed / "module.cpp").is_file() else package.parent / "csrc"


def torch_release(version: str) -> tuple[int, ...]:
    """The major and minor number in the text of a torch version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Plan:
    """How to build one library. ``inputs`` holds everything that its content depends on.

    Attributes:
        name: The name of the module that the library holds.
        device_type: The device type whose kernels it holds.
        label: The instruction set, or the GPU architectures.
        csrc: The folder of the sources.
        sources: The files to compile.
        compiler: The compiler of the C++ files, and the program that links.
        compiler_flags: Flags for each C++ file.
        baseline_flags: The same for a compiler that does not know the instruction set.
        toolkit: The CUDA toolkit, for kernels of CUDA.
        archs: The GPU architectures.
        nvcc_flags: Flags for each CUDA file.
        inputs: What the content of the library depends on.
    """

    name: str
    device_type: str
    label: str
    csrc: Path
    sources: list[Path]
    compiler: toolchain.Compiler
    compiler_flags: list[str]
    baseline_flags: list[str]
    toolkit: toolchain.CudaToolkit | None
    archs: list[str]
    nvcc_flags: list[str]
    inputs: dict[str, object] = field(repr=False)

    @property
    def key(self) -> str:
        """The name of this library in the cache."""
        return hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode()).hexdigest()


def make_plan(device_type: str, csrc: Path) -> Plan:
    """Plan the library of a device type for this machine and this torch.

    Raises:
        UnavailableError: Something that the build needs is missing.
    """
    _check_torch(device_type)
    try:
        return _plan(device_type, csrc)
    except toolchain.ToolchainError as error:
        raise UnavailableError(str(error)) from error


def _check_torch(device_type: str) -> None:
    if torch_release(torch.__version__) < recipe.OLDEST_TORCH:
        oldest = ".".join(map(str, recipe.OLDEST_TORCH))
        raise UnavailableError(f"torch {torch.__version__} is older than {oldest}")
    if device_type == "cuda" and torch.version.cuda is None:
        # With ROCm the device type is cuda, too. Its users get a warning, because they run the
        # slow reference. Others cannot have CUDA tensors.
        raise UnavailableError(
            f"torch {torch.__version__} is built without CUDA", asked_for=torch.version.hip is None
        )


def _plan(device_type: str, csrc: Path) -> Plan:
    sources = recipe.sources(csrc, device_type)
    if len(sources) == 1:
        raise UnavailableError(f"there are no {device_type} sources in {csrc}")
    compiler = toolchain.find_compiler()
    toolkit, archs, nvcc_flags = None, list[str](), list[str]()
    instruction_set = "baseline"
    inputs: dict[str, object] = {}
    if device_type == "cuda":
        toolkit = toolchain.find_cuda_toolkit()
        archs = architectures.find_archs()
        nvcc_flags = [*recipe.NVCC_FLAGS, *architectures.nvcc_flags(archs)]
        nvcc_flags += toolchain.host_compiler_flags(compiler)
        inputs["cuda"] = [str(toolkit.home), toolkit.version, archs]
        variables = ("CC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
        inputs["environment"] = {name: os.environ.get(name) for name in variables}
    else:
        instruction_set = recipe.instruction_sets(torch.backends.cpu.get_cpu_capability())[0]

    def compiler_flags(instruction_set: str) -> list[str]:
        target = ("-DUSE_CUDA",) if archs else recipe.INSTRUCTION_SETS[instruction_set]
        definitions = recipe.definitions(
            csrc,
            version=__version__,
            torch_version=str(torch.__version__),
            device_type=device_type,
            instruction_set=instruction_set,
            archs=archs,
        )
        return [*recipe.COMPILER_FLAGS, *target, *definitions]

    inputs |= {
        "files": recipe.content_hashes(csrc, device_type),
        "flags": [compiler_flags(instruction_set), nvcc_flags],
        "compiler": [*compiler.command, compiler.version],
        "torch": [torch_release(torch.__version__), torch.version.cuda],
        "python": sysconfig.get_config_var("SOABI"),
        "pybind11": _pybind11_version(),
        "machine": [platform.machine(), platform.system(), *platform.libc_ver()],
    }
    return Plan(
        name=recipe.module_name(device_type, instruction_set),
        device_type=device_type,
        label=" ".join(archs) or instruction_set,
        csrc=csrc,
        sources=sources,
        compiler=compiler,
        compiler_flags=compiler_flags(instruction_set),
        baseline_flags=compiler_flags("baseline"),
        toolkit=toolkit,
        archs=archs,
        nvcc_flags=nvcc_flags,
        inputs=inputs,
    )


def _pybind11_version() -> str:
    try:
        return importlib.metadata.version("pybind11")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnavailableError("pybind11 is missing: run pip install pybind11") from error
