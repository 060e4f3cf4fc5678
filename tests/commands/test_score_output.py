"""Folders that the score command refuses, and files that it cannot write."""

import os
import re
import shutil
import subprocess

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("fsspec")
pytest.importorskip("safetensors")

import torch

from helpers.score_files import WIDTH
from marginops.commands import figures


def test_the_folder_of_another_run(files, refused, capsys):
    assert files.run("--select", 5) == 0
    capsys.readouterr()
    before = (files.folder / "out/selection.parquet").read_bytes()
    refused(
        files.run("--select", 6), r"--output: expected .* another run .*k: 5 there and 6 here.*"
    )
    torch.save({"weight": torch.ones(4, WIDTH)}, files.folder / "head.pt")
    refused(files.run("--select", 5), "--output: expected .* another run .*head sha256.*")
    assert (files.folder / "out/selection.parquet").read_bytes() == before


def test_a_folder_with_other_files(files, refused):
    (files.folder / "out").mkdir()
    (files.folder / "out/notes.txt").write_text("mine")
    message = (
        "--output: expected a new or empty folder, got .*/out with 1 files?, such as notes.txt; "
        "choose another folder"
    )
    refused(files.run(), message)
    assert os.listdir(files.folder / "out") == ["notes.txt"]


@pytest.fixture
def disk(tmp_path):
    """A disk of 300 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(files, refused, disk, capsys):
    (disk / "other").write_bytes(bytes(236 << 10))
    message = (
        "--output: expected a folder that can be read and written, got a full disk for "
        ".*/disk/out/.*; finished tasks stay, so free space and run the same command again"
    )
    refused(files.run(output="disk/out"), message, expected=1)
    finished = len(list((disk / "out/done").glob("0*")))
    assert 0 < finished < 8
    (disk / "other").unlink()
    subprocess.run(["mount", "-o", "remount,size=3m", str(disk)], check=True)
    assert files.run(output="disk/out") == 0
    error = capsys.readouterr().err
    resumed = re.fullmatch(r"resumed: (\d+) of 700 rows are scored already\n", error)
    assert resumed and int(resumed[1]) > 0
    assert files.run() == 0
    for name in ("summary.json", "margins.parquet", "scores/part-000007.parquet"):
        assert (disk / "out" / name).read_bytes() == (files.folder / "out" / name).read_bytes()


def test_an_output_that_is_a_file(files, refused):
    (files.folder / "out").write_text("mine")
    message = "--output: expected a folder, got the file .*/out; choose another name"
    refused(files.run(), message)
    assert (files.folder / "out").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(files, refused):
    files.folder.joinpath("locked").mkdir(mode=0o500)
    message = "--output: expected a folder that can be read and written, got no permission for .*"
    refused(files.run(output="locked/out"), message, expected=1)


def test_a_figure_that_cannot_be_drawn_costs_nothing_else(files, capsys, monkeypatch):
    def render(*arguments):
        raise RuntimeError("no font")

    monkeypatch.setattr(figures, "render", render)
    assert files.run("--json", files.folder / "report.json") == 1
    printed = capsys.readouterr()
    output = files.folder / "out"
    assert printed.err == (
        f"marginops score: {output}/figure.png cannot be written: RuntimeError: no font\n"
    )
    assert f"wrote {files.folder}/report.json" in printed.out.splitlines()
    assert "figure.png" not in printed.out and (files.folder / "report.json").exists()
