"""When the classes of a network stop contracting, and which samples are misclassified then."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks


class InversionMonitor:
    r"""Finds the inversion point of training and its stragglers.

    While a network learns, the classes of its hidden layer first contract and then expand again.
    The inversion point of a class is the first epoch :math:`t \ge` ``first_epoch`` at which its
    radius no longer falls, :math:`R_c(t) \ge R_c(t - 1)`; stragglers are the training samples that
    are misclassified then (Ciceri et al., 2024). Epochs are counted from 1: the t-th call of
    :meth:`update` is epoch t.

    Args:
        num_classes: C >= 1.
        first_epoch: No inversion is looked for before this epoch, >= 2.
        per_class: Whether each class has an inversion of its own, with the misclassified samples
            of that class as its stragglers. Otherwise class 0 decides for all samples, the rule
            for two classes.

    Raises:
        TypeError, ValueError: A number has the wrong type or is too small.

    Example:
        >>> import torch
        >>> from marginops.training import InversionMonitor
        >>> monitor = InversionMonitor(num_classes=2, first_epoch=2)
        >>> target = torch.tensor([0, 0, 1, 1])
        >>> monitor.update(torch.tensor([0.9, 0.8]), torch.tensor([1, 1, 0, 0]).bool(), target)
        >>> monitor.update(torch.tensor([0.7, 0.8]), torch.tensor([1, 0, 1, 0]).bool(), target)
        >>> monitor.epoch, monitor.inverted, monitor.stragglers
        ([None, 2], False, tensor([False, False,  True, False]))
    """

    def __init__(self, num_classes: int, *, first_epoch: int = 20, per_class: bool = True) -> None:
        checks.check_int("num_classes", num_classes, 1)
        checks.check_int("first_epoch", first_epoch, 2)
        self.num_classes = num_classes
        self.first_epoch = first_epoch
        self.per_class = per_class
        self._history: list[list[float]] = []
        self._epochs: list[int | None] = [None] * (num_classes if per_class else 1)
        self._stragglers: Tensor | None = None
        self._population: int | None = None

    def update(self, radius: Tensor, misclassified: Tensor, target: Tensor | None = None) -> None:
        """Say how an epoch ended; call it once per epoch.

        Args:
            radius: ``[C]``, the radius of every class over the training data: ``radius`` of
                :func:`marginops.class_moments` with ``normalize=True`` or of
                :class:`marginops.metrics.ClassManifolds`. A class whose radius is NaN, now or in
                the epoch before, does not invert.
            misclassified: ``[P]`` bool, the training samples that are misclassified, in the same
                order in every epoch.
            target: ``[P]`` int64, needed if ``per_class``: the stragglers of class c are among
                the samples with this target.

        Raises:
            TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        """
        self._check_epoch(radius, misclassified, target)
        self._population = len(misclassified)
        now: list[float] = radius.detach().double().cpu().tolist()
        before = self._history[-1] if self._history else [math.nan] * self.num_classes
        self._history.append(now)
        if len(self._history) < self.first_epoch:
            return
        for index, epoch in enumerate(self._epochs):
            if epoch is None and now[index] >= before[index]:
                self._epochs[index] = len(self._history)
                self._add(misclassified if target is None else misclassified & (target == index))

    def _add(self, stragglers: Tensor) -> None:
        if self._stragglers is None:
            self._stragglers = stragglers.clone()
        else:
            self._stragglers = self._stragglers.to(stragglers.device) | stragglers

    @property
    def epoch(self) -> int | list[int | None] | None:
        """The epoch of the inversion, None before; with ``per_class`` one for each class."""
        return list(self._epochs) if self.per_class else self._epochs[0]

    @property
    def inverted(self) -> bool:
        """Whether the inversion has been; with ``per_class`` that of every class."""
        return None not in self._epochs

    @property
    def stragglers(self) -> Tensor | None:
        """``[P]`` bool, a copy; None before the inversion.

        With ``per_class`` those of the classes that have inverted so far, None before the first.
        """
        return None if self._stragglers is None else self._stragglers.clone()

    @property
    def history(self) -> Tensor:
        """``[T, C]`` float64 on the CPU, the radii of every epoch."""
        return torch.tensor(self._history, dtype=torch.float64).reshape(-1, self.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on from here; saves by ``torch.save``."""
        return {
            "arguments": self._arguments(),
            "history": self.history,
            "epochs": list(self._epochs),
            "stragglers": self.stragglers,
            "population": self._population,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where another monitor of the same arguments was.

        Raises:
            ValueError: It had other arguments.
        """
        if state_dict["arguments"] != self._arguments():
            raise ValueError(
                f"state_dict: expected that of a monitor with {self._arguments()}, "
                f"got {state_dict['arguments']}"
            )
        self._history = state_dict["history"].tolist()
        self._epochs = list(state_dict["epochs"])
        self._population = state_dict["population"]
        stragglers = state_dict["stragglers"]
        self._stragglers = None if stragglers is None else stragglers.clone()

    def _arguments(self) -> dict[str, int]:
        return {
            "num_classes": self.num_classes,
            "first_epoch": self.first_epoch,
            "per_class": self.per_class,
        }

    def _check_epoch(self, radius: Any, misclassified: Any, target: Any) -> None:
        checks.check_tensor("radius", radius, 1, "[C]")
        if len(radius) != self.num_classes:
            raise ValueError(
                f"radius: expected shape [{self.num_classes}], got {list(radius.shape)}"
            )
        if not isinstance(misclassified, Tensor):
            kind = type(misclassified).__name__
            raise TypeError(f"misclassified: expected a tensor [P], got {kind}")
        if misclassified.dtype != torch.bool:
            raise TypeError(f"misclassified: expected dtype torch.bool, got {misclassified.dtype}")
        known = self._population
        if misclassified.dim() != 1 or known not in (None, len(misclassified)):
            expected = "[P]" if known is None else f"[{known}] as before"
            raise ValueError(
                f"misclassified: expected shape {expected}, got {list(misclassified.shape)}"
            )
        if not self.per_class:
            if target is not None:
                raise ValueError("target: expected None with per_class=False, got a tensor")
        elif target is None:
            raise ValueError("target: expected a tensor [P] with per_class=True, got None")
        else:
            checks.check_target(target, misclassified, -100, "misclassified")


def straggler_stability(
    sets_a: Sequence[Tensor | Sequence[int]],
    sets_b: Sequence[Tensor | Sequence[int]],
    population: int,
) -> float:
    r"""How much more two runs misclassify the same samples than chance would have it.

    .. math::
        z = \frac{\mathrm{mean}_k |A_k \cap B_k| - \mathrm{mean}_k |A_k| |B_k| / P}
                 {\mathrm{std}_k |A_k \cap B_k|}

    with the standard deviation of the pairs as a population (divided by K). Ciceri et al. (2024)
    follow it over the epochs, with :math:`A_k` and :math:`B_k` misclassified at the same epoch of
    two runs.

    Args:
        sets_a: K >= 2 sets, each a bool mask ``[P]`` or distinct indices in [0, P).
        sets_b: K sets, run by run with ``sets_a``.
        population: P >= 1, how many samples there are.

    Returns:
        z; where all K intersections are of one size, inf with the sign of the difference, or NaN
        if there is none.

    Raises:
        TypeError, ValueError: An argument has the wrong type, length or range.

    Example:
        >>> from marginops.training import straggler_stability
        >>> first, second = [[0, 1, 2], [0, 1, 2]], [[0, 1, 2], [1, 2, 3]]
        >>> straggler_stability(first, second, population=100)
        4.82
    """
    checks.check_int("population", population, 1)
    if len(sets_a) != len(sets_b):
        raise ValueError(f"sets_b: expected {len(sets_a)} sets as in sets_a, got {len(sets_b)}")
    if len(sets_a) < 2:
        raise ValueError(f"sets_a: expected at least 2 sets, got {len(sets_a)}")
    first = _as_masks("sets_a", sets_a, population)
    second = _as_masks("sets_b", sets_b, population)
    common = (first & second).sum(1).double()
    chance = first.sum(1).double() * second.sum(1) / population
    excess = (common - chance).mean()
    return (excess / common.std(correction=0)).item()


def _as_masks(name: str, sets: Sequence[Any], population: int) -> Tensor:
    """[K, P] bool, on the CPU."""
    masks = torch.zeros(len(sets), population, dtype=torch.bool)
    for index, members in enumerate(sets):
        where = f"{name}[{index}]"
        values = torch.as_tensor(members).detach().cpu()
        if values.dim() != 1:
            raise ValueError(f"{where}: expected one dimension, got shape {list(values.shape)}")
        if values.dtype == torch.bool:
            if len(values) != population:
                raise ValueError(f"{where}: expected a mask [{population}], got [{len(values)}]")
            masks[index] = values
        elif len(values) > 0:
            if values.is_floating_point() or values.is_complex():
                raise TypeError(f"{where}: expected bool or integers, got {values.dtype}")
            if values.min() < 0 or values.max() >= population:
                raise ValueError(
                    f"{where}: expected indices in [0, {population}), "
                    f"got {values.min()} to {values.max()}"
                )
            masks[index, values.long()] = True
            if masks[index].sum() != len(values):
                raise ValueError(f"{where}: expected distinct indices, got some more than once")
    return masks
