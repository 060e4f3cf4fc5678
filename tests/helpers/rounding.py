"""Random logits, the accuracy required of their statistics, and comparisons."""

import math

import numpy as np
import torch

from marginops._checks import result_dtype


def random_logits(device, dtype, rows=200, classes=10, scale=3.0):
    logits = (torch.randn(rows, classes, dtype=torch.float64) * scale).to(dtype)
    return logits.to(device), torch.randint(classes, (rows,), device=device)


def rounding(logits, target):
    """The relative error that each row's fields may have, in its dtype of arithmetic.

    The difference x - m rounds by half an epsilon of itself, which is a relative error of
    exp(x - m). The second largest logit and the target's logit count; smaller terms weigh less.
    A few more roundings, mostly of exp, and those of a sum of C terms, which mostly cancel, are
    added.
    """
    values = logits.double()
    top = values.topk(2).values
    label = values.gather(1, target.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    limits = torch.finfo(result_dtype(logits.dtype))
    reach = (top[:, 0] - torch.minimum(label, top[:, 1])).nan_to_num(0, 0, 0)
    reach = reach.clamp(max=-math.log(limits.tiny))  # from there on exp is 0
    return (limits.eps * (8 + reach / 2 + math.sqrt(logits.shape[1]))).numpy()


def assert_within(actual, expected, relative, absolute, name=""):
    actual, expected = actual.double().cpu().numpy(), np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, name
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        close = np.abs(actual - expected) <= relative * np.abs(expected) + absolute
    wrong = ~(same | close)
    assert not wrong.any(), (name, wrong.nonzero(), actual[wrong], expected[wrong])


def assert_same(actual, expected):
    """Equal in every value, NaN included."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
