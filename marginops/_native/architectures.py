"""The GPU architectures to compile for: names that users write, and flags of nvcc."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch

from . import process, toolchain

# As in torch.utils.cpp_extension, which reads TORCH_CUDA_ARCH_LIST.
_GENERATIONS = {
    "kepler": "3.5+PTX",
    "kepler+tesla": "3.7",
    "maxwell": "5.0 5.2+PTX",
    "maxwell+tegra": "5.3",
    "pascal": "6.0 6.1+PTX",
    "volta": "7.0+PTX",
    "volta+tegra": "7.2",
    "turing": "7.5+PTX",
    "ampere": "8.0 8.6+PTX",
    "ampere+tegra": "8.7",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0 10.3 12.0 12.1+PTX",
    "blackwell+tegra": "11.0",
    "rubin": "10.7+PTX",
}
_FORM = re.compile(
    r"(?P<prefix>sm_|compute_)?(?P<major>\d{1,2})\.?(?P<minor>\d)(?P<kind>[af]?)"
    r"(?P<ptx>\+ptx|-virtual|-real)?"
)
_VARIABLES = ("MARGINOPS_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST")


def find_archs() -> list[str]:
    """The GPU architectures to compile for, such as ``["8.0", "9.0+PTX"]``, lowest first.

    ``MARGINOPS_CUDA_ARCH_LIST`` or ``TORCH_CUDA_ARCH_LIST`` names them, or else they are those of
    the visible GPUs.
    """
    for variable in _VARIABLES:
        words = re.split(r"[\s;,]+", os.environ.get(variable, ""))
        archs = {arch for word in words if word for arch in _named(word, variable)}
        if archs:
            return sorted(archs, key=_order)
    return _native("no GPU is visible, so its architecture is unknown")


def _named(word: str, variable: str) -> list[str]:
    name = word.lower()
    if name == "native":
        return _native(f"{variable}: expected a visible GPU for native, got none")
    if name in ("all", "all-major"):
        known = known_archs(toolchain.find_cuda_toolkit())
        if not known:
            raise toolchain.ToolchainError(
                f"{variable}: expected a list such as 8.0;9.0, got {word}, but nvcc does not say "
                "which architectures it knows"
            )
        majors = {arch.partition(".")[0]: arch for arch in reversed(known)}
        return known if name == "all" else list(majors.values())
    if name in _GENERATIONS:
        return _GENERATIONS[name].split()
    found = _FORM.fullmatch(name)
    if found is None:
        raise toolchain.ToolchainError(
            f"{variable}: expected GPU architectures such as 9.0, 9.0a, 8.0+PTX, sm_90, Hopper, "
            f"native, all or all-major, got {word}"
        )
    ptx = found["ptx"] in ("+ptx", "-virtual") or found["prefix"] == "compute_"
    return [f"{found['major']}.{found['minor']}{found['kind']}{'+PTX' if ptx else ''}"]


def _native(absence: str) -> list[str]:
    capabilities = visible_capabilities()
    if not capabilities:
        raise toolchain.ToolchainError(f"{absence}: set MARGINOPS_CUDA_ARCH_LIST, e.g. to 9.0")
    return [f"{major}.{minor}" for major, minor in capabilities]


def _order(arch: str) -> tuple[int, int, str]:
    found = re.match(r"(\d+)\.(\d)(.*)", arch)
    assert found is not None
    return int(found.group(1)), int(found.group(2)), found.group(3)


def known_archs(toolkit: toolchain.CudaToolkit) -> list[str]:
    """The architectures that nvcc has machine code for, lowest first; empty if it does not say."""
    try:
        done = process.run([str(toolkit.nvcc), "--list-gpu-code"], limit=20)
    except process.ProgramError:
        return []
    numbers = re.findall(r"^sm_(\d+)(\d)$", done.output, re.MULTILINE)
    return sorted((f"{major}.{minor}" for major, minor in numbers), key=_order)


def check_archs(archs: Iterable[str], toolkit: toolchain.CudaToolkit) -> None:
    """Raise an error if nvcc does not know one of the architectures."""
    known = known_archs(toolkit)
    for arch in archs:
        base = re.split(r"[af+]", arch)[0]
        if known and base not in known:
            raise toolchain.ToolchainError(
                f"nvcc of CUDA {toolkit.version} in {toolkit.home} does not know the GPU "
                f"architecture {arch}. It knows {', '.join(known)}. Set MARGINOPS_CUDA_ARCH_LIST, "
                "or CUDA_HOME to another toolkit"
            )


def nvcc_flags(archs: Iterable[str]) -> list[str]:
    """The flags of nvcc for the architectures."""
    flags = []
    for arch in archs:
        base, _, ptx = arch.partition("+")
        number = base.replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def visible_capabilities() -> list[tuple[int, int]]:
    """The distinct compute capabilities of the visible GPUs, lowest first."""
    if not torch.cuda.is_available():
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(device) for device in devices})


def runs_on(archs: Iterable[str], capability: tuple[int, int]) -> bool:
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
