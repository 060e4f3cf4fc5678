"""The distribution of margins: areas under its curve, support vectors, and a state to add up."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from ._library import Op

AreaForm = Literal["rank", "cdf"]

# Bins of margins are the upper halves of their float32: sign, exponent, 7 bits of the mantissa.
BINS = 2**16
INFINITE_BIN = 0x7F80  # that of +inf, without its sign


def margin_area(margins: Tensor, *, form: AreaForm = "rank") -> Tensor:
    r"""The area under the curve of margins, one number for how well a network separates.

    ``form="rank"``: the area under the sorted margins :math:`q_{(1)} \le \dots \le q_{(N)}`
    against their rank divided by N, which is their mean. ``form="cdf"``: the area under their
    empirical distribution function on [0, :math:`q_{\max}`] with
    :math:`q_{\max} = \max(q_{(N)}, 0)`,

    .. math:: \int_0^{q_{\max}} \frac{\#\{q_n \le t\}}{N} \, dt
        = \frac{1}{N} \sum_n \bigl(q_{\max} - \max(q_n, 0)\bigr).

    Banburski et al. (2021) compare networks by the area under the curve of their normalised
    margins; which of the two forms they compute is not known to us. It is not the area under the
    margin (AUM) of Pleiss et al. (2020), which is one sample's mean over epochs.

    Args:
        margins: ``[N]``, float32, float64, bfloat16 or float16, any stride. Margins of ``+inf``,
            which ignored samples have, are left out, of N as well.
        form: ``"rank"`` or ``"cdf"``.

    Returns:
        0-d, float64 for float64 margins, else float32, with sums in float64. NaN if a margin is
        NaN or if there are none. With a margin of ``-inf`` the rank form is ``-inf``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or value.

    Differentiable by PyTorch; equal largest margins share the gradient of the largest.
    Deterministic. O(N) temporary memory, no synchronisation with a GPU.

    Example:
        >>> margins = torch.tensor([-1.0, 1.0, 3.0])
        >>> marginops.margin_area(margins), marginops.margin_area(margins, form="cdf")
        (tensor(1.), tensor(1.6667))
    """
    checks.check_tensor("margins", margins, 1, "[N]")
    checks.check_choice("form", form, get_args(AreaForm))
    is_kept = margins != math.inf
    kept = torch.where(is_kept, margins, 0)
    if form == "cdf":
        positive = kept.clamp(min=0)
        largest = torch.cat((positive.new_zeros(1), positive)).amax()
        kept = torch.where(is_kept, largest.double() - positive, 0)
    area = kept.sum(dtype=torch.float64) / is_kept.sum()
    return area.to(result_dtype(margins.dtype))


def support_vector_counts(margins: Tensor, decades: int = 3) -> Tensor:
    r"""How many margins lie within a factor of 10, 100, ... of the smallest, in the loss.

    :math:`\#\{n : q_n < q_{\min} + \log 10^k\}` for :math:`k = 1, \dots` ``decades``. The loss of
    a sample with the unnormalised margin q is about :math:`e^{-q}`: these samples have more than
    a 10th, a 100th, ... of the largest loss, and act as support vectors do (Lyu & Li, 2020).

    Args:
        margins: ``[N]``, unnormalised; float32, float64, bfloat16 or float16, any stride. Margins
            of ``+inf``, which ignored samples have, are not counted.
        decades: How many powers of ten, >= 1.

    Returns:
        ``[decades]`` int64, ascending. Zeros where no margin can be compared: there are none, one
        is NaN, or the smallest is ``-inf``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or value.

    Not differentiable. Deterministic. O(N) temporary memory and one reading for each power of
    ten, compared in float64; no synchronisation with a GPU.

    Example:
        >>> marginops.support_vector_counts(torch.tensor([0.5, 1.0, 3.0, 7.0, 9.0]))
        tensor([2, 3, 4])
    """
    checks.check_tensor("margins", margins, 1, "[N]")
    checks.check_int("decades", decades, 1)
    wide = margins.detach().double()
    smallest = torch.cat((wide.new_full((1,), math.inf), wide)).amin()
    # Without any margin the threshold is +inf, below which none lies.
    return torch.stack([(wide < t).sum() for t in decade_thresholds(smallest, decades).unbind()])


def decade_thresholds(smallest: Tensor, decades: int) -> Tensor:
    """``smallest`` + log(10^k), k = 1, ..., ``decades``."""
    powers = torch.arange(1, decades + 1, dtype=torch.float64, device=smallest.device)
    return smallest + powers * math.log(10)


class UpdateMarginDistributionOp(Op):
    """Add margins to the state of a distribution, in place."""

    schema = (
        "update_margin_distribution(Tensor(a!) bin_counts, Tensor(b!) counts, Tensor(c!) sums,"
        " Tensor(d!) minimum, Tensor(e!) maximum, Tensor margins) -> ()"
    )

    @staticmethod
    def reference(
        bin_counts: Tensor,
        counts: Tensor,
        sums: Tensor,
        minimum: Tensor,
        maximum: Tensor,
        margins: Tensor,
    ) -> None:
        is_kept = margins != math.inf
        kept = torch.where(is_kept, margins, 0)
        positive = kept.clamp(min=0)
        counts += torch.stack(((~is_kept).sum(), (positive > 0).sum()))
        sums += torch.stack((kept.sum(dtype=torch.float64), positive.sum(dtype=torch.float64)))
        wide = margins.double()
        minimum.copy_(torch.cat((wide, minimum.reshape(1))).amin())
        maximum.copy_(torch.cat((torch.where(is_kept, wide, -math.inf), maximum.reshape(1))).amax())
        bins = margins.float().view(torch.int32) >> 16 & (BINS - 1)
        bin_counts.index_add_(0, bins, is_kept.long())

    @staticmethod
    def fake(*_: Tensor) -> None:
        """The state is changed in place, nothing is returned."""


update_margin_distribution_op = UpdateMarginDistributionOp()
