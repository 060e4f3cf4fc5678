"""The folder of a recorded run: how it is written, read and checked."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..dynamics.training_dynamics import TrainingDynamics
from .numbers import problem_of

_FORMAT = "marginops run"
_VERSION = 1
_RUN, _SAMPLES, _EPOCHS = "run.json", "dynamics.pt", "epochs.jsonl"


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """What a folder holds.

    Attributes:
        header: What the run is: ``num_samples``, ``name``, ``data``, ``class_names``, ``started``,
            and the versions of ``marginops`` and ``torch``.
        epochs: The numbers of every epoch, in their order.
        dynamics: The dynamics after the last epoch.
        labels: ``[N]`` int32, the label of every sample; -1 if it was never seen.
        predictions: ``[N]`` int32, the class predicted last; -1 if the sample was never seen.
    """

    header: dict[str, Any]
    epochs: list[dict[str, Any]]
    dynamics: TrainingDynamics
    labels: Tensor
    predictions: Tensor


def has_run(folder: Path) -> bool:
    """Whether a folder holds a recorded run."""
    return (folder / _RUN).exists()


def claim(folder: Path, resume: bool, facts: Mapping[str, Any]) -> bool:
    """Make the folder of a run, or check the run in it. Returns whether there is one.

    Raises:
        FileExistsError: There is a run, and ``resume`` is not set.
        ValueError: The run has other facts, or it is damaged.
        OSError: The folder cannot be made or written.
    """
    if not has_run(folder):
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"folder: expected a folder, got the file {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                f"folder: expected a folder that you may write, got {folder}; change its "
                "permissions"
            )
        return False
    if not resume:
        raise FileExistsError(
            f"folder: expected a folder without a run, got {folder}, which holds one; "
            "pass resume=True to go on with it, or choose another folder"
        )
    header = read_header(folder)
    for name, value in facts.items():
        if header.get(name) != value:
            raise ValueError(
                f"folder: expected a run with {name} {value!r}, got {header.get(name)!r} in "
                f"{folder}; choose another folder"
            )
    return True


def write(
    folder: Path, header: Mapping[str, Any], samples: Mapping[str, Any], epochs: Sequence[str]
) -> None:
    """Write a run. Each file is replaced as a whole.

    The file that says what the run is comes last. So a folder has a whole run or none.
    """
    _replace(folder / _SAMPLES, lambda file: torch.save({"version": _VERSION, **samples}, file))
    lines = "".join(f"{line}\n" for line in epochs).encode("ascii")
    _replace(folder / _EPOCHS, lambda file: file.write(lines))
    if not has_run(folder):
        described = {"format": _FORMAT, "version": _VERSION, **header}
        text = (json.dumps(described, indent=2) + "\n").encode("ascii")
        _replace(folder / _RUN, lambda file: file.write(text))


def read_header(folder: Path) -> dict[str, Any]:
    """Read what the run in a folder is.

    Raises:
        ValueError: There is no run, a damaged one, or one of another version.
    """
    header = _mapping(_text(folder, _RUN), folder, _RUN)
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"folder: expected a recorded run, got {folder} with another {_RUN}; choose the folder "
            "of a RunRecorder"
        )
    if header.get("version") != _VERSION:
        raise ValueError(
            f"folder: expected a run of version {_VERSION}, got version {header.get('version')!r} "
            f"in {folder}; use the release of marginops that wrote it"
        )
    count, names = header.get("num_samples"), header.get("class_names")
    is_right = type(count) is int and count > 0 and (names is None or isinstance(names, list))
    if not is_right or not isinstance(header.get("started"), int | float):
        raise _damaged(folder, _RUN, "it has no right num_samples, class_names or started")
    return header


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """Read the numbers of the epochs.

    Raises:
        ValueError: They are missing or damaged.
    """
    lines = _text(folder, _EPOCHS).splitlines()
    epochs = [_mapping(line, folder, _EPOCHS) for line in lines]
    if not epochs:
        raise _damaged(folder, _EPOCHS, "expected one or more lines, got none")
    for place, epoch in enumerate(epochs, 1):
        problem = problem_of(epoch)
        if problem is not None:
            raise _damaged(folder, _EPOCHS, f"line {place}: {problem}")
    return epochs


def read(folder: Path) -> RecordedRun:
    """Read a recorded run.

    Raises:
        ValueError: There is no run, a damaged one, or one of another version.
    """
    header, epochs = read_header(folder), read_epochs(folder)
    count = header["num_samples"]
    path = folder / _SAMPLES
    try:
        samples = torch.load(path, map_location="cpu", weights_only=True)
        state, labels, predictions = (
            samples[name] for name in ("dynamics", "labels", "predictions")
        )
        dynamics = TrainingDynamics(count, decay=state["decay"])
        dynamics.load_state_dict(state)
    except (
        OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError
    ) as error:  # fmt: skip
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise _damaged(folder, _SAMPLES, reason or type(error).__name__) from error
    for name, value in (("labels", labels), ("predictions", predictions)):
        if not isinstance(value, Tensor) or value.dtype != torch.int32 or value.shape != (count,):
            raise _damaged(folder, _SAMPLES, f"expected {name} as a tensor [{count}] of int32")
    return RecordedRun(header, epochs, dynamics, labels, predictions)


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if folder.is_dir() and has_run(folder):
            raise _damaged(folder, name, "it is missing") from error
        missing = f"got {folder}, which has no {name}"
        if not folder.is_dir():
            missing = f"got {folder}, which {'is no folder' if folder.exists() else 'is not there'}"
        raise ValueError(
            f"folder: expected the folder of a recorded run, {missing}; "
            "record one with marginops.training.RunRecorder"
        ) from error
    except NotADirectoryError as error:
        raise ValueError(
            f"folder: expected the folder of a recorded run, got the file {folder}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise _damaged(folder, name, reason) from error


def _mapping(text: str, folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, name, "it is no JSON") from error
    if not isinstance(value, dict):
        raise _damaged(folder, name, f"expected a mapping, got {type(value).__name__}")
    return value


def _damaged(folder: Path, name: str, reason: str) -> ValueError:
    return ValueError(
        f"folder: expected a whole recorded run, got {folder} with a damaged {name} ({reason}); "
        "record the run again"
    )


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file. Whoever reads it, also after a crash, finds the old content or the new one."""
    new = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with open(new, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
