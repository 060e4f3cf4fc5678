"""Number of samples, mean and gyration radius of every class, and how to merge them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks as checks
from .._checks import result_dtype
from ._library import Op
from ._results import describe
from .arguments import checked_target
from .class_sum import add_in_order


class ClassMoments(NamedTuple):
    """One row per class in each field; see :func:`marginops.class_moments`."""

    count: Tensor  # type: ignore[assignment]  # replaces tuple.count
    mean: Tensor
    radius: Tensor

    def __repr__(self) -> str:
        return describe(self)

    def merge(self, other: "ClassMoments") -> "ClassMoments":
        r"""The moments of the samples of ``self`` and ``other`` together.

        With :math:`n = n_a + n_b` and :math:`\delta = m_b - m_a` (Chan, Golub, LeVeque, 1979):

        .. math::
            m = m_a + \frac{n_b}{n} \delta, \qquad
            R^2 = \frac{n_a R_a^2 + n_b R_b^2}{n} + \frac{n_a n_b}{n^2} \lVert \delta \rVert_2^2

        Args:
            other: Moments of other samples with the same C classes and D columns, on the same
                device.

        Returns:
            :class:`marginops.ClassMoments` in the wider dtype of the two, computed in float64.
            Mean and radius of a class without samples are NaN.

        Raises:
            TypeError, ValueError: The shapes or the devices differ, or ``other`` holds a DTensor.

        The result is differentiable in the means and radii, and deterministic. The cost is O(C D).

        Example:
            >>> target = torch.zeros(2, dtype=torch.int64)
            >>> early = marginops.class_moments(torch.tensor([[0.0], [2.0]]), target, 1)
            >>> late = marginops.class_moments(torch.tensor([[4.0], [6.0]]), target, 1)
            >>> count, mean, radius = early.merge(late)
            >>> count, mean, radius
            (tensor([4]), tensor([[3.]]), tensor([2.2361]))
        """
        for value in other:
            checks.check_not_distributed("other", value)
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"other: expected moments of shape {list(self.mean.shape)}, "
                f"got {list(other.mean.shape)}"
            )
        checks.check_device("other", other.mean, self.mean, "these moments")
        count = self.count + other.count
        share = other.count.double() / count.clamp(min=1)
        has_own, has_other = (self.count > 0).unsqueeze(1), (other.count > 0).unsqueeze(1)
        # The mean of an empty class is NaN. The mean of the other side replaces it, so that the
        # difference is 0.
        mean = torch.where(has_own, self.mean.double(), other.mean.double())
        step = torch.where(has_other, other.mean.double(), mean) - mean
        square, other_square = (
            torch.where(has.squeeze(1), moments.radius.double().square(), 0)
            for has, moments in ((has_own, self), (has_other, other))
        )
        between = share * (1 - share) * step.square().sum(1)
        # torch.lerp would give NaN if one radius is infinite and the other class is empty.
        square = (1 - share) * square + share * other_square + between
        # The square root has no derivative at 0. The gradient of the radius is 0 there.
        radius = torch.where(square == 0, 0, torch.where(square == 0, 1, square).sqrt())
        mean = torch.addcmul(mean, step, share.unsqueeze(1))
        dtype = torch.promote_types(self.mean.dtype, other.mean.dtype)
        radius = torch.where(count == 0, torch.nan, radius)
        return ClassMoments(count, mean.to(dtype), radius.to(dtype))


def class_moments(
    input: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    normalize: bool = False,
    ignore_index: int = -100,
) -> ClassMoments:
    r"""Number of samples, mean and gyration radius of every class, from one call.

    Let :math:`z_n` be row n of ``input``, scaled to unit length if ``normalize`` is set, and
    :math:`n_c` the number of samples of class c:

    .. math::
        m_c = \frac{1}{n_c} \sum_{n: y_n = c} z_n, \qquad
        R_c = \sqrt{\frac{1}{n_c} \sum_{n: y_n = c} \lVert z_n - m_c \rVert_2^2}

    With ``normalize`` they are the centre and the radius of the class manifolds of Ciceri et al.
    (2024).

    Args:
        input: ``[N, D]``, float32, float64, bfloat16 or float16, any strides.
        target: ``[N]`` int64, classes in [0, C) or ``ignore_index``.
        num_classes: C, at least 1.
        normalize: Scale the rows to unit length first. Their squares neither overflow nor
            underflow. A row of zeros stays as it is.
        ignore_index: Samples with this target do not count and have no gradient.

    Returns:
        :class:`marginops.ClassMoments`: ``count`` [C] int64, ``mean`` [C, D] and ``radius`` [C],
        both float64 for float64 input, else float32. They are in units of ``input`` unless
        ``normalize`` is set. Mean and radius of an empty class are NaN. If a row holds a NaN or an
        infinity, the radius of its class is NaN, and so is the mean in that column (with
        ``normalize``, in all columns). :meth:`marginops.ClassMoments.merge` merges the moments of
        several batches.

    Raises:
        TypeError, ValueError: An argument has the wrong type, dtype, shape or device.
        RuntimeError: A target is outside [0, C), on the CPU; on CUDA this is a device-side
            assertion. Or there are 2**31 rows or more on CUDA, more than PyTorch sorts there. In
            this case merge the moments of several parts.

    The moments are differentiable in ``input``, any number of times. Where the radius is 0, its
    gradient is 0. With ``normalize`` the gradient of a row of zeros is 0. The result is
    deterministic and does not depend on the number of threads.

    The radius stays accurate however far the class is from 0, and it is exactly 0 for equal rows.
    The squares of the distances may exceed the range of float32, but not that of float64. The op
    reads the input once. On the CPU it first copies an input whose columns are not adjacent. All
    other temporaries are a few per cent of the input.

    Example:
        >>> input = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
        >>> count, mean, radius = marginops.class_moments(input, torch.tensor([0, 0, 1]), 2)
        >>> count, radius
        (tensor([2, 1]), tensor([1., 0.]))
        >>> mean
        tensor([[2., 0.],
                [0., 5.]])
    """
    checks.check_tensor("input", input, 2, "[N, D]")
    checks.check_target(target, input, ignore_index, "input")
    checks.check_int("num_classes", num_classes, 1)
    return ClassMoments._make(class_moments_op(input, target, num_classes, normalize, ignore_index))


def _unit_rows(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale rows to unit length; a row of zeros stays.

    Returns:
        The scaled rows, and two factors ``[N, 1]`` whose product is the length of each row. A
        row of zeros has factors of 1. Both factors are finite and not 0 where the row is finite;
        their product may overflow or underflow.
    """
    if input.shape[1] == 0:
        return input, input.new_ones(len(input), 1), input.new_ones(len(input), 1)
    largest = input.detach().abs().amax(1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest)
    scaled = input / largest
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    length = torch.where(length == 0, 1, length)
    return scaled / length, length, largest


class ClassMomentsOp(Op):
    """The op behind :func:`marginops.class_moments`. It returns count, mean and radius."""

    schema = (
        "class_moments(Tensor input, Tensor target, SymInt num_classes, bool normalize,"
        " int ignore_index) -> (Tensor, Tensor, Tensor)"
    )

    @staticmethod
    def reference(
        input: Tensor, target: Tensor, num_classes: int, normalize: bool, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Subtract one sample of the class from all others, so that equal rows have radius 0."""
        ignored, _ = checked_target(target, num_classes, ignore_index)
        # The ignored samples form one more class.
        label = torch.where(ignored, num_classes, target)
        sample = torch.arange(len(input), device=input.device)
        first = torch.full((num_classes + 1,), len(input), device=input.device)
        first.scatter_reduce_(0, label, sample, "amin")
        count = torch.zeros_like(first).scatter_add_(0, label, torch.ones_like(label))
        size = count.clamp(min=1).unsqueeze(1)

        def rows(index: Tensor) -> Tensor:
            some = input[index].double()
            return _unit_rows(some)[0] if normalize else some

        zeros = input.new_zeros(num_classes + 1, input.shape[1], dtype=torch.float64)
        origin = rows(first.clamp(max=len(input) - 1)) if len(input) else zeros
        step = zeros.clone()
        for part in sample.split(4096):
            add_in_order(step, label[part], rows(part) - origin[label[part]])
        step /= size
        square = zeros[:, 0].clone() if input.shape[1] else zeros.new_zeros(num_classes + 1)
        for part in sample.split(4096):
            deviation = rows(part) - origin[label[part]] - step[label[part]]
            add_in_order(square, label[part], deviation.square().sum(1))
        mean = origin + step
        mean = torch.where((count == 0).unsqueeze(1) | ~mean.isfinite(), torch.nan, mean)
        radius = torch.where(count == 0, torch.nan, (square / size.squeeze(1)).sqrt())
        dtype = result_dtype(input.dtype)
        return count[:-1].clone(), mean[:-1].to(dtype), radius[:-1].to(dtype)

    @staticmethod
    def fake(
        input: Tensor, target: Tensor, num_classes: int | torch.SymInt, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = result_dtype(input.dtype)
        return (
            input.new_empty((num_classes,), dtype=torch.int64),
            input.new_empty((num_classes, input.shape[1]), dtype=dtype),
            input.new_empty((num_classes,), dtype=dtype),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        input, target, _, ctx.normalize, ctx.ignore_index = inputs
        ctx.save_for_backward(input, target, *output)

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, grad_mean: Tensor | None, grad_radius: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """The gradient, which is differentiable.

        The NaN of empty classes and of ignored samples must not reach the gradient of others.
        """
        input, target, count, mean, radius = ctx.saved_tensors
        kept = (target != ctx.ignore_index).unsqueeze(1)
        label = torch.where(kept.squeeze(1), target, 0)
        rows = torch.where(kept, input.to(mean.dtype), 0)
        if ctx.normalize:
            rows, *lengths = _unit_rows(rows)
        grad = torch.zeros_like(rows)
        size = count.clamp(min=1).to(mean.dtype)
        if grad_mean is not None:
            grad = grad + (grad_mean / size.unsqueeze(1))[label]
        if grad_radius is not None:
            empty = count == 0
            is_zero = (radius == 0) | empty
            slope = torch.where(is_zero, 0, grad_radius / torch.where(is_zero, 1, radius) / size)
            centre = torch.where(empty.unsqueeze(1), 0, mean)
            grad = grad + slope[label].unsqueeze(1) * (rows - centre[label])
        if ctx.normalize:
            grad = grad - rows * (rows * grad).sum(1, keepdim=True)
            zero = (rows == 0).all(1, keepdim=True)
            for length in lengths:
                grad = grad / length
            grad = torch.where(zero, 0, grad)
        return torch.where(kept, grad, 0).to(input.dtype), None, None, None, None


class_moments_op = ClassMomentsOp()
