"""Heads that are no linear layer, and outputs that hold more than logits."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.classifiers import BodyAndHead, expected_choice
from marginops.training import score_batch, select_batch

GENERATOR = torch.Generator().manual_seed(3)
INPUTS = torch.randn(40, 6, generator=GENERATOR)
IMAGES = torch.randn(40, 3, 6, 5, generator=GENERATOR)
REFUSED = r"head: expected logits F\.linear.* got a difference of .*; merge .* pass weight="


class Network(nn.Module):
    """Calls ``function(network, inputs)``."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, inputs: Tensor) -> Any:
        return self.function(self, inputs)


def convolutional(
    function: Callable[[Any, Tensor], Tensor] = lambda n, x: n.head(n.body(x)).mean((2, 3)),
    head: nn.Module | None = None,
) -> Network:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    return Network(function, body=body, head=head or nn.Conv2d(8, 4, 1))


def tied(function: Callable[[Any, Tensor], Tensor]) -> Network:
    """A vocabulary of 4 words of which the features predict one."""
    torch.manual_seed(0)
    return Network(function, body=nn.Linear(6, 8), embedding=nn.Embedding(4, 8))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (convolutional, IMAGES),
        (lambda: convolutional(head=nn.Conv2d(8, 4, 1, bias=False)), IMAGES),
        (
            lambda: convolutional(lambda n, x: n.head(n.body(x).mean((2, 3), True)).flatten(1)),
            IMAGES,
        ),
        (lambda: convolutional(lambda n, x: n.head(n.body(x))[:, :, 1, 0]), IMAGES),
        (
            lambda: Network(
                lambda n, x: n.head(n.body(x).unsqueeze(2)).squeeze(2),
                body=nn.Linear(6, 8),
                head=nn.Conv1d(8, 4, 1),
            ),
            INPUTS,
        ),
    ],
)
def test_a_convolution_of_size_one_is_a_head(make, inputs) -> None:
    torch.manual_seed(0)
    network = make()
    expected = expected_choice(network(inputs), network.head.weight.flatten(1), 7)
    assert torch.equal(select_batch(network, inputs, 7), expected)
    assert torch.equal(select_batch(network, inputs, 7, head=network.head), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: n.head(n.body(x)).amax((2, 3)),
        lambda n, x: n.head(n.body(x)).relu().mean((2, 3)),
        lambda n, x: n.head(n.body(x)).sum((2, 3)),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_whose_maps_become_something_else_is_refused(function, stride) -> None:
    torch.manual_seed(0)
    network = convolutional(function, nn.Conv2d(8, 4, 1, stride=stride))
    for head in (None, network.head):
        with pytest.raises(ValueError, match=REFUSED):
            select_batch(network, IMAGES, 7, head=head)


@pytest.mark.parametrize("layer", [nn.Conv2d(8, 4, 3), nn.Conv2d(8, 4, 1, groups=2)])
def test_other_convolutions_are_refused(layer) -> None:
    network = convolutional(head=layer)
    with pytest.raises(
        ValueError, match=r"head: expected .* kernel size 1 and one group, got .*we"
    ):
        select_batch(network, IMAGES, 7, head=layer)
    with pytest.raises(ValueError, match="no linear layer has 4 outputs"):
        select_batch(network, IMAGES, 7)


@pytest.mark.parametrize(
    "function",
    [
        lambda n, x: F.linear(n.body(x), n.embedding.weight),
        lambda n, x: F.linear(n.body(x), weight=n.embedding.weight),
        lambda n, x: n.body(x) @ n.embedding.weight.T,
        lambda n, x: torch.matmul(n.body(x), n.embedding.weight.t()),
        lambda n, x: n.body(x).mm(n.embedding.weight.mT),
        lambda n, x: (
            (n.embedding(torch.ones(3, dtype=torch.int64)), n.body(x))[1] @ n.embedding.weight.T
        ),
        lambda n, x: F.linear(n.body(x), n.embedding.weight).log_softmax(1),
    ],
)
def test_a_tied_embedding_is_a_head(function) -> None:
    network = tied(function)
    expected = expected_choice(network(INPUTS), network.embedding.weight, 7)
    assert torch.equal(select_batch(network, INPUTS, 7), expected)
    assert torch.equal(select_batch(network, INPUTS, 7, head=network.embedding), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda n, x: 2 * F.linear(n.body(x), n.embedding.weight), REFUSED),
        (lambda n, x: F.linear(n.body(x), F.normalize(n.embedding.weight)), "got 0 calls; .*we"),
        (lambda n, x: torch.einsum("bd,cd->bc", n.body(x), n.embedding.weight), "got 0 calls"),
        (lambda n, x: F.linear(n.body(x), n.embedding.weight, torch.arange(4.0)), REFUSED),
    ],
)
def test_a_tied_embedding_that_cannot_be_followed_is_refused(function, message) -> None:
    network = tied(function)
    with pytest.raises(ValueError, match=message):
        select_batch(network, INPUTS, 7, head=network.embedding)


def test_a_square_embedding_times_its_untransposed_weight_is_not_mistaken() -> None:
    torch.manual_seed(0)
    network = Network(lambda n, x: n.body(x) @ n.embedding.weight, body=nn.Linear(6, 4))
    network.embedding = nn.Embedding(4, 4)
    with pytest.raises(ValueError, match="got 0 calls"):
        select_batch(network, INPUTS, 7, head=network.embedding)


def test_a_linear_layer_with_the_weight_of_an_embedding_is_found() -> None:
    network = tied(lambda n, x: n.lm_head(n.body(x)))
    network.lm_head = nn.Linear(8, 4, bias=False)
    network.lm_head.weight = network.embedding.weight
    expected = expected_choice(network(INPUTS), network.embedding.weight, 7)
    assert torch.equal(select_batch(network, INPUTS, 7), expected)


Two = namedtuple("Two", ["hidden", "scores"])


@pytest.mark.parametrize(
    ("form", "output"),
    [
        (lambda h, z: (h, z), 1),
        (lambda h, z: [h, z], -1),
        (lambda h, z: {"hidden": h, "scores": z}, "scores"),
        (lambda h, z: OrderedDict(scores=z), "scores"),
        (lambda h, z: {0: h, 1: z}, 1),
        (lambda h, z: Two(h, z), 1),
        (lambda h, z: Two(h, z), "scores"),
        (lambda h, z: SimpleNamespace(scores=z, logits=-z), "scores"),
        (lambda h, z: SimpleNamespace(logits=z), None),
        (lambda h, z: {"logits": z, "hidden": h}, None),
    ],
)
@pytest.mark.parametrize("by_head", [False, True])
def test_the_place_of_the_logits_is_named(form, output, by_head) -> None:
    network = BodyAndHead(lambda n, x: form(n.body(x), n.head(n.body(x))))
    logits = network.head(network.body(INPUTS))
    head = network.head if by_head else None
    chosen = select_batch(network, INPUTS, 7, output=output, head=head)
    assert torch.equal(chosen, expected_choice(logits, network.head.weight, 7))


@pytest.mark.parametrize(
    ("result", "output", "message"),
    [
        ((INPUTS, INPUTS), None, r"got tuple; return one .*, or name its position with output="),
        ({"out": INPUTS}, None, r"got dict; .* not only \['out'\], or name their key with output="),
        ((INPUTS,), 1, "output: expected a position, .* a tuple of 1 elements, got 1"),
        ({"out": INPUTS}, "logits", r"output: .* a dict with \['out'\], got 'logits'"),
        ((INPUTS,), "out", "output: .* a tuple of 1 elements, got 'out'"),
        (INPUTS, "out", "output: .* a Tensor, got 'out'"),
        (("text", INPUTS), 0, "network: expected logits .*, got str"),
    ],
)
def test_an_output_without_logits_says_what_to_pass(result, output, message) -> None:
    with pytest.raises(TypeError, match=message):
        select_batch(BodyAndHead(lambda n, x: result), INPUTS, 7, output=output)


def test_a_score_is_that_of_the_weight() -> None:
    torch.manual_seed(0)
    network = convolutional()
    scores = score_batch(network, IMAGES)
    weight, logits = network.head.weight.flatten(1).double(), network(IMAGES).double()
    first, second = logits.topk(2, 1).indices.unbind(1)
    rows = torch.arange(40)
    expected = (logits[rows, first] - logits[rows, second]) / (weight[first] - weight[second]).norm(
        dim=1
    )
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert not scores.requires_grad
