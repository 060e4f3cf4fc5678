"""Seminorm and scale of a quasi-homogeneous network with given rates."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .. import _checks as checks
from .parameters import Parameters, groups_of, rated_parameters

Version = Literal["tau", "lambda_max"]


def lambda_seminorm(
    parameters: Parameters, rates: Mapping[str, float], *, largest_only: bool = False
) -> Tensor:
    r"""Norm of the parameters, with the square of each parameter weighted by its rate.

    .. math:: \lVert \theta \rVert_\Lambda = \Bigl( \sum_i \lambda_i \theta_i^2 \Bigr)^{1/2}

    This is the seminorm of Kunin, Yamamura, Ma, Ganguli (2023).

    Args:
        parameters: A module, or a mapping of names to dense floating-point tensors, no DTensors.
            All parameters of a module count, shared ones once.
        rates: The rate of each parameter by name, finite and >= 0, see
            :func:`marginops.homogeneity.rates`.
        largest_only: Sum only over the parameters with the largest rate.

    Returns:
        0-d float64, on the device of the first parameter. NaN and infinities propagate. No square
        overflows or underflows.

    Raises:
        TypeError, ValueError: ``rates`` does not name exactly these parameters, a rate is
            negative or not finite, or an argument has the wrong type.

    The seminorm is differentiable in the parameters. It is deterministic on the CPU. The function
    reads every parameter with a positive rate once, float64 ones twice, and sums the squares in
    float64.

    Example:
        >>> import torch
        >>> from marginops.homogeneity import lambda_seminorm
        >>> parameters = {"weight": torch.tensor([3.0, 0.0]), "bias": torch.tensor([8.0])}
        >>> lambda_seminorm(parameters, {"weight": 1.0, "bias": 0.25})
        tensor(5., dtype=torch.float64)
        >>> lambda_seminorm(parameters, {"weight": 1.0, "bias": 0.25}, largest_only=True)
        tensor(3., dtype=torch.float64)
    """
    groups = groups_of(parameters, rates, largest_only)
    # A group of zeros has the unit 1, in which the squares of small parameters would vanish.
    units = torch.where(groups.squares == 0, 0, groups.unit)
    unit = torch.where(units.any(), units.amax(), 1)
    total = (groups.rate * groups.squares * (units / unit).square()).sum()
    is_zero = total == 0
    # The square root has no derivative at 0. The gradient of the seminorm is 0 there.
    return torch.where(is_zero, 0, torch.where(is_zero, 1, total).sqrt() * unit)


def log_scale(
    parameters: Parameters, rates: Mapping[str, float], *, version: Version = "tau"
) -> Tensor:
    r"""Logarithm of the scale of the parameters of a quasi-homogeneous network.

    ================ ============================================================================
    ``"tau"``        the root :math:`\tau` of :math:`\sum_i \lambda_i \, e^{-2 \tau \lambda_i} \,
                     \theta_i^2 = 1`
    ``"lambda_max"`` the logarithm of :math:`\lVert \theta \rVert_{\Lambda_{\max}}^{1 /
                     \lambda_{\max}}`, with :func:`marginops.homogeneity.lambda_seminorm` over the
                     parameters with the largest rate only; it is the root of the same equation with
                     these parameters only
    ================ ============================================================================

    Consider the curve :math:`\theta_i \mapsto e^{\alpha \lambda_i} \theta_i`. Along it the output
    of the network grows by :math:`e^\alpha`. At one point of the curve
    :func:`marginops.homogeneity.lambda_seminorm` is 1. The logarithm of the scale is the
    :math:`\alpha` that leads from this point to the parameters.
    :func:`marginops.homogeneity.rescale` by :math:`\alpha` adds :math:`\alpha` to it. The scale is
    that of Kunin, Yamamura, Ma, Ganguli (2023).

    ``classification_margin(..., log_norm=...)`` computes with it the margins of the network at
    scale 1. They do not change when the network is rescaled. So they compare networks, and epochs
    of one training run. Gradient flow maximises those of the second version in the limit. Neither
    version has to grow all the time. For example, the first one falls while training discards a
    parameter that has the largest rate and that the margin does not need.

    Args:
        parameters: A module or a mapping, see :func:`marginops.homogeneity.lambda_seminorm`.
        rates: The rate of each parameter by name, see :func:`marginops.homogeneity.rates`.
        version: ``"tau"`` or ``"lambda_max"``.

    Returns:
        0-d float64, on the device of the first parameter. It is NaN if a parameter that counts has
        a NaN, and ``+inf`` if one has an infinity. Parameters with rate 0 do not count.

    Raises:
        TypeError, ValueError: As for :func:`marginops.homogeneity.lambda_seminorm`. Also if the
            parameters that count are all 0, because then there is no root.

    The result is differentiable in the parameters up to third derivatives. It is deterministic on
    the CPU. The function reads the parameters once and waits for the device once. Newton's method
    on the logarithm of the sum approaches the root from below. A few steps reach the precision of
    float64.

    Example:
        >>> import torch, marginops
        >>> from marginops.homogeneity import log_scale
        >>> parameters = {"a": torch.tensor([2.0]), "b": torch.tensor([0.0])}
        >>> log_norm = log_scale(parameters, {"a": 1.0, "b": 0.5})
        >>> log_norm
        tensor(0.6931, dtype=torch.float64)
        >>> logits, target = torch.tensor([[6.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1])
        >>> marginops.classification_margin(logits, target, log_norm=log_norm)
        tensor([ 3.0000, -1.0000])
    """
    checks.check_choice("version", version, ("tau", "lambda_max"))
    rate, squares, unit = groups_of(parameters, rates, largest_only=version == "lambda_max")
    if squares.is_meta:
        raise ValueError("parameters: expected tensors with values, got tensors on the meta device")
    shift = 2 * unit.log()
    root = _root(rate.tolist(), squares.tolist(), shift.tolist())
    if not math.isfinite(root):
        return squares.sum() * root
    # ``root`` has no gradient. Two more Newton steps keep its value and have the first three
    # derivatives of the root. A weight that overflows is clamped: its squares are almost 0.
    finite = torch.finfo(rate.dtype).max
    weight = (rate * (shift - 2 * root * rate).exp()).clamp(max=finite)
    step = torch.zeros_like(squares[0])
    for _ in range(2):
        terms = weight * squares * (-2 * rate * step).exp()
        total = terms.sum()
        step = step + total * total.log() / (2 * (rate * terms).sum())
    return root + step


def rescale(model: nn.Module, rates: Mapping[str, float], alpha: float) -> None:
    r"""Scale the parameters of a network in place, so that its output grows by :math:`e^\alpha`.

    .. math:: \theta_i \leftarrow e^{\alpha \lambda_i} \, \theta_i

    These are the scalings of Kunin, Yamamura, Ma, Ganguli (2023).

    Args:
        model: The network whose parameters change. Parameters with rate 0 are not written.
        rates: The rate of each parameter by name, see :func:`marginops.homogeneity.rates`.
        alpha: A finite number. With ``-log_scale(model, rates)`` the network gets scale 1.

    Raises:
        TypeError, ValueError: As for :func:`marginops.homogeneity.lambda_seminorm`. Also if
            ``alpha`` is not a finite number or is too large. Then no parameter has changed.

    Autograd does not record the change. Afterwards :func:`marginops.homogeneity.log_scale` is
    larger by ``alpha``. The function reads and writes every parameter with a positive rate once.

    Example:
        >>> import math, torch
        >>> from marginops.homogeneity import rescale
        >>> model = torch.nn.Linear(2, 2)
        >>> before = model(torch.ones(1, 2))
        >>> rescale(model, {"weight": 1.0, "bias": 1.0}, math.log(2))
        >>> torch.testing.assert_close(model(torch.ones(1, 2)), 2 * before)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float, Tensor)):
        raise TypeError(f"alpha: expected a number, got {type(alpha).__name__}")
    alpha = float(alpha.detach()) if isinstance(alpha, Tensor) else float(alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number, got {alpha}")
    rated = rated_parameters(model, rates)
    try:
        factors = [math.exp(alpha * rate) for _, rate in rated]
    except OverflowError as error:
        raise ValueError(
            f"alpha: expected a number whose exponential is in the range of float64, got {alpha}"
        ) from error
    with torch.no_grad():
        for (value, rate), factor in zip(rated, factors, strict=True):
            if rate > 0:
                # The factor may exceed the dtype, although the product does not.
                value.copy_(value.double() * factor)


def _root(rate: list[float], squares: list[float], shift: list[float]) -> float:
    """The root of the logarithm of the sum of ``rate * squares * exp(shift - 2 tau rate)``."""
    if any(math.isnan(square) for square in squares):
        return math.nan
    groups = [
        (value, math.log(value) + math.log(square) + offset)
        for value, square, offset in zip(rate, squares, shift, strict=True)
        if value > 0 and square > 0
    ]
    if not groups:
        raise ValueError(
            "parameters: expected a parameter that is not 0 and has a positive rate, "
            "got a seminorm of 0"
        )
    tau = max(offset / (2 * value) for value, offset in groups)
    if math.isinf(tau):
        return tau
    # The function is convex and decreasing, and at the start it is >= 0. So every step increases
    # tau and does not pass the root.
    for _ in range(200):
        terms = [(value, math.exp(offset - 2 * tau * value)) for value, offset in groups]
        total = math.fsum(term for _, term in terms)
        step = total * math.log(total) / (2 * math.fsum(value * term for value, term in terms))
        tau, before = tau + step, tau
        if step <= 0 or tau == before:
            break
    return tau
