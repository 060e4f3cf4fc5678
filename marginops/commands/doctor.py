"""Reports this installation, the implementation that each op family uses, and the reasons."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import stat
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .._native import architectures, places, recipe, toolchain
from .._native.cache import Cache
from .._native.loader import Loader
from .._native.trust import RefusedError, user_name
from .._version import __version__

_PACKAGES = ("torch", "numpy", "pybind11", "ninja")
_VARIABLES = (
    "MARGINOPS_CACHE_DIR",
    "MARGINOPS_DISABLE_JIT",
    "MARGINOPS_CUDA_ARCH_LIST",
    "MARGINOPS_VERBOSE",
    "TORCH_CUDA_ARCH_LIST",
    "ATEN_CPU_CAPABILITY",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CC",
    "MAX_JOBS",
    "XDG_CACHE_HOME",
    "HOME",
    "TMPDIR",
)


def report(loader: Loader, build: bool = True) -> dict[str, Any]:
    """Collect the report. Where a probe fails, the report holds the text of its error.

    Args:
        loader: The loader of the native libraries.
        build: Compile the kernels that this machine can use and does not have yet.
    """
    probes: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "platform": _platform,
        "toolchain": _toolchain,
        "gpus": _gpus,
        "environment": lambda: {
            name: os.environ[name] for name in _VARIABLES if name in os.environ
        },
        "kernels": lambda: {
            name: _guarded(partial(_kernels, loader, name, build))
            for name in recipe.SOURCE_PATTERNS
        },
        "cache": _cache,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def text(report: dict[str, Any]) -> str:
    """The report as text that standard output can print."""
    # A path may hold bytes that are no text, and standard output may know ASCII only.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    lines = "\n".join(_lines(report, ""))
    return lines.encode(encoding, errors="backslashreplace").decode(encoding)


def _lines(value: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, content in value.items():
        if isinstance(content, dict) and content:
            lines += [f"{indent}{name}:", *_lines(content, indent + "  ")]
        elif isinstance(content, list) and content:
            lines += [f"{indent}{name}:", *(f"{indent}  {item}" for item in content)]
        else:
            lines.append(f"{indent}{name}: {'none' if content in (None, [], {}) else content}")
    return lines


def _guarded(probe: Callable[[], Any]) -> Any:
    try:
        return probe()
    except Exception as error:
        return f"unknown ({type(error).__name__}: {error})"


def _versions() -> dict[str, Any]:
    return {
        "marginops": __version__,
        "python": platform.python_version(),
        **{name: _guarded(partial(importlib.metadata.version, name)) for name in _PACKAGES},
        "torch.version.cuda": torch.version.cuda,
    }


def _platform() -> dict[str, Any]:
    capability = _guarded(torch.backends.cpu.get_cpu_capability)
    return {
        "system": _guarded(platform.platform),
        "machine": platform.machine(),
        "python": sys.executable,
        "cpu capability": capability,
        "instruction set": recipe.instruction_sets(capability)[0],
    }


def _toolchain() -> dict[str, Any]:
    def compiler() -> str:
        found = toolchain.find_compiler()
        return f"{found.path} ({found.version})"

    def toolkit() -> str | None:
        if torch.version.cuda is None:
            return None
        found = toolchain.find_cuda_toolkit()
        return f"{found.home} ({found.version})"

    return {
        "compiler": _guarded(compiler),
        "ninja": _guarded(toolchain.find_ninja),
        "cuda toolkit": _guarded(toolkit),
        "cuda architectures": _guarded(architectures.find_archs) if torch.version.cuda else None,
    }


def _gpus() -> list[str]:
    def describe(index: int) -> str:
        major, minor = torch.cuda.get_device_capability(index)
        return f"{torch.cuda.get_device_name(index)} ({major}.{minor})"

    if not torch.cuda.is_available():
        return []
    return [_guarded(partial(describe, index)) for index in range(torch.cuda.device_count())]


def _cache() -> dict[str, Any]:
    """The first place that can be used, or the first of all if none can. Nothing is left there."""
    try:
        candidates = places.candidates()
    except RefusedError as error:
        return {"folder": None, "usable": False, "obstacles": [str(error)]}
    described = [_place(place) for place in candidates]
    chosen = next((each for each in described if each["usable"]), described[0])
    others = [each for each in described if each is not chosen]
    return {
        **chosen,
        "other places": [obstacle for each in others for obstacle in each["obstacles"]],
    }


def _place(place: Path) -> dict[str, Any]:
    obstacles: list[str] = []

    def tried(probe: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return probe()
        except Exception as error:
            obstacles.append(f"{place} cannot be used: {error}")
            return otherwise

    def libraries() -> dict[str, str]:
        folder = places.find(place)
        if folder is None:
            return {}
        with folder:
            return Cache(folder).libraries()

    def size() -> int:
        return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

    def new_file() -> int:
        folder = os.open(nearest, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return places.probe_file(folder)
        finally:
            os.close(folder)

    found = tried(libraries, {})
    trusted = not obstacles
    # A folder that is missing will be made in the nearest folder above it.
    version = [place / __version__] if os.path.isdir(place / __version__) else []
    nearest = next(path for path in (*version, place, *place.parents) if os.path.lexists(path))
    probe = tried(new_file, None)
    loadable: bool | str = "unknown, because no file can be made there"
    if probe is not None:
        errors = len(obstacles)
        tried(lambda: places.check_executable(probe, nearest), None)
        loadable = len(obstacles) == errors
        os.close(probe)
    facts = place.stat() if os.path.exists(place) else None
    return {
        "folder": str(place),
        "usable": trusted and (loadable is True or "usable" in found.values()),
        "owner": user_name(facts.st_uid) if facts else None,
        "mode": f"{stat.S_IMODE(facts.st_mode):04o}" if facts else None,
        "writable": probe is not None,
        "loadable": loadable,
        "obstacles": obstacles,
        "libraries": found,
        "bytes": _guarded(size),
    }


def _kernels(loader: Loader, device_type: str, build: bool) -> dict[str, Any]:
    # Nobody needs CUDA kernels on a machine without a GPU, so do not build them there.
    build = build and (device_type == "cpu" or torch.cuda.is_available())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = loader.outcome(device_type, build)
    compiled = outcome.build_info.get("families", [])
    known = sorted({*recipe.families(loader.csrc, device_type), *compiled})
    return {
        "op families": {
            name: outcome.implementation if name in compiled else "reference" for name in known
        },
        "why not better": outcome.reasons,
        "library": str(outcome.library) if outcome.library else None,
        "build info": outcome.build_info,
    }
