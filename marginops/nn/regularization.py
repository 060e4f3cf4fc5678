"""Multi-margin regularization as a term of the loss, with its schedule over epochs."""

from typing import get_args

import torch
from torch import Tensor, nn

from .. import _checks as checks
from ..ops.regularization import Reduction, multi_margin_regularization


class MultiMarginRegularization(nn.Module):
    r"""``alpha`` times :func:`marginops.multi_margin_regularization`, to be added to the loss.

    In epoch 0 ``alpha`` is 0; afterwards it lies on the line from :math:`\alpha_0` in epoch 0 to
    :math:`\alpha_1` in the last epoch, and stays there:

    .. math:: \alpha(e) = \alpha_0 + (\alpha_1 - \alpha_0) \, \min\Big(\frac{e}{E - 1}, 1\Big),
        \qquad e \ge 1

    The schedule of Weinstein, Fine, Hel-Or (2020), who use 1e-4 to 1e-2, and 1e-5 to 1e-3 for a
    WRN-28-10.

    Args:
        epochs: E >= 1, how many there will be.
        alpha_start: :math:`\alpha_0 \ge 0`.
        alpha_end: :math:`\alpha_1 \ge 0`.
        reduction: See :func:`marginops.multi_margin_regularization`.
        ignore_index: Samples with this target do not count.

    Shape:
        ``input`` [N, D], ``weight`` [C, D], ``target`` [N], ``logits`` [N, C], ``bias`` [C]; the
        result is a scalar.

    Raises:
        TypeError, ValueError: An argument is not what it should be.

    ``epoch`` is a buffer, so a ``state_dict`` continues where it was saved, and a new epoch
    compiles nothing again. Cost and determinism are those of the op.

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
        """Say that this epoch begins, the first one being 0."""
        checks.check_int("epoch", epoch, 0)
        self.epoch.fill_(epoch)

    @property
    def alpha(self) -> Tensor:
        """The factor of the current epoch, a scalar."""
        share = (self.epoch / max(self.epochs - 1, 1)).clamp(max=1)
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
        """The term to add to the loss of a batch."""
        return self.alpha * multi_margin_regularization(
            input,
            weight,
            target,
            logits=logits,
            bias=bias,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """The schedule, for printing."""
        return (
            f"epochs={self.epochs}, alpha_start={self.alpha_start}, alpha_end={self.alpha_end}, "
            f"reduction={self.reduction!r}, ignore_index={self.ignore_index}"
        )
