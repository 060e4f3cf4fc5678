"""Sources, flags and instruction sets of the native libraries.

``setup.py`` uses this file without importing marginops.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from pathlib import Path

OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"

COMPILER_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror=return-type",
    STABLE_ABI,
)
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr")

# Best first. The names are those of torch.backends.cpu.get_cpu_capability(), in lower case.
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
    "baseline": (),
}

SOURCE_PATTERNS = {"cpu": ("cpu/*.cpp",), "cuda": ("cuda/*.cu", "cuda/*.cpp")}
KERNEL_PATTERNS = {"cpu": "cpu/*.cpp", "cuda": "cuda/*.cu"}
HEADER_SUFFIXES = (".h", ".cuh")


def instruction_sets(capability: str | None = None) -> list[str]:
    """The instruction sets that this machine can run, best first.

    Without ``capability``, these are all instruction sets for this kind of processor.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    names = list(INSTRUCTION_SETS)
    if capability is None:
        return names
    return names[names.index(capability.lower()) :] if capability.lower() in names else ["baseline"]


def module_name(device_type: str, instruction_set: str) -> str:
    """The name of the module that holds the kernels of a device type."""
    return f"_cpu_{instruction_set}" if device_type == "cpu" else f"_{device_type}"


def sources(csrc: Path, device_type: str) -> list[Path]:
    """The files to compile. The first is the module itself."""
    found = [path for pattern in SOURCE_PATTERNS[device_type] for path in csrc.glob(pattern)]
    return [csrc / "module.cpp", *sorted(found)]


def headers(csrc: Path) -> list[Path]:
    """The files that sources may include."""
    return sorted(path for path in csrc.rglob("*") if path.suffix in HEADER_SUFFIXES)


def content_hashes(csrc: Path, device_type: str) -> dict[str, str]:
    """The SHA-256 of each file that a build may read, by its path below ``csrc``."""
    return {
        file.relative_to(csrc).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [*sources(csrc, device_type), *headers(csrc)]
    }


def fingerprint(csrc: Path, device_type: str) -> str:
    """A short hash of the names and contents of all files that a build may read."""
    hashes = json.dumps(content_hashes(csrc, device_type), sort_keys=True)
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def families(csrc: Path, device_type: str) -> list[str]:
    """The op families that have kernels for a device type. A family may have several files."""
    stems = (path.stem for path in csrc.glob(KERNEL_PATTERNS[device_type]))
    return sorted({stem.partition("_")[0] for stem in stems})


def definitions(
    csrc: Path,
    *,
    version: str,
    torch_version: str,
    device_type: str,
    instruction_set: str,
    archs: Iterable[str],
) -> list[str]:
    """Flags of the C++ compiler that define the contents of ``build_info()``.

    The values have no quotation marks, which a shell might remove. The source turns them into
    strings. The flags are not for nvcc, for which a comma would begin another macro.
    """
    macros = {
        "MARGINOPS_VERSION": version,
        "MARGINOPS_TORCH": torch_version,
        "MARGINOPS_DEVICE": device_type,
        "MARGINOPS_INSTRUCTION_SET": instruction_set,
        "MARGINOPS_ARCHS": ",".join(archs),
        "MARGINOPS_FAMILIES": ",".join(families(csrc, device_type)),
        "MARGINOPS_SOURCES": fingerprint(csrc, device_type),
    }
    return [f"-D{name}={value}" for name, value in macros.items()]
