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
from . import recipe, toolchain


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
    """How to build one library. ``inputs`` holds everything that its content depends on."""

    name: str
    device_type: str
    label: str
    sources: list[str]
    include_paths: list[str]
    compiler_flags: list[str]
    nvcc_flags: list[str]
    environment: dict[str, str]
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
    compiler = toolchain.find_compiler()
    path = os.pathsep.join([str(toolchain.find_ninja()), os.environ.get("PATH", os.defpath)])
    environment = {"PATH": path, "CXX": compiler.command}
    inputs: dict[str, object] = {}
    if device_type == "cuda":
        toolkit = toolchain.find_cuda_toolkit()
        archs = toolchain.find_archs()
        environment |= {"CUDA_HOME": str(toolkit.home), "TORCH_CUDA_ARCH_LIST": ";".join(archs)}
        instruction_set, target_flags, label = "baseline", ["-DUSE_CUDA"], " ".join(archs)
        inputs["cuda"] = [str(toolkit.home), toolkit.version, archs]
        inputs["environment"] = {
            name: os.environ.get(name) for name in ("CC", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
        }
    else:
        archs = []
        instruction_set = recipe.instruction_sets(torch.backends.cpu.get_cpu_capability())[0]
        target_flags, label = [*recipe.INSTRUCTION_SETS[instruction_set]], instruction_set
    definitions = recipe.definitions(
        csrc,
        version=__version__,
        torch_version=str(torch.__version__),
        device_type=device_type,
        instruction_set=instruction_set,
        archs=archs,
    )
    compiler_flags = [*recipe.COMPILER_FLAGS, *target_flags, *definitions]
    nvcc_flags = [*recipe.NVCC_FLAGS]
    sources = recipe.sources(csrc, device_type)
    if len(sources) == 1:
        raise UnavailableError(f"there are no {device_type} sources in {csrc}")
    inputs |= {
        "files": recipe.content_hashes(csrc, device_type),
        "flags": [compiler_flags, nvcc_flags],
        "compiler": [compiler.command, compiler.path, compiler.version],
        "torch": [torch_release(torch.__version__), torch.version.cuda],
        "python": sysconfig.get_config_var("SOABI"),
        "pybind11": importlib.metadata.version("pybind11"),
        "machine": [platform.machine(), platform.system(), *platform.libc_ver()],
    }
    return Plan(
        name=recipe.module_name(device_type, instruction_set),
        device_type=device_type,
        label=label,
        sources=[str(file) for file in sources],
        include_paths=[str(csrc), _pybind11_headers()],
        compiler_flags=compiler_flags,
        nvcc_flags=nvcc_flags,
        environment=environment,
        inputs=inputs,
    )


def _pybind11_headers() -> str:
    import pybind11

    return pybind11.get_include()
