"""Writes the folder that ninja builds a library in: ``build.ninja`` and links to other folders.

Ninja and the programs that it starts see relative paths of plain characters only. So folders may
have any name, and no path of this machine gets into the library.
"""

from __future__ import annotations

import logging
import os
import shlex
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .plan import Plan
from .toolchain import ToolchainError


def write(plan: Plan, folder: Path, *, baseline: bool = False) -> None:
    """Fill the folder, in which ``ninja`` then makes ``<name>.so``.

    Args:
        plan: The library to build.
        folder: An empty folder, or one that this function has filled before.
        baseline: Compile for the baseline instruction set.

    Raises:
        ToolchainError: Headers that every build needs are missing.
    """
    includes = []
    for name, target in _header_folders(plan):
        _link(folder / name, target)
        includes += ["-isystem", name]
    _link(folder / "csrc", plan.csrc)
    flags = plan.baseline_flags if baseline else plan.compiler_flags
    module = f"-DTORCH_EXTENSION_NAME={plan.name}"
    compile_command = [*plan.compiler.command, module, "-Icsrc", *includes, "-fPIC", *flags]
    libraries = list(_libraries(plan, folder))
    lines = [
        *_rule("compile", [*compile_command, "-c"], "$in -o $out"),
        *_rule("link", plan.compiler.command, f"$in -shared {shlex.join(libraries)} -o $out"),
    ]
    if plan.toolkit is not None:
        nvcc = [
            str(plan.toolkit.nvcc),
            "-Icsrc",
            *_cpp_extension().COMMON_NVCC_FLAGS,
            *plan.nvcc_flags,
        ]
        lines += _rule("compile_cuda", [*nvcc, "--compiler-options", "-fPIC", "-c"], "$in -o $out")
    objects = []
    for source in plan.sources:
        path = source.relative_to(plan.csrc).as_posix()
        objects.append(_escaped(path.replace("/", "-") + ".o"))
        rule = "compile_cuda" if source.suffix == ".cu" else "compile"
        lines.append(f"build {objects[-1]}: {rule} {_escaped('csrc/' + path)}")
    lines.append(f"build {plan.name}.so: link {' '.join(objects)}")
    (folder / "build.ninja").write_bytes(os.fsencode("\n".join(lines) + "\n"))


def _rule(name: str, command: Sequence[str], rest: str) -> list[str]:
    """A rule whose command is words for the shell, and then text in ninja's own language."""
    words = shlex.join(command).replace("$", "$$")
    if "\n" in words:
        raise ToolchainError(f"expected paths without line breaks, got the command {command}")
    return [f"rule {name}", f"  command = {words} {rest}"]


def _escaped(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _link(link: Path, target: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target.absolute(), target_is_directory=True)


def _cpp_extension() -> Any:
    """The module of torch that knows its own folders. It is imported for a build only."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    try:
        # While it is imported, the module warns where it finds no GPU, which a build need not have.
        logger.setLevel(logging.ERROR)
        from torch.utils import cpp_extension
    except ImportError as error:
        raise ToolchainError(f"{error.name} is missing: run pip install {error.name}") from error
    finally:
        logger.setLevel(level)
    return cpp_extension


def _header_folders(plan: Plan) -> Iterator[tuple[str, Path]]:
    """The folders of headers other than ours, with plain names for them."""
    import pybind11

    torch_folders = [Path(path) for path in _cpp_extension().include_paths()]
    if not any((path / "torch/csrc/stable/tensor.h").is_file() for path in torch_folders):
        raise ToolchainError(
            f"torch/csrc/stable/tensor.h is missing in {torch_folders[0]}: this installation of "
            "torch has no C++ headers; install torch from a wheel that has them"
        )
    # torch takes this scheme as well, because others may name a folder that does not exist.
    python = Path(sysconfig.get_path("include", "posix_prefix"))
    elsewhere = [os.environ.get(name, "") for name in ("CPATH", "CPLUS_INCLUDE_PATH")]
    folders = [str(python), *os.pathsep.join(elsewhere).split(os.pathsep)]
    if not any(os.path.isfile(os.path.join(folder, "Python.h")) for folder in folders if folder):
        raise ToolchainError(
            f"Python.h is missing in {python}: install the headers of Python (the package "
            "python3-dev of Debian and Ubuntu, python3-devel of Fedora)"
        )
    yield "pybind11", Path(pybind11.get_include())
    for number, path in enumerate(torch_folders):
        yield f"torch{number or ''}", path
    yield "python", python
    if plan.toolkit is not None and plan.toolkit.include != Path("/usr/include"):
        yield "cuda", plan.toolkit.include


def _libraries(plan: Plan, folder: Path) -> Iterator[str]:
    """The flags of the linker, as torch.utils.cpp_extension.load gives them."""
    for number, path in enumerate(_cpp_extension().library_paths()):
        _link(folder / f"libraries{number or ''}", Path(path))
        yield f"-Llibraries{number or ''}"
    cuda = plan.toolkit is not None
    names = ["c10", "c10_cuda"] if cuda else ["c10"]
    names += ["torch_cpu", "torch_cuda"] if cuda else ["torch_cpu"]
    for name in [*names, "torch", "torch_python"]:
        yield f"-l{name}"
    if plan.toolkit is not None:
        runtime = plan.toolkit.runtime
        if runtime.is_absolute():
            _link(folder / "cuda-libraries", runtime.parent)
            yield "-Lcuda-libraries"
        yield f"-l:{runtime.name}"
