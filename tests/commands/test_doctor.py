"""The doctor prints its report whatever is broken; the toolchain is found where it is."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from helpers.native_sources import write_tiny
from marginops import __version__, cli, demo
from marginops._native import doctor, toolchain
from marginops._native.loader import Loader

SECTIONS = {
    "versions",
    "platform",
    "toolchain",
    "gpus",
    "environment",
    "kernels",
    "cache",
}


@pytest.fixture
def loader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MARGINOPS_DISABLE_JIT", raising=False)
    csrc = write_tiny(tmp_path / "csrc")
    return Loader(csrc, installed=csrc)


def test_report_builds_and_names_what_is_used(loader: Loader) -> None:
    before = doctor.report(loader, build=False)["kernels"]["cpu"]
    assert before["op families"] == {"tiny": "reference"}
    assert before["why not better"][-1] == "not built yet"

    report = doctor.report(loader)
    assert set(report) == SECTIONS
    assert report["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert report["versions"]["marginops"] == __version__
    kernels = report["kernels"]["cpu"]
    assert kernels["op families"] == {"tiny": "built now"}
    assert Path(kernels["library"]).is_file()
    assert report["cache"]["writable"]
    assert report["cache"]["bytes"] >= Path(kernels["library"]).stat().st_size
    assert "tiny: built now" in doctor.text(report)


def test_report_prints_when_everything_is_broken(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise OSError("this probe is broken")

    (tmp_path / "file").touch()
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", "/nonexistent")
    for owner, name in (
        (platform, "platform"),
        (torch.backends.cpu, "get_cpu_capability"),
        (torch.cuda, "is_available"),
        (doctor.importlib.metadata, "version"),
    ):
        monkeypatch.setattr(owner, name, broken)
    report = doctor.report(loader)
    assert set(report) == SECTIONS
    assert report["platform"]["system"] == "unknown (OSError: this probe is broken)"
    assert report["versions"]["numpy"] == "unknown (OSError: this probe is broken)"
    assert "CXX=/nonexistent cannot be run" in report["toolchain"]["compiler"]
    assert report["cache"]["writable"] is False
    assert report["kernels"]["cpu"]["op families"] == {"tiny": "reference"}
    assert json.loads(json.dumps(report)) == report
    assert "this probe is broken" in doctor.text(report)


def test_command_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cli.main(["doctor", "--json", "--no-build"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == SECTIONS
    assert report["environment"]["MAX_JOBS"] == "3"
    assert {"margin", "select"} <= set(report["kernels"]["cpu"]["op families"])
    assert cli.main(["doctor", "--no-build"]) == 0
    assert "op families:" in capsys.readouterr().out


def test_command_ends_quietly_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(("demo", "--quiet")) == 130
    assert capsys.readouterr().err == ""


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
