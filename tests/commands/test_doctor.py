"""The doctor prints its report whatever is broken."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from helpers.native_sources import write_tiny
from marginops import __version__
from marginops._native.loader import Loader
from marginops.commands import cli, doctor

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
