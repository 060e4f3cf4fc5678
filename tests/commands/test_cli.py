"""The command line as a whole."""

import pytest

from marginops import __version__
from marginops.commands import cli
from marginops.commands.demo import run as demo


def test_command_ends_quietly_when_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert cli.main(("demo", "--quiet")) == 130
    assert capsys.readouterr().err == ""


def test_version_and_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"
    with pytest.raises(SystemExit) as exit_info:
        cli.main([])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert "COMMAND" in error and error.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = capsys.readouterr().out
    assert all(f"\n    {name} " in listed for name in ("doctor", "demo", "observe"))
