"""The doctor prints its report whatever is broken."""

from __future__ import annotations

import io
import json
import os
import platform
import pwd
import sys
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
    assert report["cache"]["usable"] is True
    assert report["cache"]["writable"] is True
    assert report["cache"]["loadable"] is True
    assert report["cache"]["owner"] == pwd.getpwuid(os.geteuid()).pw_name
    assert report["cache"]["obstacles"] == report["cache"]["other places"] == []
    assert list(report["cache"]["libraries"].values()) == ["usable"]
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
    assert "got /nonexistent (/nonexistent does not exist)" in report["toolchain"]["compiler"]
    assert report["cache"]["usable"] is False
    assert report["cache"]["writable"] is False
    assert "file/cache cannot be used: [Errno 20]" in report["cache"]["obstacles"][0]
    assert report["kernels"]["cpu"]["op families"] == {"tiny": "reference"}
    assert json.loads(json.dumps(report)) == report
    assert "this probe is broken" in doctor.text(report)


def test_report_leaves_nothing_in_the_cache(loader: Loader, tmp_path: Path) -> None:
    report = doctor.report(loader, build=False)["cache"]
    assert (report["usable"], report["writable"], report["loadable"]) == (True, True, True)
    assert (report["owner"], report["mode"], report["libraries"]) == (None, None, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csrc"]


def test_report_tells_damaged_and_refused_libraries(loader: Loader) -> None:
    library = Path(doctor.report(loader)["kernels"]["cpu"]["library"])
    facts = library.with_suffix(".json")
    described = facts.read_text()
    facts.write_text("[]")
    (state,) = doctor.report(loader, build=False)["cache"]["libraries"].values()
    assert state.startswith("damaged; ")
    facts.write_text(described)
    library.parent.chmod(0o777)
    (state,) = doctor.report(loader, build=False)["cache"]["libraries"].values()
    assert f"{library.parent}: expected that only its owner may write to it" in state
    library.parents[2].chmod(0o777)
    report = doctor.report(loader, build=False)["cache"]
    assert (report["usable"], report["writable"], report["mode"]) == (False, True, "0777")
    assert "expected that only its owner may write" in report["obstacles"][0]


def test_report_on_a_relative_cache_folder(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", "cache")
    report = doctor.report(loader)["cache"]
    assert (report["folder"], report["usable"]) == (None, False)
    assert "MARGINOPS_CACHE_DIR: expected an absolute path" in report["obstacles"][0]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_report_prints_any_path(
    loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", f"{tmp_path}/caché-\udcff")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        report = doctor.text(doctor.report(loader, build=False))
    assert "cach" in report
    report.encode(encoding)


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
