"""Direct calls of the ops with a tensor of a wrong kind or on a wrong device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import marginops
from helpers.ops import OPS
from marginops.ops._library import Op
from marginops.ops.dynamics import empty_state
from marginops.ops.linear_op import LinearOp

ROWS, CLASSES, COLUMNS = 6, 4, 3


def calls():
    """The arguments of a right call of every op."""
    logits, weight, bias = torch.randn(ROWS, CLASSES), torch.randn(CLASSES, COLUMNS), torch.randn(4)
    features, values = torch.randn(ROWS, COLUMNS), torch.rand(ROWS)
    target, rows = torch.tensor([0, 1, 2, 3, -100, 1]), torch.tensor([1, 2])
    log_norm, pair = torch.tensor(0.5), torch.tensor([[0, 1]] * ROWS)
    key, coefficient = torch.tensor([1, 4, 11]), torch.randn(3)
    statistics = OPS.sample_statistics(logits, target, None, log_norm, -100, False)
    saved = [statistics[index] for index in (1, 4, 5, 10, 11)]
    grads = [values] * 4
    head, labels = (features, weight, bias), (target, log_norm)
    term = OPS.multi_margin_regularization(features, weight, target, saved[0], values, False, -100)
    state = [torch.zeros(size, dtype=torch.int64) for size in (2**16, 2)]
    state += [torch.zeros(shape, dtype=torch.float64) for shape in (2, (), ())]
    score, gradient = (2, True, False, None, None), (None, None, True, True)
    return {
        "class_moments": (features, target, CLASSES, True, -100),
        "class_sum": (torch.tensor([0, 7, 14]), coefficient, features, CLASSES),
        "classification_margin": (logits, *labels, -100),
        "classification_margin_rival": (logits, *labels, rows, -100),
        "linear_classification_margin": (*head, *labels, None, -100, None, None),
        "linear_minimal_margin_score": (*head, *score),
        "linear_sample_statistics": (*head, *labels, -100, None, None),
        "linear_sample_statistics_gradient": (*head, target, *saved, log_norm, *grads, *gradient),
        "minimal_margin_pair": (logits, weight, bias, rows, False),
        "minimal_margin_score": (logits, weight, bias, False, False),
        "multi_margin_regularization": (features, weight, target, saved[0], values, False, -100),
        "multi_margin_regularization_gradient": (
            *(torch.ones(()), features, weight, target, saved[0], *term[1:]),
            *(False, -100, True, True),
        ),
        "pair_distance": (weight, bias, pair),
        "pair_gradient": (key, coefficient, weight, bias),
        "row_sums": (logits, target, True),
        "sample_statistics": (logits, target, values, log_norm, -100, True),
        "sample_statistics_gradient": (
            *(logits, target, *saved, log_norm, *grads),
            *(torch.tensor(2.0), torch.tensor(5.0), -100),
        ),
        "saved_distance": (values, weight, bias),
        "select_classification_margin": (logits, *labels, 2, -100),
        "select_minimal_margin": (logits, weight, bias, 2, False, False),
        "select_smallest": (values, 2),
        "update_dynamics": (*empty_state(5), rows, *[values[:2]] * 5, *[rows == 1] * 2, 0.5),
        "update_margin_distribution": (*state, values),
    }


CALLS = calls()
WRONG_KINDS = {
    "sparse": lambda value: value.to_sparse(),
    "nested": lambda value: torch.nested.nested_tensor([value, value]),
    "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
}


def tensors(arguments):
    return [index for index, value in enumerate(arguments) if isinstance(value, torch.Tensor)]


def replaced(arguments, position, value):
    """A copy of the arguments with another value at one position."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    return [*copies[:position], value, *copies[position + 1 :]]


def name_of(op, position):
    return getattr(OPS, op).default._schema.arguments[position].name


def test_every_op_is_called():
    kinds = [*Op.__subclasses__(), *LinearOp.__subclasses__()]
    ours = {kind for kind in kinds if kind.__module__.startswith("marginops.")} - {LinearOp}
    assert {op.schema.partition("(")[0] for op in ours} == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("namespace", ["marginops", "marginops_kernels"])
def test_one_tensor_on_the_meta_device(op, namespace):
    call, arguments = getattr(getattr(torch.ops, namespace), op), CALLS[op]
    for position in tensors(arguments):
        if len(tensors(arguments)) == 1:
            continue
        wrong = replaced(arguments, position, arguments[position].to("meta"))
        # The first tensor decides the device. If it is on the wrong one, the others are named.
        name = name_of(op, position) if position else r"\w+"
        with pytest.raises(RuntimeError, match=rf"{name}: expected device \w+ as"):
            call(*wrong)


@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_on_the_cpu(op):
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in CALLS[op]]
    schema = getattr(OPS, op).default._schema.arguments
    for position in tensors(arguments)[1:]:
        value = CALLS[op][position]
        wrong = replaced(arguments, position, value)
        if value.dim() == 0 and not schema[position].is_write:
            getattr(OPS, op)(*wrong)
            continue
        with pytest.raises(RuntimeError, match=f"{name_of(op, position)}: expected device meta"):
            getattr(OPS, op)(*wrong)
    if len(tensors(arguments)) > 1:
        with pytest.raises(RuntimeError, match=r"\w+: expected device cpu"):
            getattr(OPS, op)(*replaced(arguments, 0, CALLS[op][0]))


@pytest.mark.parametrize("op", CALLS)
def test_all_tensors_on_the_meta_device(op):
    arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in CALLS[op]]
    results = getattr(OPS, op)(*arguments)
    expected = getattr(OPS, op)(*replaced(CALLS[op], 0, CALLS[op][0].clone()))
    for result, wanted in zip(as_tuple(results), as_tuple(expected), strict=True):
        assert result.is_meta
        assert (result.shape, result.dtype) == (wanted.shape, wanted.dtype)


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results or ())


@pytest.mark.parametrize("kind", WRONG_KINDS)
@pytest.mark.parametrize("op", CALLS)
def test_one_tensor_that_is_not_dense(op, kind):
    arguments = CALLS[op]
    for position in tensors(arguments):
        value = arguments[position]
        if value.dim() == 0 or (kind == "quantized" and not value.is_floating_point()):
            continue
        wrong = replaced(arguments, position, WRONG_KINDS[kind](value))
        ours = rf"{name_of(op, position)}: expected a dense"
        with pytest.raises(RuntimeError, match="NestedTensor" if kind == "nested" else ours):
            getattr(OPS, op)(*wrong)


@pytest.mark.parametrize("count", [1, 7])
def test_wrong_shapes_for_ops_without_kernels(count):
    wrong = {
        "linear_classification_margin": (2, 3),
        "linear_minimal_margin_score": (2,),
        "linear_sample_statistics": (2, 3),
        "linear_sample_statistics_gradient": (2, *range(3, 9), *range(10, 14)),
        "multi_margin_regularization": (2, 3, 4),
        "multi_margin_regularization_gradient": (3, 4, 8),
    }
    for op, positions in wrong.items():
        for position in positions:
            value = CALLS[op][position][:1].expand(count)
            with pytest.raises(RuntimeError, match=f"{name_of(op, position)}: expected shape"):
                getattr(OPS, op)(*replaced(CALLS[op], position, value))


def test_tensors_on_different_fake_devices():
    with FakeTensorMode():
        logits = torch.randn(4, 3, device="cuda")
        target, elsewhere = (
            torch.zeros(4, dtype=torch.int64, device=device) for device in ("cuda", "cpu")
        )
        with pytest.raises(RuntimeError, match="target: expected device cuda:0 as logits, got cpu"):
            OPS.classification_margin(logits, elsewhere, None, -100)
        number = torch.zeros(())
        margin = OPS.classification_margin(logits, target, number, -100)
    assert margin.device.type == "cuda"


def test_public_functions_name_the_argument_on_the_meta_device():
    logits, target = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="target: expected device cpu as logits, got meta"):
        marginops.classification_margin(logits, target.to("meta"))
