"""How much more often than by chance two training runs misclassify the same samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks as checks


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
