"""The data set of ``--data MODULE:FUNCTION``: calls the function, and checks what it returns."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import functions
from .data import ClassificationData, DataError

_PARTS = ("train_inputs", "train_target", "test_inputs", "test_target")


def load_own(place: str) -> ClassificationData:
    """Call a function of the user that returns a data set.

    Args:
        place: ``package.module:function``. The function takes no arguments. It returns
            ``(train_inputs, train_target, test_inputs, test_target)``, four tensors or NumPy
            arrays.

    Returns:
        The data set. Floating-point inputs are converted to float32. There are as many classes as
        the training labels name.

    Raises:
        DataError: The function returned something else.
        UsageError: The function cannot be found or called, or it raised an error.
    """
    value = functions.call("--data", place)
    if not isinstance(value, tuple | list) or len(value) != len(_PARTS):
        got = type(value).__name__
        if isinstance(value, tuple | list):
            got = f"{got} of {len(value)} elements"
        raise DataError(
            f"--data: expected {place} to return ({', '.join(_PARTS)}), got {got}; "
            "return four tensors or arrays"
        )
    parts = [_tensor(name, part) for name, part in zip(_PARTS, value, strict=True)]
    train_inputs, train_target, test_inputs, test_target = parts
    train_inputs = _checked_inputs("train_inputs", train_inputs)
    test_inputs = _checked_inputs("test_inputs", test_inputs)
    kinds = [
        f"{inputs.dtype} of shape [N, {', '.join(map(str, inputs.shape[1:]))}]"
        for inputs in (train_inputs, test_inputs)
    ]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"--data: test_inputs: expected {kinds[0]}, as train_inputs, got {kinds[1]}"
        )
    train_target = _checked_target("train_target", train_target, len(train_inputs))
    test_target = _checked_target("test_target", test_target, len(test_inputs))
    num_classes = _number_of_classes(train_target)
    if test_target.max() >= num_classes:
        raise DataError(
            f"--data: test_target: expected classes below {num_classes}, the number of classes in "
            f"train_target, got {test_target.max()}"
        )
    return ClassificationData(
        place, num_classes, train_inputs, train_target, test_inputs, test_target
    )


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            return torch.tensor(value)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"--data: {name}: expected an array of numbers, got {value.dtype}"
            ) from error
    if not isinstance(value, Tensor):
        raise DataError(
            f"--data: {name}: expected a tensor or a NumPy array, got {type(value).__name__}; "
            "stack the samples into one tensor"
        )
    if value.layout != torch.strided or value.is_meta:
        kind = "no values" if value.is_meta else f"the layout {value.layout}"
        raise DataError(f"--data: {name}: expected a dense tensor, got one with {kind}")
    return value.detach()


def _checked_inputs(name: str, inputs: Tensor) -> Tensor:
    if inputs.dim() < 2 or len(inputs) == 0:
        raise DataError(
            f"--data: {name}: expected shape [N, ...] with at least one sample, "
            f"got {[*inputs.shape]}"
        )
    if inputs.is_complex() or inputs.is_quantized:
        raise DataError(f"--data: {name}: expected real numbers or integers, got {inputs.dtype}")
    if not inputs.is_floating_point():
        return inputs
    inputs = inputs.float()
    if not inputs.isfinite().all():
        raise DataError(
            f"--data: {name}: expected finite numbers that float32 can hold, got NaN or infinity"
        )
    return inputs


def _checked_target(name: str, target: Tensor, count: int) -> Tensor:
    if target.shape != (count,):
        raise DataError(
            f"--data: {name}: expected shape [{count}], one class for each sample, "
            f"got {[*target.shape]}"
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise DataError(f"--data: {name}: expected whole numbers from 0 on, got {target.dtype}")
    target = target.long()
    if target.min() < 0:
        raise DataError(f"--data: {name}: expected classes from 0 on, got {target.min()}")
    return target


def _number_of_classes(target: Tensor) -> int:
    """The number of classes, each of which has a sample: collapse and radii need one."""
    classes = target.unique()
    if len(classes) < 2:
        raise DataError(f"--data: train_target: expected two classes or more, got {len(classes)}")
    if classes[-1] != len(classes) - 1:
        missing = next(label for label, found in enumerate(classes.tolist()) if label != found)
        raise DataError(
            f"--data: train_target: expected a sample of every class from 0 to {classes[-1]}, got "
            f"none of class {missing}; number the classes without gaps"
        )
    return len(classes)
