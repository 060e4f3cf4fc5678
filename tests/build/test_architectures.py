"""GPU architectures: the names that users write, flags of nvcc, and the GPUs that code runs on."""

from __future__ import annotations

from pathlib import Path

import pytest

from marginops._native import architectures
from marginops._native.toolchain import CudaToolkit, ToolchainError


@pytest.fixture(autouse=True)
def _no_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MARGINOPS_CUDA_ARCH_LIST", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)


def test_architectures_come_from_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINOPS_CUDA_ARCH_LIST", "9.0, 8.0;9.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert architectures.find_archs() == ["8.0", "9.0"]
    monkeypatch.setenv("MARGINOPS_CUDA_ARCH_LIST", " ;, ")
    assert architectures.find_archs() == ["7.5"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(architectures, "visible_capabilities", lambda: [(8, 0), (12, 0)])
    assert architectures.find_archs() == ["8.0", "12.0"]
    monkeypatch.setattr(architectures, "visible_capabilities", lambda: [])
    with pytest.raises(ToolchainError, match="set MARGINOPS_CUDA_ARCH_LIST"):
        architectures.find_archs()


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("8.0;", ["8.0"]),
        (";,8.0,, 9.0 ;", ["8.0", "9.0"]),
        ("8.0\n9.0", ["8.0", "9.0"]),
        ("10.0 9.0", ["9.0", "10.0"]),
        ("sm_90", ["9.0"]),
        ("compute_90", ["9.0+PTX"]),
        ("90", ["9.0"]),
        ("120-real", ["12.0"]),
        ("90-virtual", ["9.0+PTX"]),
        ("9.0a 9.0", ["9.0", "9.0a"]),
        ("sm_100a", ["10.0a"]),
        ("9.0+PTX", ["9.0+PTX"]),
        ("9.0+ptx", ["9.0+PTX"]),
        ("12.0f", ["12.0f"]),
        ("Ampere", ["8.0", "8.6+PTX"]),
        ("hopper Ampere+Tegra", ["8.7", "9.0+PTX"]),
        ("native 7.5", ["7.5", "8.6"]),
        ("Native", ["8.6"]),
        ("All", ["7.5", "8.0", "8.6", "9.0"]),
        ("all-major", ["7.5", "8.0", "9.0"]),
    ],
)
def test_names_of_architectures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, archs: list[str]
) -> None:
    toolkit = write_toolkit(tmp_path)
    monkeypatch.setattr(architectures.toolchain, "find_cuda_toolkit", lambda: toolkit)
    monkeypatch.setattr(architectures, "visible_capabilities", lambda: [(8, 6)])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    assert architectures.find_archs() == archs


@pytest.mark.parametrize("text", ["nonsense", "9", "9.0b", "9.0.0", "+PTX", "sm_", "8.0;x"])
def test_nonsense_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MARGINOPS_CUDA_ARCH_LIST", text)
    wrong = text.rpartition(";")[2]
    with pytest.raises(ToolchainError) as caught:
        architectures.find_archs()
    assert str(caught.value).startswith("MARGINOPS_CUDA_ARCH_LIST: expected GPU architectures such")
    assert str(caught.value).endswith(f"got {wrong}")


def test_native_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "visible_capabilities", lambda: [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    with pytest.raises(ToolchainError, match="TORCH_CUDA_ARCH_LIST: expected a visible GPU"):
        architectures.find_archs()


def write_toolkit(home: Path, answer: str = "sm_75 sm_80 sm_86 sm_90") -> CudaToolkit:
    """A toolkit whose nvcc answers which architectures it knows."""
    toolkit = CudaToolkit(home, "12.1")
    toolkit.nvcc.parent.mkdir(parents=True)
    toolkit.nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {answer}\n")
    toolkit.nvcc.chmod(0o755)
    return toolkit


def test_architectures_that_nvcc_does_not_know(tmp_path: Path) -> None:
    toolkit = write_toolkit(tmp_path / "old")
    architectures.check_archs(["8.0", "9.0a", "8.6+PTX"], toolkit)
    for arch in ("12.0", "5.0", "12.0f", "10.0a+PTX"):
        with pytest.raises(ToolchainError) as caught:
            architectures.check_archs(["8.0", arch], toolkit)
        text = str(caught.value)
        assert f"nvcc of CUDA 12.1 in {toolkit.home} does not know" in text
        assert f"architecture {arch}. It knows 7.5, 8.0, 8.6, 9.0." in text
        assert "MARGINOPS_CUDA_ARCH_LIST" in text
    silent = write_toolkit(tmp_path / "silent", "'nvcc fatal: unknown option'")
    architectures.check_archs(["12.0"], silent)


def test_flags_of_nvcc() -> None:
    assert architectures.nvcc_flags(["8.0", "9.0a+PTX", "12.0f"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90a,code=compute_90a",
        "-gencode=arch=compute_120f,code=sm_120f",
    ]


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["8.0"], (8, 0), True),
        (["8.0"], (8, 6), True),
        (["8.6"], (8, 0), False),
        (["8.0"], (9, 0), False),
        (["8.0+PTX"], (12, 0), True),
        (["9.0a"], (9, 0), True),
        (["10.0a"], (10, 3), False),
        (["10.0f"], (10, 3), True),
        (["7.5", "12.0"], (12, 0), True),
        (["Hopper"], (9, 0), True),
    ],
)
def test_architectures_that_run_on_a_gpu(
    archs: list[str], capability: tuple[int, int], runs: bool
) -> None:
    assert architectures.runs_on(archs, capability) is runs
