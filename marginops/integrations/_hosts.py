"""What the adapters share: the trainers that are installed, and their versions."""

from __future__ import annotations

from importlib import metadata


def check_host(package: str, first: str, below: str, install: str) -> None:
    """Check that a trainer is installed, and in a version that the adapter knows.

    Args:
        package: The name of the distribution.
        first: The oldest version, as numbers with dots.
        below: The first version that is too new.
        install: What a user installs.

    Raises:
        ImportError: It is missing, too old or too new.
    """
    needed = f"{package}: expected a version >= {first} and < {below}"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ImportError(f"{needed}, got none; pip install '{install}'") from None
    if not _numbers(first) <= _numbers(version) < _numbers(below):
        raise ImportError(f"{needed}, got {version}; pip install '{install}'")


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.6.0rc1 gives (2, 6, 0)."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
