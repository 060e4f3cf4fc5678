"""Packages the C++ and CUDA sources with the Python code. Their first use compiles them.

With ``MARGINOPS_BUILD=aot`` this build compiles them, against the installed torch, into the wheel.
"""

from __future__ import annotations

import atexit
import importlib
import os
import runpy
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CSRC = Path("csrc")


class BuildPackage(build_py):  # type: ignore[misc, unused-ignore]
    """Copies the package into the build folder, and removes files of earlier builds from it.

    The wheel contains every file of that folder. Without this, a C++ file that has been renamed
    since the last build would be compiled twice, under its old and its new name.
    """

    def run(self) -> None:
        """Copies the files, then removes all others."""
        super().run()
        wanted = {Path(path).resolve() for path in self.get_outputs()}
        for path in Path(self.build_lib, "marginops").rglob("*"):
            if path.is_file() and path.resolve() not in wanted:
                path.unlink()


def load_build_files() -> ModuleType:
    """The files of ``_native`` as a package of their own. marginops would import torch's ops."""
    package = sys.modules["marginops_setup"] = ModuleType("marginops_setup")
    package.__path__ = [str(Path("marginops/_native").resolve())]
    for name in ("architectures", "recipe", "toolchain"):
        setattr(package, name, importlib.import_module(f"{package.__name__}.{name}"))
    return package


def one_word(compiler: Any) -> str:
    """The path of a program that runs the compiler: torch takes ``CXX`` as one word."""
    if len(compiler.command) == 1:
        return str(compiler.path)
    folder = tempfile.mkdtemp(prefix="marginops-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = Path(folder, Path(compiler.program).name)
    program.write_text(f'#!/bin/sh\nexec {shlex.join(compiler.command)} "$@"\n')
    program.chmod(0o755)
    return str(program)


def cuda_arguments(files: Any, compiler: Any) -> tuple[list[str], list[str], list[str]]:
    """GPU architectures, flags of nvcc, and folders of headers; empty without a toolkit."""
    import torch

    architectures, recipe, toolchain = files.architectures, files.recipe, files.toolchain
    if torch.version.cuda is None:
        return [], [], []
    try:
        toolkit = toolchain.find_cuda_toolkit()
        archs = architectures.find_archs()
        architectures.check_archs(archs, toolkit)
        flags = [*recipe.NVCC_FLAGS, *architectures.nvcc_flags(archs)]
        # torch itself passes CC to nvcc.
        if not os.environ.get("CC"):
            flags += toolchain.host_compiler_flags(compiler)
    except toolchain.ToolchainError as error:
        print(f"marginops: no CUDA library: {error}", file=sys.stderr)
        return [], [], []
    os.environ["CUDA_HOME"] = str(toolkit.home)
    # torch knows one folder of headers.
    known = toolkit.home / "include"
    return archs, flags, [str(toolkit.include)] if toolkit.include != known else []


def ahead_of_time() -> dict[str, Any]:
    """The arguments of ``setup`` that compile the libraries. Only this function needs torch."""
    import pybind11
    import torch

    files = load_build_files()
    recipe, toolchain = files.recipe, files.toolchain
    version = runpy.run_path("marginops/_version.py")["__version__"]
    try:
        compiler = toolchain.find_compiler()
        path = [str(Path(toolchain.find_ninja()).parent), os.environ.get("PATH", os.defpath)]
    except toolchain.ToolchainError as error:
        sys.exit(f"marginops: {error}")
    os.environ["CXX"] = one_word(compiler)
    os.environ["PATH"] = os.pathsep.join(path)
    archs, nvcc_flags, include = cuda_arguments(files, compiler)
    # This import comes last, because the module reads CUDA_HOME while it is imported.
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):
        def build_extension(self, extension: Any) -> None:
            # The libraries share sources, but not object files. So each gets its own folder.
            shared: str = getattr(self, "build_temp")  # noqa: B009
            self.build_temp = os.path.join(shared, extension.name)
            super().build_extension(extension)
            self.build_temp = shared

    def extension(kind: Any, device_type: str, instruction_set: str, flags: list[str]) -> Any:
        definitions = recipe.definitions(
            CSRC,
            version=version,
            torch_version=str(torch.__version__),
            device_type=device_type,
            instruction_set=instruction_set,
            archs=archs if device_type == "cuda" else [],
        )
        arguments = {"cxx": [*recipe.COMPILER_FLAGS, "-g0", *flags, *definitions]}
        if device_type == "cuda":
            arguments["nvcc"] = nvcc_flags
        return kind(
            f"marginops._native.{recipe.module_name(device_type, instruction_set)}",
            [str(file) for file in recipe.sources(CSRC, device_type)],
            include_dirs=[str(CSRC.resolve()), pybind11.get_include(), *include],
            extra_compile_args=arguments,
        )

    extensions = [
        extension(CppExtension, "cpu", name, [*recipe.INSTRUCTION_SETS[name]])
        for name in recipe.instruction_sets()
    ]
    if archs and recipe.families(CSRC, "cuda"):
        extensions.append(extension(CUDAExtension, "cuda", "baseline", ["-DUSE_CUDA"]))
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_py": BuildPackage, "build_ext": Build},
    }


build = os.environ.get("MARGINOPS_BUILD") or "jit"
if build not in ("jit", "aot"):
    sys.exit(f"MARGINOPS_BUILD: expected jit (the default) or aot, got {build}")

csrc_packages = ["marginops.csrc"]
csrc_packages += [f"marginops.csrc.{path.name}" for path in sorted(CSRC.iterdir()) if path.is_dir()]

setup(
    # Not in pyproject.toml, where old and new versions of setuptools expect different forms.
    license="BSD-3-Clause",
    packages=[*find_packages(include=["marginops", "marginops.*"]), *csrc_packages],
    package_dir={"marginops.csrc": "csrc"},
    package_data={
        "marginops": ["py.typed"],
        **{name: ["*.h", "*.cuh", "*.cpp", "*.cu"] for name in csrc_packages},
    },
    **(ahead_of_time() if build == "aot" else {"cmdclass": {"build_py": BuildPackage}}),
)
