"""Margin, loss, confidence, entropy, EL2N and more of every sample, from one op."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import result_dtype
from . import margin_pair as pairs
from . import row_sums
from ._batches import Batch
from ._library import Op
from ._results import describe
from .arguments import (
    as_log_norm,
    check_features,
    check_labelled_logits,
    checked_target,
    warn_of_probabilities,
)
from .margin_gradient import log_norm_gradient
from .row_sums import StatisticsFields
from .rows import RowLayout, row_layout
from .statistics_gradient import sample_statistics_gradient_op


class SampleStatistics(NamedTuple):
    """One value per sample in each field; see :func:`marginops.sample_statistics`."""

    margin: Tensor
    rival: Tensor
    top2_margin: Tensor
    loss: Tensor
    confidence: Tensor
    entropy: Tensor
    correct: Tensor
    el2n: Tensor
    gradient_norm: Tensor | None
    counted: Tensor

    def __repr__(self) -> str:
        return describe(self)

    def mean_loss(self) -> Tensor:
        """The mean loss of the samples that are not ignored, as in ``F.cross_entropy``.

        Returns:
            0-d, in the dtype of ``loss``: the sum of ``loss`` divided by the number of samples
            with ``counted``. NaN if there is none.

        The mean is differentiable where ``loss`` is, and does not wait for the GPU. It is a result
        of its own: :func:`torch.autograd.grad` finds no gradient of it in ``loss`` itself, unless
        ``loss`` has a hook or retains its gradient.

        Example:
            >>> logits = torch.tensor([[2.0, 0.5], [0.0, 3.0], [1.0, 1.0]])
            >>> marginops.sample_statistics(logits, torch.tensor([0, 0, -100])).mean_loss()
            tensor(1.6250)
        """
        loss, counted = self.loss, self.counted
        if not torch.compiler.is_compiling():
            mean, samples = getattr(loss, _MEAN, (None, None))
            if mean is not None and samples is counted:
                has_changed = loss._version or counted._version or mean._version
                is_detached = not (loss.requires_grad and mean.requires_grad)
                # Hooks want to see a gradient of the losses.
                if not (has_changed or is_detached or loss._backward_hooks or loss.retains_grad):
                    return mean
        return loss.sum() / counted.sum()


def sample_statistics(
    logits: Tensor,
    target: Tensor,
    *,
    input: Tensor | None = None,
    log_norm: Tensor | float | None = None,
    ignore_index: int = -100,
) -> SampleStatistics:
    r"""Margin, loss, confidence, entropy, EL2N and more of every sample, from one call.

    For one sample, let :math:`f` be its logits, :math:`p` their softmax, :math:`y` its target,
    :math:`e_y` the one-hot vector of y, and :math:`h` the input of the last layer:

    ================= ===========================================================================
    ``margin``        :math:`(f_y - \max_{c \ne y} f_c) \, e^{-\mathrm{log\_norm}}`
    ``rival``         the class c of the maximum in ``margin``, int64
    ``top2_margin``   the largest minus the second largest logit, times
                      :math:`e^{-\mathrm{log\_norm}}`; never negative
    ``loss``          cross-entropy, :math:`-\log p_y`
    ``confidence``    :math:`p_y`
    ``entropy``       :math:`-\sum_c p_c \log p_c`, in nats
    ``correct``       bool, true if y is the class of the largest logit
    ``el2n``          :math:`\lVert p - e_y \rVert_2`
    ``gradient_norm`` :math:`\lVert p - e_y \rVert_2 \sqrt{1 + \lVert h \rVert_2^2}`, the norm of
                      the gradient of the loss in weight and bias of the last layer
    ``counted``       bool, true if the target is not ``ignore_index``
    ================= ===========================================================================

    The margin is that of Banburski et al. (2021). EL2N and the gradient norm are those of Paul,
    Ganguli, Dziugaite (2021), who call the latter GraNd. Here it is exact for the last layer.

    Args:
        logits: ``[N, C]`` or ``[..., N, C]``, C >= 2, float32, float64, bfloat16 or float16, any
            strides. The last dimension counts the classes.
        target: ``[N]`` or ``[..., N]`` int64, classes in [0, C) or ``ignore_index``.
        input: ``[N, D]`` or ``[..., N, D]``, the input of the last layer, any of these dtypes.
            Without it there is no ``gradient_norm``.
        log_norm: Natural logarithm of the norm product, see
            :func:`marginops.classification_margin`.
        ignore_index: A sample with this target has margin and ``top2_margin`` ``+inf``, loss,
            entropy, EL2N and gradient norm 0, confidence 1 and rival 0, and is correct. It has no
            gradient.

    Returns:
        :class:`marginops.SampleStatistics` of tensors in the shape of ``target``. The
        floating-point fields are float64 for float64 logits, else float32. ``gradient_norm`` is
        None without ``input``.
        :meth:`marginops.SampleStatistics.mean_loss` is the loss for training.
        Among equal logits the lowest class counts as the largest. A row with a NaN has NaN in
        every floating-point field and is not correct. Where the largest logit of a row is
        infinite, every floating-point field but the two margins is NaN. In float32 an EL2N below
        1e-19 becomes 0.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        RuntimeError: A target is outside [0, C), on the CPU. On CUDA this is a device-side
            assertion.

    ``margin``, ``loss``, ``confidence`` and ``entropy`` are differentiable in ``logits`` (once).
    The margin is also differentiable in ``log_norm``. The result is deterministic. The forward
    pass reads the logits once, and so does the backward pass. The gradient of the logits is the
    only temporary of their size. :func:`marginops.classification_margin` says which logits of more
    dimensions are copied.

    Example:
        >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 4.0]])
        >>> statistics = marginops.sample_statistics(logits, torch.tensor([0, 1]))
        >>> statistics.margin, statistics.rival, statistics.correct
        (tensor([ 1., -1.]), tensor([2, 2]), tensor([ True, False]))
        >>> statistics.loss, statistics.mean_loss()
        (tensor([0.4644, 1.3266]), tensor(0.8955))
    """
    check_labelled_logits(logits, target, ignore_index, or_more=True)
    warn_of_probabilities(logits)
    input_norm = None
    if input is not None:
        check_features(input, logits)
        dtype = result_dtype(logits.dtype)
        widest = torch.promote_types(input.dtype, dtype)
        input_norm = torch.linalg.vector_norm(input.detach(), dim=-1, dtype=widest).to(dtype)
    log_norm = as_log_norm(log_norm, logits)
    layout = None
    if logits.dim() != 2:
        layout = row_layout(logits)
        logits, target = layout.matrix(logits), layout.column(target, ignore_index)
        input_norm = None if input_norm is None else layout.column(input_norm, 0)
    # Without gradient the mean saves nothing, and inference tensors cannot tell of changes.
    with_mean = torch.is_grad_enabled() and logits.requires_grad
    with_mean = with_mean and not torch.compiler.is_compiling()
    fields = sample_statistics_op(logits, target, input_norm, log_norm, ignore_index, with_mean)
    statistics = as_statistics(fields, input is not None, layout)
    if with_mean:
        setattr(statistics.loss, _MEAN, (fields[_MEAN_LOSS], statistics.counted))
    return statistics


# The name of an attribute of losses with a gradient: their mean, a result of the same op, and the
# samples in it. A backward pass from this mean calls one function of autograd and not three.
_MEAN = "_marginops_mean"

_NUM_PUBLIC = len(SampleStatistics._fields)
_GRADIENT_NORM = StatisticsFields._fields.index("gradient_norm")
_MEAN_LOSS = StatisticsFields._fields.index("mean_loss")


def as_statistics(
    fields: tuple[Tensor, ...], has_gradient_norm: bool, layout: RowLayout | None = None
) -> SampleStatistics:
    """The public fields, which are the first results of the op, in the shape of the layout."""
    if layout is not None:
        fields = tuple(
            layout.restore(field) if has_gradient_norm or index != _GRADIENT_NORM else field
            for index, field in enumerate(fields[:_NUM_PUBLIC])
        )
    if has_gradient_norm:
        return SampleStatistics._make(fields[:_NUM_PUBLIC])
    first, last = fields[:_GRADIENT_NORM], fields[_GRADIENT_NORM + 1 : _NUM_PUBLIC]
    return SampleStatistics._make((*first, None, *last))


def empty_fields(
    logits: Tensor, rows: int | torch.SymInt, has_input: bool, with_mean: bool = False
) -> StatisticsFields:
    """Uninitialized results of the op for ``rows`` rows."""
    dtypes = {"rival": torch.int64, "correct": torch.bool, "counted": torch.bool}
    dtype = result_dtype(logits.dtype)
    shapes: dict[str, tuple[int | torch.SymInt, ...]] = {
        "gradient_norm": (rows if has_input else 0,),
        **dict.fromkeys(("mean_loss", "num_counted"), () if with_mean else (0,)),
    }

    def empty(name: str) -> Tensor:
        return logits.new_empty(shapes.get(name, (rows,)), dtype=dtypes.get(name, dtype))

    return StatisticsFields._make(map(empty, StatisticsFields._fields))


_DIFFERENTIABLE = ("margin", "loss", "confidence", "entropy", "mean_loss")
# Names and positions of the fields without a gradient.
CONSTANTS = tuple(
    (name, index)
    for index, name in enumerate(StatisticsFields._fields)
    if name not in _DIFFERENTIABLE
)

FIELDS = "(" + ", ".join(["Tensor"] * len(StatisticsFields._fields)) + ")"


class SampleStatisticsOp(Op):
    """The op behind :func:`marginops.sample_statistics`. It returns :class:`StatisticsFields`."""

    schema = (
        "sample_statistics(Tensor logits, Tensor target, Tensor? input_norm, Tensor? log_norm,"
        f" int ignore_index, bool with_mean) -> {FIELDS}"
    )
    constants = CONSTANTS
    row_arguments = ("logits", "target", "input_norm")

    def call_batch(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """Compute afterwards what has one value for each element of the batch."""
        has_norms, with_mean = "log_norm" in batch.names, batch.values["with_mean"]
        joined = batch.replace(with_mean=False)
        results = super().call_batch(joined.replace(log_norm=None) if has_norms else joined)
        if results is None:
            return None
        fields = StatisticsFields._make(results)
        if has_norms:
            margins = fields.margin, fields.top2_margin
            margin, top2_margin = (pairs.normalize_batch(value, batch) for value in margins)
            fields = fields._replace(margin=margin, top2_margin=top2_margin)
        if with_mean:
            count = fields.counted.sum(1, dtype=fields.loss.dtype)
            fields = fields._replace(mean_loss=fields.loss.sum(1) / count, num_counted=count)
        return tuple(fields)

    @staticmethod
    def reference(
        logits: Tensor,
        target: Tensor,
        input_norm: Tensor | None,
        log_norm: Tensor | None,
        ignore_index: int,
        with_mean: bool,
    ) -> StatisticsFields:
        ignored, label = checked_target(target, logits.shape[1], ignore_index)
        rows = row_sums.row_sums_reference(logits, label)
        fields = row_sums.finish(rows, label, ignored, input_norm, log_norm)
        if not with_mean:
            return fields
        count = (~ignored).sum(dtype=fields.loss.dtype)
        return fields._replace(mean_loss=fields.loss.sum() / count, num_counted=count)

    @staticmethod
    def fake(
        logits: Tensor, target: Tensor, input_norm: Tensor | None, *others: Any
    ) -> StatisticsFields:
        return empty_fields(logits, logits.shape[0], input_norm is not None, others[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, _, log_norm, ctx.ignore_index, with_mean = inputs
        fields = StatisticsFields._make(output)
        ctx.save_for_backward(
            *(logits, target, fields.rival, fields.confidence, fields.entropy),
            *(fields.maximum, fields.log_sum, log_norm),
            fields.num_counted if with_mean else None,
            fields.margin if ctx.needs_input_grad[3] else None,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, count, margin = ctx.saved_tensors
        *field_grads, grad_mean = grads
        grad_logits = grad_log_norm = None
        if ctx.needs_input_grad[0]:
            if count is None:  # the mean is an empty tensor
                grad_mean = None
            grad_logits = sample_statistics_gradient_op(
                *saved, *field_grads, grad_mean, count, ctx.ignore_index
            )
        if margin is not None:
            grad_log_norm = log_norm_gradient(grads[0], margin, saved[1], ctx.ignore_index)
        return grad_logits, None, None, grad_log_norm, None, None


sample_statistics_op = SampleStatisticsOp()
