"""The inversion point, at which classes stop contracting, and the stragglers at this point."""

import math
from collections.abc import Mapping
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
        if not isinstance(per_class, bool):
            raise TypeError(f"per_class: expected a bool, got {type(per_class).__name__}")
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
            TypeError, ValueError: The other monitor had other arguments, or the state is damaged.
                The monitor stays as it was.
        """
        history, epochs, stragglers, population = self._checked(state_dict)
        self._history = history.tolist()
        self._epochs = list(epochs)
        self._population = population
        self._stragglers = None if stragglers is None else stragglers.clone()

    def _checked(
        self, state_dict: Mapping[str, Any]
    ) -> tuple[Tensor, list[int | None], Tensor | None, int | None]:
        """Check a whole state: history, epochs, stragglers and population."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
        if set(state_dict) != set(self.state_dict()):
            raise ValueError(
                f"state_dict: expected the keys {', '.join(self.state_dict())}, "
                f"got {', '.join(map(str, state_dict))}"
            )
        arguments, history, epochs, stragglers, population = (
            state_dict[name] for name in self.state_dict()
        )
        if not _same_arguments(arguments, self._arguments()):
            raise ValueError(
                f"state_dict: expected the state of a monitor with {self._arguments()}, "
                f"got {arguments!r}"
            )
        form = f"[T, {self.num_classes}]"
        _check_state_tensor("history", history, torch.float64, 2, form)
        if history.shape[1] != self.num_classes:
            raise ValueError(
                f"state_dict: expected history of shape {form}, got {list(history.shape)}"
            )
        if (history < 0).any():
            raise ValueError(
                f"state_dict: expected radii >= 0 in history, got {history[history < 0][0].item()}"
            )
        known = self._epochs_of(history)
        if repr(epochs) != repr(known):
            raise ValueError(
                f"state_dict: expected epochs {known}, where the radii of history stop falling, "
                f"got {epochs!r}"
            )
        if len(history) == 0:
            if population is not None:
                raise ValueError(
                    f"state_dict: expected population None without epochs, got {population!r}"
                )
        elif type(population) is not int or population < 0:
            raise ValueError(f"state_dict: expected population as an int >= 0, got {population!r}")
        if known == [None] * len(known):
            if stragglers is not None:
                raise ValueError(
                    "state_dict: expected stragglers None before an inversion, "
                    f"got {type(stragglers).__name__}"
                )
        else:
            _check_state_tensor("stragglers", stragglers, torch.bool, 1, f"[{population}]")
            if len(stragglers) != population:
                raise ValueError(
                    f"state_dict: expected stragglers of the population {population}, "
                    f"got {len(stragglers)}"
                )
        return history, known, stragglers, population

    def _epochs_of(self, history: Tensor) -> list[int | None]:
        """The inversion points that follow from the radii of all epochs."""
        stays = history[1:] >= history[:-1]
        stays[: self.first_epoch - 2] = False
        return [
            int(column.int().argmax()) + 2 if column.any() else None
            for column in stays[:, : len(self._epochs)].unbind(1)
        ]

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


def _same_arguments(first: Any, second: Mapping[str, int]) -> bool:
    """Whether two mappings are equal, where 1 is not True."""
    return (
        isinstance(first, Mapping)
        and first == second
        and all(type(first[name]) is type(value) for name, value in second.items())
    )


def _check_state_tensor(name: str, value: Any, dtype: torch.dtype, dim: int, form: str) -> None:
    """Check a tensor of a saved state, which holds values of its own."""
    expected = f"state_dict: expected {name} as a tensor {form} of {dtype}"
    if not isinstance(value, Tensor):
        got = "None" if value is None else type(value).__name__
        raise TypeError(f"{expected}, got {got}")
    if value.layout != torch.strided or value.is_meta:
        raise TypeError(f"{expected}, got layout {value.layout} on device {value.device}")
    if value.dtype != dtype:
        raise TypeError(f"{expected}, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{expected}, got shape {list(value.shape)}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ValueError(f"{expected}, got a tensor that repeats elements")
