"""What a training run saw of every sample: TrainingDynamics."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from ... import _checks as checks
from ...ops.arguments import check_logits
from ...ops.dynamics import DynamicsState, empty_state, update_dynamics_op
from ...ops.statistics import SampleStatistics, sample_statistics
from . import file as files
from . import merge as merging
from . import state as states
from .data_map import DataMap, data_map, to_table
from .label_issues import LabelIssues, label_issues
from .values import DynamicsValues


class TrainingDynamics(DynamicsValues):
    r"""What a training run saw of every sample, collected in the training loop itself.

    :meth:`marginops.training.TrainingDynamics.update` takes the place of ``F.cross_entropy``. It
    computes the statistics of the batch with one reading of the logits, and one more op folds them
    into the state of the B samples. The state holds no logits and takes 56 bytes a sample, whatever
    the number of classes and epochs.

    For the visits :math:`t = 1, \dots, T` of a sample, let :math:`m_t` be its margin and
    :math:`p_t` its confidence, see :func:`marginops.sample_statistics`:

    ================== ==========================================================================
    ``margin``         :math:`m_T`, as last seen; the same for ``loss`` and ``score``
    ``margin_average`` :math:`a_1 = m_1, \; a_t = d \, a_{t-1} + (1 - d) \, m_t` with d = ``decay``
    ``aum``            :math:`\frac{1}{T} \sum_t m_t`, the area under the margin of Pleiss et al.
                       (2020), who take logits without a norm
    ``confidence``     :math:`\mu = \frac{1}{T} \sum_t p_t` (Swayamdipta et al., 2020)
    ``variability``    :math:`\sqrt{\frac{1}{T} \sum_t (p_t - \mu)^2}`, from the same paper
    ``correctness``    the share of visits at which the sample was correct, from the same paper
    ``el2n``           the mean EL2N (Paul, Ganguli, Dziugaite, 2021)
    ``forgetting``     how often the sample was correct at a visit and not at the next (Toneva et
                       al., 2019)
    ``learnt``         whether the sample was ever correct
    ``count``          T
    ``last_step``      the number of the update that saw the sample last, from 0 on; -1 if none did
    ================== ==========================================================================

    Each of these is an attribute with a new tensor ``[N]`` on ``device``: float32, int32 for
    ``forgetting`` and ``count``, int64 for ``last_step``, bool for ``learnt``. The float32 values
    of a sample that was never seen are NaN.

    If a batch holds a sample several times, its first row counts. Ignored rows do not count. A row
    whose margin, confidence or EL2N is not finite in float32 changes ``margin``, ``score``,
    ``loss`` and ``last_step`` only, and ``num_nonfinite`` counts it.

    Args:
        num_samples: N >= 1. The samples have the indices 0 to N - 1.
        decay: The weight of the past in ``margin_average``, in [0, 1).
        device: The device of the state. With a state on another device than the logits, each
            update copies the statistics of the batch there, and waits for a GPU.
        path: A new file for the state, 4096 bytes and 56 a sample, which is mapped into memory. It
            is for states that are larger than the memory. It is an error if the file exists;
            :meth:`marginops.training.TrainingDynamics.open` opens it again. The file has no
            ``weights``.

    Raises:
        TypeError, ValueError: An argument has the wrong type or value.
        OSError: The file exists, or cannot be made.

    Attributes:
        num_samples: N.
        decay: The weight of the past in ``margin_average``.
        device: The device of the state.
        num_updates: The number of updates so far. Reading it waits for the GPU.
        num_nonfinite: The number of visits with values that are not finite. Reading it waits for
            the GPU.
        weights: ``[N]`` float32 on the CPU, the weights by which a sampler drew the current epoch,
            or None. Samplers write it. It is a part of the state, because a run that resumes in the
            middle of an epoch has to draw the same epoch again.
        weights_version: The version of ``weights``, -1 without weights.

    Every update is deterministic and does not wait for the GPU. It can be part of a CUDA graph.

    Example:
        >>> import torch
        >>> from marginops.training import TrainingDynamics
        >>> dynamics = TrainingDynamics(num_samples=4)
        >>> logits = torch.tensor([[2.0, 0.5], [0.0, 3.0]], requires_grad=True)
        >>> statistics = dynamics.update(torch.tensor([3, 1]), logits, torch.tensor([0, 0]))
        >>> statistics.mean_loss().backward()
        >>> dynamics.margin
        tensor([    nan, -3.0000,     nan,  1.5000])
        >>> dynamics.count.tolist(), dynamics.learnt.tolist()
        ([0, 1, 0, 1], [False, False, False, True])
    """

    def __init__(
        self,
        num_samples: int,
        *,
        decay: float = 0.5,
        device: torch.device | str = "cpu",
        path: str | PathLike[str] | None = None,
    ) -> None:
        checks.check_int("num_samples", num_samples, 1)
        states.check_decay(decay)
        if path is None:
            state = empty_state(int(num_samples), device)
        else:
            if torch.device(device).type != "cpu":
                raise ValueError(f"device: expected cpu for a state in a file, got {device}")
            state = files.create(path, int(num_samples), float(decay))
        self._set(int(num_samples), float(decay), state)

    def _set(self, num_samples: int, decay: float, state: DynamicsState) -> None:
        self.num_samples = num_samples
        self.decay = decay
        self.weights = None
        self.weights_version = -1
        self._state = state
        self._common_nonfinite = int(state.totals[1])

    @classmethod
    def open(cls, path: str | PathLike[str]) -> TrainingDynamics:
        """Open the file of a state that was made with ``path``, and go on with it.

        Args:
            path: The file. Its state changes with every update, so it is no checkpoint.

        Raises:
            ValueError: The file is no state, or it is damaged.
            OSError: There is no file, it cannot be read and written, or other dynamics have it
                open.

        Example:
            >>> import tempfile
            >>> from marginops.training import TrainingDynamics
            >>> path = tempfile.mkdtemp() + "/dynamics"
            >>> dynamics = TrainingDynamics(num_samples=1000, path=path)
            >>> del dynamics  # closes the file
            >>> TrainingDynamics.open(path)
            TrainingDynamics(num_samples=1000, decay=0.5, device=cpu)
        """
        dynamics = cls.__new__(cls)
        dynamics._set(*files.open_existing(path))
        return dynamics

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
        """Compute the statistics of a batch and add them to the state.

        Args:
            indices: ``[B]`` int64, the index of each sample in the data set, on any device.
            logits: ``[B, C]``, see :func:`marginops.sample_statistics`; so are the next arguments.
            target: ``[B]`` int64, classes in [0, C) or ``ignore_index``.
            input: ``[B, D]``, the input of the last layer.
            log_norm: The logarithm of the norm product. With it all margins are normalised, ``aum``
                too.
            ignore_index: A sample with this target does not count.
            score: ``[B]``, what the state keeps as ``score``, for example a score of the selection.
                The default is ``top2_margin`` of the statistics.

        Returns:
            :class:`marginops.SampleStatistics`. Its ``mean_loss()`` is the loss for training.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
            RuntimeError: An index is outside [0, N) or a target outside [0, C), on the CPU; the
                state stays as it was. On CUDA this is a device-side assertion.
        """
        check_logits(logits)  # one row for each index
        statistics = sample_statistics(
            logits, target, input=input, log_norm=log_norm, ignore_index=ignore_index
        )
        self.record(indices, statistics, score=score)
        return statistics

    def record(
        self, indices: Tensor, statistics: SampleStatistics, *, score: Tensor | None = None
    ) -> None:
        """Add the statistics of a batch to the state, for a loop that computes them itself.

        Args:
            indices: ``[B]`` int64, the index of each sample in the data set, on any device.
            statistics: Of B samples, from :func:`marginops.sample_statistics` or
                :func:`marginops.linear_sample_statistics`. A gradient does not flow through here.
            score: As for :meth:`marginops.training.TrainingDynamics.update`.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
            RuntimeError: An index is outside [0, N), on the CPU; the state stays as it was. On CUDA
                this is a device-side assertion.

        Example:
            >>> import torch
            >>> import marginops
            >>> dynamics = marginops.training.TrainingDynamics(num_samples=2)
            >>> features, head = torch.eye(2), torch.nn.Linear(2, 3)
            >>> statistics = marginops.linear_sample_statistics(
            ...     features, head.weight, torch.tensor([0, 2]), bias=head.bias
            ... )
            >>> dynamics.record(torch.tensor([0, 1]), statistics)
            >>> dynamics.count
            tensor([1, 1], dtype=torch.int32)
        """
        fields = _fields(statistics, score)
        margin, device = fields[0], self._state.values.device
        if margin.dim() != 1:
            raise ValueError(
                f"statistics: expected fields of shape [B], one value for each index, got "
                f"{list(margin.shape)}; compute them from logits [B, C]"
            )
        checks.check_indices("indices", indices, "[B]")
        if indices.shape != margin.shape:
            raise ValueError(
                f"indices: expected shape {list(margin.shape)}, one index for each sample of the "
                f"batch, got {list(indices.shape)}"
            )
        if margin.device != device:
            fields = _moved(fields, device)
        if indices.device != device:
            indices = indices.to(device, non_blocking=device.type == "cuda")
        update_dynamics_op.call_without_gradient(*self._state, indices, *fields, self.decay)

    def state_dict(self) -> dict[str, Any]:
        """The state, for ``torch.save``; ``torch.load(..., weights_only=True)`` reads it.

        Returns:
            Numbers and tensors on the CPU, copies of 56 bytes a sample, and 4 more with weights.
        """
        return states.to_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state of as many samples with the same ``decay``.

        Args:
            state_dict: The result of ``state_dict()``, on any device.

        Raises:
            TypeError, ValueError: The state is one of other samples or of another version, or it is
                damaged. The dynamics stay as they were.
        """
        states.load_dict(self, state_dict)

    def label_issues(
        self,
        by: str = "aum",
        *,
        threshold_samples: Tensor | None = None,
        percentile: float = 99.0,
    ) -> LabelIssues:
        """All samples that were seen, the one with the most suspicious label first.

        A wrong label contradicts what the network learns from the other samples. So the margin of
        the sample is small for most of the training, even if the network learns it by heart later.

        Args:
            by: The score, of which small values are suspicious: ``"aum"`` (Pleiss et al., 2020),
                ``"confidence"`` (Swayamdipta et al., 2020), ``"margin_average"``, ``"margin"`` or
                ``"correctness"``.
            threshold_samples: ``[K]`` int64, samples that were trained with a label that is
                certainly wrong, see :func:`marginops.training.threshold_samples`. Their scores tell
                where wrong labels begin, and they are left out of the result.
            percentile: The percentile of their scores at which the threshold lies, in [0, 100]. The
                paper takes 99.

        Returns:
            :class:`marginops.training.LabelIssues` on the device of the state. Without threshold
            samples the result is an order: how many labels are wrong is for the user to say.

        Raises:
            TypeError, ValueError: An argument has the wrong type or value.

        Example:
            >>> import torch
            >>> from marginops.training import TrainingDynamics
            >>> dynamics = TrainingDynamics(num_samples=3)
            >>> logits = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 4.0]])
            >>> _ = dynamics.update(torch.arange(3), logits, torch.tensor([0, 1, 1]))
            >>> dynamics.label_issues().indices
            tensor([1, 0, 2])
        """
        return label_issues(self, by, threshold_samples, percentile)

    def data_map(self) -> DataMap:
        """Confidence and variability of the samples, as numbers and as a figure.

        Returns:
            :class:`marginops.training.DataMap` of the samples with ``count`` > 0. Its method
            ``plot()`` draws the figure.
        """
        return data_map(self)

    def to_table(self) -> Any:
        """All values as a table with one row per sample.

        Returns:
            ``pyarrow.Table`` with the column ``index`` and one for each attribute above. From there
            ``to_pandas()`` makes a data frame, and ``pyarrow.parquet.write_table`` a file.

        Raises:
            ImportError: pyarrow is not installed.
        """
        return to_table(self)

    def merge(self, other: TrainingDynamics) -> None:
        """Add the visits of other dynamics of the same samples, such as those of another run.

        Counts and means are those of all visits; the variance is merged as Chan, Golub, LeVeque
        (1983) do. Where both saw a sample, the one with the larger ``last_step`` has its last
        visits, and these dynamics if the steps are equal: ``margin``, ``loss``, ``score`` and
        ``margin_average`` are those of the last visits. ``forgetting`` may differ by 1 from that of
        one run, because the state does not hold the first visit. ``num_updates`` is the larger of
        both numbers, and ``weights`` stay.

        Args:
            other: Dynamics with the same ``num_samples`` and ``decay``, on any device.

        Raises:
            TypeError, ValueError: ``other`` has other arguments, or is no other dynamics.
        """
        if not isinstance(other, TrainingDynamics):
            raise TypeError(f"other: expected TrainingDynamics, got {type(other).__name__}")
        merging.merge(self, other)

    def sync(self, group: Any = None) -> None:
        """Give all processes of a group what each of them saw since the last sync.

        Call it on every rank at the end of an epoch. If each sample was seen on one rank since the
        last sync, the state then is, bit for bit, the one of a single process that saw the batches
        of all ranks as one. Otherwise the record of the rank that saw the sample last wins, and of
        the lowest rank if several saw it in the same step. The other visits since the last sync do
        not count then.

        Args:
            group: A ``torch.distributed`` group; None for the default group. Without an
                initialised default group there is one process, and nothing to do.

        Raises:
            TypeError, ValueError: The arguments or the past of the ranks differ. Every rank raises.

        A call exchanges one small message and two tensors for each 2**20 samples, 56 bytes a
        sample. To resume, save the state of one rank after a sync and load it on all ranks.
        """
        merging.sync(self, group)

    def __getstate__(self) -> dict[str, Any]:
        return {"device": str(self.device), "state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state["state"]
        TrainingDynamics.__init__(
            self, own["num_samples"], decay=own["decay"], device=state["device"]
        )
        self.load_state_dict(own)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_samples={self.num_samples}, decay={self.decay}, "
            f"device={self.device})"
        )


def _fields(statistics: Any, score: Any) -> tuple[Tensor, ...]:
    """The fields of statistics that the state is made of, and the score in their dtype."""
    if not isinstance(statistics, SampleStatistics):
        raise TypeError(
            f"statistics: expected marginops.SampleStatistics, got {type(statistics).__name__}; "
            "pass the result of marginops.sample_statistics"
        )
    margin = statistics.margin
    if score is None:
        score = statistics.top2_margin
    else:
        checks.check_tensor("score", score, 1, "[B]")
        if score.shape != margin.shape:
            raise ValueError(
                f"score: expected shape {list(margin.shape)}, one score for each sample of the "
                f"batch, got {list(score.shape)}"
            )
        checks.check_device("score", score, margin, "logits")
        score = score.to(margin.dtype)
    return (
        *(margin, score, statistics.loss, statistics.confidence, statistics.el2n),
        *(statistics.correct, statistics.counted),
    )


def _moved(fields: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The fields on another device. One copy is faster than seven."""
    *numbers, correct, counted = torch.stack(fields).to(device)
    return *numbers, correct.bool(), counted.bool()
