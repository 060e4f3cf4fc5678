"""Figures do not depend on the backend, the settings or the folders of the user."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")
pytest.importorskip("torchmetrics")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import matplotlib
from matplotlib.figure import Figure

from marginops.commands import figures


@pytest.mark.parametrize("command", ["demo --updates 2 --seeds 1", "observe --epochs 1"])
def test_a_notebook_and_damaged_settings_do_not_matter(command: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings"
    settings.write_bytes(b"\xff\xfe")
    if command.startswith("demo"):
        # Matplotlib reads this file before that of the variable.
        text = "backend: nonsense\nno colon\ntext.usetex: True\n"
        (tmp_path / "matplotlibrc").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "marginops", *command.split(), "--output", "figure.png"],
        cwd=tmp_path,
        env=os.environ
        | {
            "MARGINOPS_DISABLE_JIT": "1",
            "MPLBACKEND": "module://not_installed.backend",
            "MATPLOTLIBRC": str(settings),
            "MPLCONFIGDIR": "/proc/nowhere",
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "first\nsecond")

    monkeypatch.setenv("MPLBACKEND", "before")
    monkeypatch.delenv("MATPLOTLIBRC", raising=False)
    monkeypatch.setattr(figures, "import_module", broken)
    with pytest.raises(
        figures.FigureError, match=r"^matplotlib cannot be imported: Unicode.*first$"
    ):
        figures.load()
    assert os.environ["MPLBACKEND"] == "before" and "MATPLOTLIBRC" not in os.environ


def test_settings_of_the_process_are_ignored_and_kept() -> None:
    def draw() -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.text(0, 0, "text")
        return figure

    expected = figures.render(draw, "png", 50)
    with matplotlib.rc_context({"font.size": 40, "savefig.facecolor": "red", "savefig.dpi": 7}):
        assert figures.render(draw, "png", 50) == expected
        assert matplotlib.rcParams["font.size"] == 40
