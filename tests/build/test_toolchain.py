"""Compilers, ninja and CUDA toolkits are found, and what is wrong with them is said."""

from __future__ import annotations

import sysconfig
import time
from pathlib import Path

import pytest
import torch

from helpers.native_sources import write_program
from marginops._native import toolchain
from marginops._native.toolchain import Compiler, CudaToolkit, ToolchainError

VARIABLES = ("CXX", "CC", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("command", "words", "compiler"),
    [
        ("PROGRAM", ("PROGRAM",), "PROGRAM"),
        ("PROGRAM -fno-plt -DX='a b'", ("PROGRAM", "-fno-plt", "-DX=a b"), "PROGRAM"),
        ("  ccache PROGRAM  -m64 ", ("ccache", "PROGRAM", "-m64"), "PROGRAM"),
        ("env A=1 PROGRAM", ("env", "A=1", "PROGRAM"), "PROGRAM"),
        ("'PROGRAM' \"-DX=\"", ("PROGRAM", "-DX="), "PROGRAM"),
    ],
)
def test_compiler_with_arguments_and_launchers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: tuple[str, ...],
    compiler: str,
) -> None:
    program = write_program(tmp_path / "my g++", 'echo "my compiler 1.0"').replace(" ", "\\ ")
    quoted = command if "'PROGRAM'" in command else command.replace("PROGRAM", program)
    quoted = quoted.replace("PROGRAM", str(tmp_path / "my g++"))
    for name in ("ccache", "env"):
        write_program(tmp_path / "bin" / name, "echo my launcher")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("CXX", quoted)
    found = toolchain.find_compiler()
    full = {"PROGRAM": str(tmp_path / "my g++")}
    full |= {name: str(tmp_path / "bin" / name) for name in ("ccache", "env")}
    assert found.command == tuple(full.get(word, word) for word in words)
    assert found.path == found.command[0]
    assert found.program == full[compiler]


def test_compiler_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build runs in another folder."""
    program = write_program(tmp_path / "tools/g++", "echo 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "./tools/g++")
    assert toolchain.find_compiler().command == (program,)
    monkeypatch.setenv("CXX", "env ./tools/g++")
    assert toolchain.find_compiler().command[1:] == (program,)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("nonexistent-g++", "nonexistent-g++ is not on PATH"),
        ("/nonexistent/g++ -m64", "/nonexistent/g++ does not exist"),
        ("/tmp", "/tmp is a folder"),
        (__file__, f"{__file__} is not executable"),
        ("g++ '", "No closing quotation"),
        ("''", " is not on PATH"),
        ("g++\n-m64", "a command is one line"),
        ("false", "false --version fails with exit status 1"),
    ],
)
def test_reason_why_cxx_is_no_compiler(
    monkeypatch: pytest.MonkeyPatch, command: str, reason: str
) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_compiler()
    text = str(caught.value)
    assert text.startswith(f"CXX: expected the command of a C++ compiler, got {command} (")
    assert reason in text


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("printf 'g++ libert\\351 1.0\\n'", "g++ libert\N{REPLACEMENT CHARACTER} 1.0"),
        ("true", ""),
        ("printf '\\n\\n  g++ 1.0  \\nmore\\n'", "g++ 1.0"),
        ("echo g++ 1.0 >&2", "g++ 1.0"),
        ("printf 'a\\033[1mb\\n'", "a?[1mb"),
        ("head -c 5000000 /dev/zero | tr '\\0' x", "x" * 300 + " ..."),
        ("echo $LC_ALL", "C"),
    ],
)
def test_version_text_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, version: str
) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("CXX", write_program(tmp_path / "g++", output))
    assert toolchain.find_compiler().version == version


def test_version_that_never_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_ANSWER_TIME", 1.0)
    monkeypatch.setenv("CXX", write_program(tmp_path / "g++", "sleep 600"))
    began = time.monotonic()
    with pytest.raises(ToolchainError, match=r"CXX: .*g\+\+ --version: .*longer than 1 s"):
        toolchain.find_compiler()
    assert time.monotonic() - began < 30


def test_broken_compiler_on_path_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(tmp_path / "c++", "echo broken >&2; exit 3")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=r"install g\+\+ or clang\+\+.*status 3: broken"):
        toolchain.find_compiler()
    working = write_program(tmp_path / "g++", "echo g++ 12")
    assert toolchain.find_compiler() == Compiler((working,), working, "g++ 12")


@pytest.mark.parametrize(
    ("version", "too_old"),
    [
        ("g++ (Ubuntu 9.4.0-1ubuntu1~20.04.2) 9.4.0", "GCC 9.4"),
        ("c++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-4)", "GCC 8.5"),
        ("x86_64-conda-linux-gnu-c++ (conda-forge gcc 10.4.0-19) 10.4.0", "GCC 10.4"),
        ("Debian clang version 11.0.1-2", "clang 11.0"),
        ("g++ (GCC) 11.4.1 20231218 (Red Hat 11.4.1-3)", None),
        ("g++-12 (Debian 12.2.0-14+deb12u1) 12.2.0", None),
        ("clang version 12.0.0", None),
        ("Intel(R) oneAPI DPC++/C++ Compiler 2024.0.0 (2024.0.0.20231017)", None),
        ("", None),
    ],
)
def test_versions_that_are_too_old(version: str, too_old: str | None) -> None:
    text = Compiler(("/usr/bin/c++",), "/usr/bin/c++", version).too_old
    if too_old is None:
        assert text is None
    else:
        assert (
            text == f"/usr/bin/c++ is {too_old}, but marginops needs GCC 11 or clang 12, or later"
        )


def test_nvcc_uses_the_compiler_of_the_cpp_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = write_program(tmp_path / "g++-11", "echo 11")
    monkeypatch.setenv("CXX", f"env A=1 {host} -fno-plt")
    compiler = toolchain.find_compiler()
    assert toolchain.host_compiler_flags(compiler) == ["-ccbin", host]

    other = write_program(tmp_path / "gcc-10", "echo 10")
    with monkeypatch.context() as patch:
        patch.setenv("CC", f"env {other}")
        assert toolchain.host_compiler_flags(compiler) == ["-ccbin", other]
        patch.setenv("CC", "/nonexistent/gcc")
        with pytest.raises(ToolchainError, match="CC: expected a host compiler for nvcc, got /non"):
            toolchain.host_compiler_flags(compiler)
    for variable, text in {
        "NVCC_CCBIN": other,
        "NVCC_PREPEND_FLAGS": f"-O2 -ccbin {other}",
        "NVCC_APPEND_FLAGS": f"--compiler-bindir={other}",
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(variable, text)
            assert toolchain.host_compiler_flags(compiler) == []
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-O2")
    assert toolchain.host_compiler_flags(compiler) == ["-ccbin", host]


def test_ninja_is_found_without_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ninja.py").write_text("raise RuntimeError('another package')")
    monkeypatch.syspath_prepend(tmp_path)
    expected = toolchain.find_ninja()

    def no_folder(*names: str) -> str:
        return str(tmp_path / "nowhere")

    monkeypatch.setattr(sysconfig, "get_path", no_folder)
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="ninja is missing: run pip install ninja"):
        toolchain.find_ninja()
    write_program(tmp_path / "ninja", "echo another program")
    with pytest.raises(ToolchainError, match="ninja --version gives another program"):
        toolchain.find_ninja()
    (tmp_path / "ninja").unlink()
    (tmp_path / "ninja").symlink_to(expected)
    assert toolchain.find_ninja() == str(tmp_path / "ninja")


def make_toolkit(home: Path, version: int) -> Path:
    for name, text in {
        "bin/nvcc": "",
        "include/cuda_runtime.h": "",
        "include/cuda_runtime_api.h": f"#define CUDART_VERSION  {version}\n",
    }.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return home


def test_toolkit_is_found_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "bin/nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setattr(torch.version, "cuda", "99.2")
    monkeypatch.setenv("PATH", str(wrapper.parent))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", 98040)))
    with pytest.raises(toolchain.ToolchainError, match=r"CUDA 99\.2, .* 98\.4 in .*old"):
        toolchain.find_cuda_toolkit()

    monkeypatch.setenv("CUDA_PATH", str(make_toolkit(tmp_path / "new", 99010)))
    assert toolchain.find_cuda_toolkit() == toolchain.CudaToolkit(tmp_path / "new", "99.1")

    monkeypatch.delenv("CUDA_PATH")
    make_toolkit(tmp_path, 99000)
    wrapper.chmod(0o755)
    found = toolchain.find_cuda_toolkit()
    assert found == toolchain.CudaToolkit(tmp_path, "99.0")
    assert found.include == tmp_path / "include"

    # As conda has it.
    targets = tmp_path / "targets/x86_64-linux"
    targets.mkdir(parents=True)
    (tmp_path / "include").rename(targets / "include")
    (tmp_path / "include").mkdir()
    assert toolchain.find_cuda_toolkit() == found
    assert found.include == targets / "include"


def test_runtime_library_of_a_toolkit(tmp_path: Path) -> None:
    toolkit = CudaToolkit(tmp_path, "13.0")
    assert toolkit.runtime == Path("libcudart.so")
    for path in ("lib/libcudart.so.13", "lib64/libcudart.so.13", "lib/libcudart.so"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
        assert toolkit.runtime == tmp_path / path
