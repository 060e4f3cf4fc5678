"""The CUDA toolchain is found, and its architectures fit the visible GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marginops._native import toolchain


def test_architectures_come_from_the_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINOPS_CUDA_ARCH_LIST", "9.0, 8.0;9.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert toolchain.find_archs() == ["8.0", "9.0"]
    monkeypatch.delenv("MARGINOPS_CUDA_ARCH_LIST")
    assert toolchain.find_archs() == ["7.5"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: [(8, 0), (12, 0)])
    assert toolchain.find_archs() == ["8.0", "12.0"]
    monkeypatch.setattr(toolchain, "visible_capabilities", lambda: [])
    with pytest.raises(toolchain.ToolchainError, match="set MARGINOPS_CUDA_ARCH_LIST"):
        toolchain.find_archs()


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
    assert toolchain.runs_on(archs, capability) is runs


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
    assert toolchain.find_cuda_toolkit() == toolchain.CudaToolkit(tmp_path, "99.0")
