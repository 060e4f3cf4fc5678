"""Which places for the cache are tried, and in which order."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from helpers.native_sources import expect_reference, new_loader, write_tiny
from marginops._native import places


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "/h"}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        (
            {"HOME": "/h", "XDG_CACHE_HOME": "/x"},
            ["/x/marginops", "/h/.cache/marginops", "/tmp/marginops-ID"],
        ),
        ({"HOME": "/h", "XDG_CACHE_HOME": "x"}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": "/h", "XDG_CACHE_HOME": "~/x"}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        (
            {"HOME": "/h", "XDG_CACHE_HOME": "/h/.cache"},
            ["/h/.cache/marginops", "/tmp/marginops-ID"],
        ),
        ({"HOME": "/h", "TMPDIR": "/usr"}, ["/h/.cache/marginops", "/usr/marginops-ID"]),
        ({"HOME": "/h", "TMPDIR": "/no/such"}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": "/h", "TMPDIR": "."}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        ({}, ["/passwd/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": ""}, ["/passwd/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": "h"}, ["/passwd/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": "/h", "MARGINOPS_CACHE_DIR": "/m"}, ["/m"]),
        ({"HOME": "/h", "MARGINOPS_CACHE_DIR": ""}, ["/h/.cache/marginops", "/tmp/marginops-ID"]),
        ({"HOME": "/h", "MARGINOPS_CACHE_DIR": "~/m"}, ["/h/m"]),
        ({"HOME": "/h", "MARGINOPS_CACHE_DIR": "~"}, ["/h"]),
    ],
)
def test_candidates(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: list[str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "MARGINOPS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    entry = list(pwd.getpwuid(os.geteuid()))
    entry[5] = "/passwd"
    monkeypatch.setattr(pwd, "getpwuid", lambda _: pwd.struct_passwd(entry))
    found = [str(path) for path in places.candidates()]
    assert found == [path.replace("ID", str(os.geteuid())) for path in expected]


def test_user_without_a_home_has_the_private_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "MARGINOPS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert places.candidates() == [Path(f"/tmp/marginops-{os.geteuid()}")]


@pytest.mark.parametrize("path", ["cache", "./cache", "~nosuchuser/cache", " /cache"])
def test_relative_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARGINOPS_CACHE_DIR", path)
    expect_reference(
        new_loader(write_tiny(tmp_path)),
        f"MARGINOPS_CACHE_DIR: expected an absolute path, got '{path}'",
    )
    assert not list(tmp_path.rglob("*.so"))
