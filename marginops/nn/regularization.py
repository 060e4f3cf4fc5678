"""Multi-margin regularization as a term of the loss, with its schedule over epochs."""

from typing import get_args

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..ops.regularization import Reduction, multi_margin_regularization


class MultiMarginRegularization(nn.Module):
    r"""``alpha`` times :func:`marginops.multi_margin_regularization`, a term of the loss.

    ``alpha`` follows a schedule over epochs. In epoch 0 it is 0. From epoch 1 on it lies on the
    line from :math:`\alpha_0` in epoch 0 to :math:`\alpha_1` in epoch E - 1. After that epoch it
    stays :math:`\alpha_1`:

    .. math:: \alpha(e) = \alpha_0 + (\alpha_1 - \alpha_0) \, \min\Big(\frac{e}{E - 1}, 1\Big),
        \qquad e \ge 1

    Weinstein, Fine, Hel-Or (2020) use this schedule from 1e-4 to 1e-2, and from 1e-5 to 1e-3 for a
    WRN-28-10.

    Args:
        epochs: The number of epochs E >= 1.
        alpha_start: :math:`\alpha_0 \ge 0`.
        alpha_end: :math:`\alpha_1 \ge 0`.
        reduction: See :func:`marginops.multi_margin_regularization`.
        ignore_index: Samples with this target do not count.

    Shape:
        ``input`` [N, D], ``weight`` [C, D], ``target`` [N], ``logits`` [N, C], ``bias`` [C]. The
        result is a scalar. :func:`marginops.multi_margin_regularization` describes the dtypes.

    Raises:
        TypeError, ValueError: An argument has the wrong type, or its value is out of range.

    The current epoch is a buffer. So training continues in the right epoch after a ``state_dict``
    is loaded, and a new epoch does not compile anything again. Cost and determinism are those of
    :func:`marginops.multi_margin_regularization`.

    Example:
        >>> regularization = marginops.nn.MultiMarginRegularization(epochs=3)
        >>> regularization.set_epoch(2)
        >>> features, weight = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.eye(2)
        >>> regularization(features, weight, torch.tensor([0, 1]))
        tensor(0.5000)
    """

    epoch: Tensor

    def __init__(
        self,
        epochs: int,
        alpha_start: float = 1e-4,
        alpha_end: float = 1e-2,
        *,
        reduction: Reduction = "square_of_mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        checks.check_int("epochs", epochs, 1)
        for name, value in (("alpha_start", alpha_start), ("alpha_end", alpha_end)):
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a finite value of at least 0, got {value}")
        checks.check_choice("reduction", reduction, get_args(Reduction))
        self.epochs = epochs
        self.alpha_start = alpha_start
        self.alpha_end = alpha_end
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index
        self.register_buffer("epoch", torch.tensor(0))

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch. The first epoch is 0."""
        checks.check_int("epoch", epoch, 0)
        self.epoch.fill_(epoch)

    @property
    def alpha(self) -> Tensor:
        """The factor ``alpha`` of the current epoch, a scalar tensor."""
        share = (self.epoch.double() / max(self.epochs - 1, 1)).clamp(max=1)
        alpha = self.alpha_start + (self.alpha_end - self.alpha_start) * share
        return torch.where(self.epoch == 0, 0, alpha)

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        logits: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Compute the term for a batch, see :func:`marginops.multi_margin_regularization`."""
        term = multi_margin_regularization(
            input,
            weight,
            target,
            logits=logits,
            bias=bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )
        return (self.alpha * term).to(term.dtype)

    def extra_repr(self) -> str:
        """The arguments of the module, for printing."""
        return (
            f"epochs={self.epochs}, alpha_start={self.alpha_start}, alpha_end={self.alpha_end}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )
