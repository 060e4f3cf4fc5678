"""The CUDA toolchain is found, and its architectures fit the visible GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marginops._native import toolchain


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
