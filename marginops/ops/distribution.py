"""The distribution of margins: area under its curve, support vectors, and histogram counts."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from ._library import Op

AreaForm = Literal["rank", "cdf"]

# The bin of a margin is the upper half of its float32: sign, exponent, 7 bits of the mantissa.
BINS = 2**16
INFINITE_BIN = 0x7F80  # the bin of +inf; the sign bit is 0


def margin_area(margins: Tensor, *, form: AreaForm = "rank") -> Tensor:
    r"""The area under the curve of the margins, one number for how well a network separates.

    ``form="rank"`` is the area under the curve of the sorted margins
    :math:`q_{(1)} \le \dots \le q_{(N)}` over their rank divided by N. It equals the mean margin.
    ``form="cdf"`` is the area under the empirical distribution function of the margins on
    [0, :math:`q_{\max}`] with :math:`q_{\max} = \max(q_{(N)}, 0)`,

    .. math:: \int_0^{q_{\max}} \frac{\#\{q_n \le t\}}{N} \, dt
        = \frac{1}{N} \sum_n \bigl(q_{\max} - \max(q_n, 0)\bigr).

    Banburski et al. (2021) compare networks by the area under the curve of their normalised
    margins. We do not know which of the two forms they compute. The area is not the area under
    the margin (AUM) of Pleiss et al. (2020), which is the mean margin of one sample over epochs.

    Args:
        margins: ``[N]``, float32, float64, bfloat16 or float16, any stride. Margins of ``+inf``,
            which ignored samples have, do not count, neither in the sums nor in N.
        form: ``"rank"`` or ``"cdf"``.

    Returns:
        0-d, float64 for float64 margins, else float32, in units of the margins. The function
        computes in float64, and no sum overflows. The area is NaN if a margin is NaN or if no
        margin counts. With a margin of ``-inf`` the rank form is ``-inf``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or value.

    The area is differentiable in ``margins``. Margins that are equally large share the gradient of
    the largest. The result is deterministic. The function needs O(N) temporary memory and does not
    wait for the GPU.

    Example:
        >>> margins = torch.tensor([-1.0, 1.0, 3.0])
        >>> marginops.margin_area(margins), marginops.margin_area(margins, form="cdf")
        (tensor(1.), tensor(1.6667))
    """
    checks.check_tensor("margins", margins, 1, "[N]")
    checks.check_choice("form", form, get_args(AreaForm))
    is_kept = margins != math.inf
    kept = torch.where(is_kept, margins.double(), 0)
    if form == "cdf":
        positive = kept.clamp(min=0)
        largest = torch.cat((positive.new_zeros(1), positive)).amax()
        kept = torch.where(is_kept, largest - positive, 0)
    # Only sums of float64 margins can overflow. A power of two changes no other bit of the result.
    peak = torch.cat((kept.new_zeros(1), kept.detach().abs())).amax()
    scale = torch.where(peak > 2.0**900, 2.0**-64, 1.0)
    area = (kept * scale).sum() / is_kept.sum() / scale
    return area.to(result_dtype(margins.dtype))


def support_vector_counts(margins: Tensor, decades: int = 3) -> Tensor:
    r"""How many margins lie within a factor of 10, 100 and so on of the smallest, in the loss.

    For :math:`k = 1, \dots` ``decades`` the function counts

    .. math:: \#\{n : q_n < q_{\min} + \log 10^k\}.

    The loss of a sample with the unnormalised margin q is about :math:`e^{-q}`. So these samples
    have more than a 10th, a 100th, ... of the largest loss, and they act as support vectors do
    (Lyu, Li, 2020).

    Args:
        margins: ``[N]``, unnormalised, float32, float64, bfloat16 or float16, any stride. Margins
            of ``+inf``, which ignored samples have, do not count.
        decades: The number of powers of ten, >= 1.

    Returns:
        ``[decades]`` int64, ascending. All counts are 0 if no margin counts, if one is NaN, or if
        the smallest is ``-inf``.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or value.

    The counts have no gradient. They are deterministic. The function compares in float64, reads
    the margins once for each power of ten, needs O(N) temporary memory, and does not wait for the
    GPU.

    Example:
        >>> marginops.support_vector_counts(torch.tensor([0.5, 1.0, 3.0, 7.0, 9.0]))
        tensor([2, 3, 4])
    """
    checks.check_tensor("margins", margins, 1, "[N]")
    checks.check_int("decades", decades, 1)
    wide = margins.detach().double()
    smallest = torch.cat((wide.new_full((1,), math.inf), wide)).amin()
    # If no margin counts, the threshold is +inf, and no margin lies below it.
    return torch.stack([(wide < t).sum() for t in decade_thresholds(smallest, decades).unbind()])


def decade_thresholds(smallest: Tensor, decades: int) -> Tensor:
    """``smallest + log(10^k)`` for k = 1, ..., ``decades``."""
    powers = torch.arange(1, decades + 1, dtype=torch.float64, device=smallest.device)
    return smallest + powers * math.log(10)


class UpdateMarginDistributionOp(Op):
    """Add margins to the state of :class:`marginops.metrics.MarginDistribution`, in place."""

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
        """The op changes the state in place and returns nothing."""


update_margin_distribution_op = UpdateMarginDistributionOp()
