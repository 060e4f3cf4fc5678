"""The numbers of one epoch, of a bounded size, as values that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..dynamics.training_dynamics import TrainingDynamics
    from ..epoch_report import EpochReport

MOST_CLASSES = 1000  # with more of them, an epoch has no numbers for each class
_QUANTILES = 256  # the distribution of the margins is kept as so many parts of equal size
_PARTS = 10
_CLASS_NUMBERS = ("samples", "correct", "visited", "margin")
_MOST_SORTED = 2**20  # of more samples, an epoch sorts every second, third and so on


def epoch_numbers(
    dynamics: TrainingDynamics,
    labels: Tensor,
    predictions: Tensor,
    count_before: Tensor,
    margin_before: Tensor,
) -> dict[str, Any]:
    """What all samples are like after an epoch, and which of them the epoch visited.

    Args:
        dynamics: The dynamics after the epoch.
        labels: ``[N]``, the label of every sample; -1 if it was never seen.
        predictions: ``[N]``, the class predicted last; -1 if the sample was never seen.
        count_before: ``[N]`` int32, the number of visits before the epoch.
        margin_before: ``[N]`` float32, the margins as last seen before the epoch.
    """
    margin, loss = dynamics.margin.cpu(), dynamics.loss.cpu()
    visits = dynamics.count.cpu() - count_before
    seen, correct = labels >= 0, (labels >= 0) & (predictions == labels)
    visited = visits > 0
    finite_loss = loss[loss.isfinite()]
    return {
        "seen": int(seen.sum()),
        "accuracy": number(correct.sum() / seen.sum()),
        "loss": number(finite_loss.double().mean()),
        "nonfinite": dynamics.num_nonfinite,
        "margins": _quantiles(margin),
        "visited": int(visited.sum()),
        "visits": int(visits.clamp(min=0).sum()),
        "new": int((visited & (count_before == 0)).sum()),
        "visited_by_margin": _by_margin(visited, margin_before),
        "classes": _by_class(labels, correct, margin, visited),
    }


def problem_of(epoch: Mapping[str, Any]) -> str | None:
    """What is wrong with the numbers of an epoch that were read from a file; None if nothing is."""
    for name in ("epoch", "seen", "visited", "visits", "new"):
        if type(epoch.get(name)) is not int:
            return f"expected {name} as an int"
    if not isinstance(epoch.get("values"), dict) or not _are_numbers(epoch["values"].values()):
        return "expected values as numbers by name"
    for name, size in (("margins", _QUANTILES + 1), ("visited_by_margin", _PARTS)):
        value = epoch.get(name)
        is_right = isinstance(value, list) and len(value) == size and _are_numbers(value)
        if value is not None and not is_right:
            return f"expected {name} as {size} numbers"
    for name in ("classes", "report"):
        if not isinstance(epoch.get(name) or {}, dict):
            return f"expected {name} as a mapping"
    classes = epoch.get("classes") or {}
    columns: list[Any] = [classes.get(name) for name in _CLASS_NUMBERS]
    if classes and (
        not all(isinstance(column, list) and _are_numbers(column) for column in columns)
        or len({len(column) for column in columns}) != 1
    ):
        return "expected classes with four lists of equal lengths"
    radius = (epoch.get("report") or {}).get("radius", [])
    if not isinstance(radius, list) or not _are_numbers(radius):
        return "expected report with radius as a list of numbers"
    return None


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values)


def report_numbers(report: EpochReport) -> dict[str, Any]:
    """The numbers of an epoch report."""
    kept = ("area", "area_cdf", "minimum", "maximum", "separation", "quantiles")
    manifolds = report.manifolds
    return {
        "training_error": report.training_error,
        "test_accuracy": report.test_accuracy,
        "log_norm": report.log_norm,
        "margin": {name: numbers(getattr(report.distribution, name)) for name in kept},
        "collapse": {name: numbers(value) for name, value in report.collapse._asdict().items()},
        "radius": numbers(manifolds.radius),
        "mean_distance": numbers(manifolds.scalars()["mean_distance"]),
        "tau_margin": report.tau_margin,
        "lambda_max_margin": report.lambda_max_margin,
    }


def numbers(value: Tensor) -> Any:
    """A tensor as a number or nested lists. None replaces NaN and infinities."""
    if value.dim() > 0:
        return [numbers(part) for part in value]
    number = value.item()
    return number if math.isfinite(number) else None


def number(value: Any) -> float | None:
    """A number with six digits. None replaces NaN and infinities."""
    value = float(value)
    return float(f"{value:.6g}") if math.isfinite(value) else None


def finite(value: Any) -> Any:
    """Numbers with six digits in nested mappings and lists."""
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if value is None else number(value)


def _spread(values: Tensor) -> Tensor:
    """All values, or a bounded number that is spread evenly over them."""
    return values[:: -(-len(values) // _MOST_SORTED)]


def _quantiles(margin: Tensor) -> list[float | None] | None:
    """The smallest margin, the largest one, and the quantiles between them."""
    margin = margin[margin.isfinite()]
    if len(margin) == 0:
        return None
    ends = margin.aminmax()
    ordered = _spread(margin).sort().values
    places = torch.linspace(0, len(ordered) - 1, _QUANTILES + 1, dtype=torch.float64)
    low, share = places.floor().long(), places.frac()
    high = (low + 1).clamp(max=len(ordered) - 1)
    values = ordered[low].double().lerp(ordered[high].double(), share)
    values[0], values[-1] = ends.min, ends.max
    return [number(value) for value in values.tolist()]


def _by_margin(visited: Tensor, margin_before: Tensor) -> list[float | None] | None:
    """Of each tenth of the samples, in the order of their margins, the share that was visited."""
    margin, visited = _spread(margin_before), _spread(visited)
    known = margin.isfinite()
    if int(known.sum()) < _PARTS:
        return None
    order = margin[known].argsort(stable=True)
    parts = visited[known][order].double().tensor_split(_PARTS)
    return [number(part.mean()) for part in parts]


def _by_class(
    labels: Tensor, correct: Tensor, margin: Tensor, visited: Tensor
) -> dict[str, list[Any]] | None:
    """Of each class: how many samples were seen, are correct and were visited, and the margin."""
    known = labels >= 0
    size = int(labels.max()) + 1
    if not 0 < size <= MOST_CLASSES:
        return None
    has_margin = known & margin.isfinite()

    def count(of: Tensor) -> Tensor:
        return torch.bincount(labels[of], minlength=size)

    summed = torch.bincount(labels[has_margin], margin[has_margin].double(), minlength=size)
    means = summed / count(has_margin)
    return {
        "samples": count(known).tolist(),
        "correct": count(correct).tolist(),
        "visited": count(known & visited).tolist(),
        "margin": [number(mean) for mean in means.tolist()],
    }
