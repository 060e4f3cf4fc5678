"""The CUDA sources compile for every supported generation of GPUs, within its resources."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from helpers.emulation import harness
from helpers.kernels import CUDA, FILES, declared
from marginops._native import recipe

ARCHS = ("80", "90", "120")
# 256 threads of 128 registers are half of a multiprocessor's register file.
MOST_REGISTERS = 128
WARNINGS = ("-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports on one kernel for one architecture."""

    name: str
    arch: str
    registers: int
    spilled_bytes: int


def nvcc() -> Path:
    """The CUDA compiler; skips where there is none."""
    toolkit = harness.toolkit()
    path = toolkit / "bin" / "nvcc" if toolkit else None
    if path is None or not path.is_file():
        pytest.skip("there is no nvcc (CUDA_HOME, /usr/local/cuda, PATH)")
    return path


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of ``ptxas -v``."""
    kernel = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'"
        r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Kernel(
            found["name"],
            found["arch"],
            int(found["registers"]),
            int(found["stores"]) + int(found["loads"]),
        )
        for found in kernel.finditer(report)
    ]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Kernel]]:
    """All kernels of each file, for all architectures."""
    compiler, folder = nvcc(), tmp_path_factory.mktemp("cubin")

    def compiled(file: str) -> list[Kernel]:
        archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        host = ["-Xcompiler", ",".join(WARNINGS), "-Werror", "all-warnings"]
        output = ["-Xptxas", "-v", "-c", str(CUDA / file), "-o", str(folder / f"{file}.o")]
        command = [
            str(compiler),
            *recipe.NVCC_FLAGS,
            f"-I{harness.SOURCES}",
            *archs,
            *host,
            *output,
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr[-6000:]}"
        return parse(result.stderr)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(compiled, FILES), strict=True))


@pytest.mark.parametrize("file", FILES)
def test_kernels_exist_for_every_architecture(kernels: dict[str, list[Kernel]], file: str) -> None:
    by_arch = {arch: {k.name for k in kernels[file] if k.arch == arch} for arch in ARCHS}
    names = by_arch[ARCHS[0]]
    assert all(by_arch[arch] == names for arch in ARCHS)
    assert declared(file)
    for kernel in declared(file):
        assert any(f"{len(kernel)}{kernel}" in name for name in names), f"no launch of {kernel}"
    dtypes = ["If", "Id"]
    if "with_scalar" in (CUDA / file).read_text():
        dtypes += ["I6__half", "I13__nv_bfloat16"]
    for dtype in dtypes:
        assert any(dtype in name for name in names)


@pytest.mark.parametrize("file", FILES)
def test_nothing_spills(kernels: dict[str, list[Kernel]], file: str) -> None:
    assert [k for k in kernels[file] if k.spilled_bytes] == []


@pytest.mark.parametrize("file", FILES)
def test_registers_leave_room_for_other_blocks(kernels: dict[str, list[Kernel]], file: str) -> None:
    assert [k for k in kernels[file] if k.registers > MOST_REGISTERS] == []


@pytest.mark.parametrize("file", sorted(path.name for path in CUDA.glob("*.cpp")))
def test_binding_compiles_without_warnings(tmp_path: Path, file: str) -> None:
    toolkit = harness.toolkit()
    if toolkit is None:
        pytest.skip("there are no CUDA headers (CUDA_HOME, /usr/local/cuda, beside nvcc)")
    compiler = harness.compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no C++ compiler {compiler}")
    command = [compiler, *recipe.COMPILER_FLAGS, *WARNINGS, f"-I{harness.SOURCES}"]
    for folder in (*cpp_extension.include_paths(), f"{toolkit}/include"):
        command += ["-isystem", str(folder)]
    command += ["-c", str(CUDA / file), "-o", str(tmp_path / "binding.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-6000:]
