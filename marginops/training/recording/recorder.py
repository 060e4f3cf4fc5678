"""Records a training run into a folder, from which ``marginops report`` draws its picture."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import _checks as checks
from ..._version import __version__
from ...ops.statistics import SampleStatistics, sample_statistics
from ..dynamics.merge import check_group, collective_device
from ..dynamics.training_dynamics import TrainingDynamics
from ..samplers.agreement import together
from . import folder as folders
from . import state as states
from .arguments import checked_names, checked_number
from .notes import SampleNotes
from .numbers import epoch_numbers, finite, report_numbers

if TYPE_CHECKING:
    from ..epoch_report import EpochReport


class RunRecorder:
    """Records a training run into a folder, from which ``marginops report`` draws its picture.

    :meth:`marginops.training.RunRecorder.update` does what
    :meth:`marginops.training.TrainingDynamics.update` does. It also notes the label and the
    predicted class of every sample. :meth:`marginops.training.RunRecorder.end_epoch` writes the
    epoch. The folder holds three files:

    ``run.json``
        What the run is.
    ``epochs.jsonl``
        One line for each epoch: the values of the user, accuracy, loss and 257 quantiles of the
        margins as last seen, the numbers of each class (up to 1000 classes), which samples the
        epoch visited, and the numbers of an epoch report.
    ``dynamics.pt``
        The dynamics with the labels and predictions of all samples, 64 bytes a sample. It is that
        of the last epoch. ``torch.load(..., weights_only=True)`` reads it.

    Every file is replaced as a whole, so the folder of a run that was killed holds all epochs that
    ended.

    Args:
        folder: A new folder, or one without a run.
        dynamics: The dynamics that the training updates by way of the recorder.
        name: What the run is, in a few words, for the head of the report.
        data: The name of the data set. A run can go on only with the same name.
        class_names: The names of the classes 0 to C - 1, for the report.
        resume: Go on with the run in the folder, if there is one. Pass its state to
            :meth:`marginops.training.RunRecorder.load_state_dict` before the first update.
        group: The processes that train together. The default is all processes, and one if
            ``torch.distributed`` is not initialised. The first of them writes.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value, or the run in the folder has
            other samples or data.
        FileExistsError: The folder holds a run, and ``resume`` is not set.
        OSError: The folder cannot be made or written.

    Attributes:
        dynamics: The dynamics.
        folder: The folder.

    The recorder takes 24 bytes a sample. An update is deterministic and does not wait for the GPU.
    If a batch holds a sample several times, the largest predicted class counts.

    Example:
        >>> import tempfile, torch
        >>> from marginops.training import RunRecorder, TrainingDynamics
        >>> recorder = RunRecorder(tempfile.mkdtemp(), TrainingDynamics(4), name="example")
        >>> logits = torch.tensor([[2.0, 0.5], [0.0, 3.0]], requires_grad=True)
        >>> statistics = recorder.update(torch.tensor([3, 1]), logits, torch.tensor([0, 0]))
        >>> statistics.mean_loss().backward()
        >>> recorder.end_epoch(1, test_accuracy=0.5)
        >>> recorder.labels, recorder.predictions
        (tensor([-1,  0, -1,  0], dtype=torch.int32), tensor([-1,  1, -1,  0], dtype=torch.int32))
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        dynamics: TrainingDynamics,
        *,
        name: str = "",
        data: str = "",
        class_names: Sequence[str] | None = None,
        resume: bool = False,
        group: Any = None,
    ) -> None:
        if not isinstance(dynamics, TrainingDynamics):
            raise TypeError(f"dynamics: expected TrainingDynamics, got {type(dynamics).__name__}")
        for argument, text in (("name", name), ("data", data)):
            if not isinstance(text, str):
                raise TypeError(f"{argument}: expected a str, got {type(text).__name__}")
        names = checked_names(class_names)
        if group is not None:
            check_group(group)
        self.folder, self.dynamics, self.group = Path(folder), dynamics, group
        self._data = data
        self._header: dict[str, Any] = {
            **{"num_samples": dynamics.num_samples, "name": name, "data": data},
            **{"class_names": names, "started": time.time(), "device": str(dynamics.device)},
            **{"marginops": __version__, "torch": str(torch.__version__)},
        }
        self._notes = SampleNotes(dynamics.num_samples, dynamics.device)
        self._count_before, self._margin_before = self._now()
        self._loaded_labels: Tensor | None = None
        self._epochs: list[str] = []
        self._needs_state = self._is_written = folders.claim(
            self.folder, resume, {"num_samples": dynamics.num_samples, "data": data}
        )

    @property
    def labels(self) -> Tensor:
        """``[N]`` int32 on the device of the dynamics, the labels; -1 if never seen."""
        return self._notes.labels

    @property
    def predictions(self) -> Tensor:
        """``[N]`` int32, the classes that were predicted last; -1 if never seen."""
        return self._notes.predictions

    def update(
        self,
        indices: Tensor,
        logits: Tensor,
        target: Tensor,
        *,
        input: Tensor | None = None,
        log_norm: Tensor | float | None = None,
        ignore_index: int = -100,
        score: Tensor | None = None,
    ) -> SampleStatistics:
        """Do what ``dynamics.update`` does, and note the labels and predictions of the batch.

        Args:
            indices: ``[B]`` int64, see :meth:`marginops.training.TrainingDynamics.update`; so are
                the other arguments.
            logits: ``[B, C]``.
            target: ``[B]`` int64, classes in [0, C) or ``ignore_index``.
            input: ``[B, D]``, the input of the last layer.
            log_norm: The logarithm of the norm product.
            ignore_index: A sample with this target does not count.
            score: ``[B]``, what the dynamics keep as ``score``.

        Returns:
            :class:`marginops.SampleStatistics`. Its ``mean_loss()`` is the loss for training.

        Raises:
            TypeError, ValueError, RuntimeError: As for the dynamics, or the recorder goes on with a
                run and has not loaded its state.
        """
        statistics = sample_statistics(
            logits, target, input=input, log_norm=log_norm, ignore_index=ignore_index
        )
        self.record(indices, statistics, target, score=score)
        return statistics

    def record(
        self,
        indices: Tensor,
        statistics: SampleStatistics,
        target: Tensor,
        *,
        score: Tensor | None = None,
    ) -> None:
        """Do what ``dynamics.record`` does, and note the labels and predictions of the batch.

        Args:
            indices: ``[B]`` int64, the index of each sample in the data set, on any device.
            statistics: Of B samples, see :meth:`marginops.training.TrainingDynamics.record`.
            target: ``[B]`` int64, the targets that the statistics were computed with.
            score: ``[B]``, what the dynamics keep as ``score``.

        Raises:
            TypeError, ValueError, RuntimeError: As for ``update``.
        """
        if self._needs_state:
            raise ValueError(
                f"folder: expected a recorder with the state of the run in {self.folder}, got a "
                "new recorder; call load_state_dict() before the first update, or delete the "
                "folder to begin anew"
            )
        checks.check_indices("target", target, "[B]")
        if isinstance(statistics, SampleStatistics):
            checks.check_device("target", target, statistics.correct, "statistics")
            if target.shape != statistics.correct.shape:
                raise ValueError(
                    f"target: expected shape {list(statistics.correct.shape)}, one class for each "
                    f"sample of the batch, got {list(target.shape)}"
                )
        self.dynamics.record(indices, statistics, score=score)
        self._notes.add(indices, statistics, target)

    def end_epoch(self, epoch: int, *, report: EpochReport | None = None, **values: float) -> None:
        """Write the epoch that ends. A collective call, which syncs the dynamics.

        Args:
            epoch: The number of the epoch, larger than that of the epoch before.
            report: The result of :func:`marginops.training.report_epoch`, if there is one.
            **values: Numbers of the user, such as ``loss=0.3`` or ``test_accuracy=0.9``: floats,
                ints or 0-d tensors. Those of the first process are written.

        Raises:
            TypeError, ValueError: An argument has the wrong type or value, or most samples have
                another label than in the run that was loaded. Nothing is written then.
            FileExistsError: Another run was written into the folder meanwhile.
            OSError: The folder cannot be written. Every process raises, and the call can be made
                again.
        """
        checks.check_int("epoch", epoch, 0)
        last = json.loads(self._epochs[-1])["epoch"] if self._epochs else None
        if last is not None and epoch <= last:
            raise ValueError(f"epoch: expected more than {last}, the last epoch, got {epoch}")
        if report is not None and not hasattr(report, "collapse"):
            raise TypeError(
                f"report: expected the result of report_epoch, got {type(report).__name__}"
            )
        own = {name: checked_number(name, value) for name, value in values.items()}
        self.sync()
        labels, predictions = self.labels.cpu(), self.predictions.cpu()
        self._check_labels(labels)
        seen = epoch_numbers(
            self.dynamics, labels, predictions, self._count_before, self._margin_before
        )
        line = json.dumps(
            {
                **{"epoch": int(epoch), "time": round(time.time(), 3), "values": own, **seen},
                "report": None if report is None else finite(report_numbers(report)),
            },
            allow_nan=False,
        )
        group = self._group()

        def write() -> None:
            if group is None or dist.get_rank(group) == 0:
                self._write([*self._epochs, line], labels, predictions)

        together(group, write, lambda _: {"epoch": epoch})
        self._epochs.append(line)
        self._is_written = True
        self._loaded_labels = None
        self._count_before, self._margin_before = self._now()

    def sync(self) -> None:
        """Give all processes what each of them saw since the last sync. A collective call."""
        group = self._group()
        if group is None or dist.get_world_size(group) == 1:
            return
        self.dynamics.sync(group)
        self._notes.sync(group, collective_device(self.dynamics, group))

    def state_dict(self) -> dict[str, Any]:
        """The state without the dynamics, which have their own, for ``torch.save``.

        Returns:
            Numbers, texts and tensors on the CPU: 24 bytes a sample, and a few kilobytes for each
            epoch. ``torch.load(..., weights_only=True)`` reads it. Of several processes, call
            :meth:`marginops.training.RunRecorder.sync` on all before.
        """
        return {
            "version": states.VERSION,
            "num_samples": self.dynamics.num_samples,
            "data": self._data,
            "step": self._notes.step,
            "notes": self._notes.values.to("cpu", copy=True),
            "count_before": self._count_before.clone(),
            "margin_before": self._margin_before.clone(),
            "epochs": list(self._epochs),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state. The next epoch that ends replaces all later epochs in the folder.

        Args:
            state_dict: The result of ``state_dict()``. Load the state of the dynamics, too.

        Raises:
            TypeError, ValueError: The state is one of other samples, of other data or of another
                version, or it is damaged. The recorder stays as it was.
        """
        self.check_state_dict(state_dict)
        self._notes.values.copy_(state_dict["notes"])
        self._notes.step = state_dict["step"]
        self._count_before = state_dict["count_before"].to("cpu", copy=True)
        self._margin_before = state_dict["margin_before"].to("cpu", copy=True)
        self._epochs = list(state_dict["epochs"])
        self._loaded_labels = self.labels.cpu()
        self._needs_state = False

    def check_state_dict(self, state_dict: Any) -> None:
        """Check that a state is whole and fits, without a change of anything."""
        states.check(state_dict, self.dynamics.num_samples, self._data)

    def _write(self, epochs: list[str], labels: Tensor, predictions: Tensor) -> None:
        if not self._is_written and folders.has_run(self.folder):
            raise FileExistsError(
                f"folder: expected a folder without a run, got {self.folder}, into which another "
                "training has written meanwhile; choose another folder"
            )
        samples = {"dynamics": self.dynamics.state_dict(), "labels": labels}
        samples["predictions"] = predictions
        folders.write(self.folder, self._header, samples, epochs)

    def _check_labels(self, labels: Tensor) -> None:
        """Refuse to go on with a run of other data."""
        if self._loaded_labels is None:
            return
        known = self._loaded_labels >= 0
        changed = int((labels != self._loaded_labels)[known].sum())
        if 2 * changed > int(known.sum()):
            raise ValueError(
                f"target: expected the labels of the run that was loaded, got another label for "
                f"{changed:,} of {int(known.sum()):,} samples; choose another folder for other data"
            )

    def _now(self) -> tuple[Tensor, Tensor]:
        return self.dynamics.count.cpu(), self.dynamics.margin.cpu()

    def _group(self) -> Any:
        if self.group is not None:
            return self.group
        return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.folder)!r}, num_samples="
            f"{self.dynamics.num_samples}, epochs={len(self._epochs)})"
        )
