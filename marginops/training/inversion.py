"""The inversion point, at which classes stop contracting, and the stragglers at this point."""

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
    radius does not fall: :math:`R_c(t) \ge R_c(t - 1)`. Stragglers are the training samples that
    are misclassified at this point (Ciceri et al., 2024). Call t of
    :meth:`marginops.training.InversionMonitor.update` is epoch t, and the first epoch is 1.

    Args:
        num_classes: C >= 1.
        first_epoch: The first epoch that can be an inversion point, >= 2.
        per_class: Whether each class has its own inversion point, and the misclassified samples of
            the class are its stragglers. If False, class 0 determines one inversion point for all
            samples. This is the rule for two classes.

    Raises:
        TypeError, ValueError: A number has the wrong type or is too small.

    The monitor is deterministic. It keeps the radii of all epochs and a mask of the stragglers.

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
        """Add an epoch. Call this method once per epoch.

        Args:
            radius: ``[C]``, the radius of every class over the training data: ``radius`` of
                :func:`marginops.class_moments` with ``normalize=True`` or of
                :class:`marginops.metrics.ClassManifolds`. If the radius of a class is NaN, in this
                epoch or in the one before, the class does not invert.
            misclassified: ``[P]`` bool, which training samples are misclassified, in the same order
                in every epoch.
            target: ``[P]`` int64, the classes of the training samples. They are required with
                ``per_class``, and have to be None without it.

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
        """The epoch of the inversion, or None before it. With ``per_class`` a list over classes."""
        return list(self._epochs) if self.per_class else self._epochs[0]

    @property
    def inverted(self) -> bool:
        """Whether there has been an inversion. With ``per_class``, whether every class has one."""
        return None not in self._epochs

    @property
    def stragglers(self) -> Tensor | None:
        """The stragglers, a copy, ``[P]`` bool. None before the first inversion.

        With ``per_class`` these are the stragglers of all classes with an inversion so far.
        """
        return None if self._stragglers is None else self._stragglers.clone()

    @property
    def history(self) -> Tensor:
        """The radii of all T epochs, ``[T, C]`` float64 on the CPU."""
        return torch.tensor(self._history, dtype=torch.float64).reshape(-1, self.num_classes)

    def state_dict(self) -> dict[str, Any]:
        """The state of the monitor, for ``torch.save``.

        Returns:
            A mapping for :meth:`marginops.training.InversionMonitor.load_state_dict`.
        """
        return {
            "arguments": self._arguments(),
            "history": self.history,
            "epochs": list(self._epochs),
            "stragglers": self.stragglers,
            "population": self._population,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state of another monitor with the same arguments.

        Args:
            state_dict: The result of :meth:`marginops.training.InversionMonitor.state_dict`.

        Raises:
            ValueError: The other monitor had other arguments.
        """
        if state_dict["arguments"] != self._arguments():
            raise ValueError(
                f"state_dict: expected the state of a monitor with {self._arguments()}, "
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
        checks.check_not_distributed("misclassified", misclassified)
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
    r"""How much more often than by chance two training runs misclassify the same samples.

    .. math::
        z = \frac{\mathrm{mean}_k |A_k \cap B_k| - \mathrm{mean}_k |A_k| |B_k| / P}
                 {\mathrm{std}_k |A_k \cap B_k|}

    The standard deviation is that of a population: the sum of squares is divided by K. Ciceri et
    al. (2024) compute z for every epoch. There :math:`A_k` and :math:`B_k` are the samples that the
    two runs of pair k misclassify at this epoch.

    Args:
        sets_a: K >= 2 sets, each a bool mask ``[P]`` or distinct indices in [0, P).
        sets_b: K sets of the same form. Set k belongs to set k of ``sets_a``.
        population: The number of samples P >= 1.

    Returns:
        z, which has no unit. If all K intersections have the same size, z is inf with the sign of
        the numerator, or NaN if the numerator is 0.

    Raises:
        TypeError, ValueError: An argument has the wrong type, length or range.

    The result is deterministic. The function computes on the CPU and needs O(K P) memory.

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
    """The sets as masks, ``[K, P]`` bool on the CPU."""
    masks = torch.zeros(len(sets), population, dtype=torch.bool)
    for index, members in enumerate(sets):
        label = f"{name}[{index}]"
        values = torch.as_tensor(members).detach().cpu()
        if values.dim() != 1:
            raise ValueError(f"{label}: expected one dimension, got shape {list(values.shape)}")
        if values.dtype == torch.bool:
            if len(values) != population:
                raise ValueError(f"{label}: expected a mask [{population}], got [{len(values)}]")
            masks[index] = values
        elif len(values) > 0:
            if values.is_floating_point() or values.is_complex():
                raise TypeError(f"{label}: expected bool or integers, got {values.dtype}")
            if values.min() < 0 or values.max() >= population:
                raise ValueError(
                    f"{label}: expected indices in [0, {population}), "
                    f"got {values.min()} to {values.max()}"
                )
            masks[index, values.long()] = True
            if masks[index].sum() != len(values):
                raise ValueError(f"{label}: expected distinct indices, got some more than once")
    return masks
