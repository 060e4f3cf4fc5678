"""Rates of whole networks: known answers, Euler's identity and the scaling of the output."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.homogeneous import Function, checked_rates, seeded
from helpers.models_for_norms import resnet18
from marginops.homogeneity import NotQuasiHomogeneousError, rates

THIRD = 1 / 3


def rows(count=3, columns=4):
    return torch.randn(count, columns, dtype=torch.float64)


def images(count=2, channels=3, size=8):
    return torch.randn(count, channels, size, size, dtype=torch.float64)


def mlp(depth, bias, activation=nn.ReLU):
    layers = [nn.Linear(4, 4, bias=bias)]
    for _ in range(depth - 1):
        layers += [activation(), nn.Linear(4, 4, bias=bias)]
    return seeded(nn.Sequential(*layers))


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_layers_without_bias_share_equally(depth):
    found = checked_rates(mlp(depth, bias=False), rows())
    assert set(found.values()) == {1 / depth}


@pytest.mark.parametrize("depth", [2, 3])
def test_a_bias_has_the_rate_of_its_layers_output(depth):
    found = checked_rates(mlp(depth, bias=True, activation=nn.LeakyReLU), rows())
    for layer in range(depth):
        assert found[f"{2 * layer}.weight"] == 1 / depth
        assert found[f"{2 * layer}.bias"] == (layer + 1) / depth


def test_convolutions_pooling_and_dropout():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Dropout(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.AvgPool2d(2),
        nn.ZeroPad2d(1),
        nn.AdaptiveMaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    found = checked_rates(seeded(network), images())
    assert found == {
        "0.weight": THIRD,
        "0.bias": THIRD,
        "4.weight": THIRD,
        "4.bias": 2 * THIRD,
        "9.weight": THIRD,
        "9.bias": 1.0,
    }


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_only_what_follows_the_last_normalization_grows(norm):
    network = nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), nn.Linear(4, 3))
    found = checked_rates(seeded(network), rows())
    assert {name for name, rate in found.items() if rate} == {"3.weight", "3.bias"}
    assert found["3.weight"] == found["3.bias"] == 1.0


def test_instance_norm_with_and_without_running_statistics():
    for tracked in (False, True):
        norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=tracked)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3))
        found = checked_rates(seeded(network), images())
        assert {name for name, rate in found.items() if rate} == {"3.weight", "3.bias"}


def test_scale_and_shift_of_a_normalization_at_the_end_grow():
    found = checked_rates(seeded(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), rows())
    assert found == {"0.weight": 0.0, "0.bias": 0.0, "1.weight": 1.0, "1.bias": 1.0}


def test_resnet18():
    network = seeded(resnet18(width=4, classes=10))
    found = checked_rates(network, images(size=32))
    assert len(found) == 62
    assert list(found.values()) == [0.0] * 60 + [1.0] * 2


class Residual(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4, bias=bias), nn.Linear(4, 2, bias=bias)
        self.inner, self.outer = nn.Linear(4, 4, bias=bias), nn.Linear(4, 4, bias=bias)

    def forward(self, x):
        x = self.first(x)
        return self.last(x + self.outer(F.relu(self.inner(x))))


def test_a_residual_branch_does_not_grow():
    found = checked_rates(seeded(Residual()), rows())
    assert found == {
        "first.weight": 0.5,
        "last.weight": 0.5,
        "inner.weight": 0.0,
        "outer.weight": 0.0,
    }
    found = checked_rates(seeded(Residual(bias=True)), rows())
    assert {name: rate for name, rate in found.items() if name.endswith("bias")} == {
        "first.bias": 0.5,
        "last.bias": 1.0,
        "inner.bias": 0.5,
        "outer.bias": 0.5,
    }


def test_the_linear_toy_model():
    toy = Function(lambda m, x: m.a * x[:, 0] + m.b * m.c * x[:, 1], a=(), b=(), c=())
    assert checked_rates(toy, rows()) == {"a": 1.0, "b": 0.5, "c": 0.5}


def test_branches_of_different_depth():
    # With r = a + b + c = g and r + d + e = 1, the largest of r, d, e is least at r = d = e.
    branches = Function(
        lambda m, x: (F.relu(x * m.a * m.b) * m.c + x * m.g) * m.d * m.e,
        **dict.fromkeys("abcdeg", (4,)),
    )
    expected = {name: 1 / 9 if name in "abc" else THIRD for name in "abcdeg"}
    assert checked_rates(branches, rows()) == expected


def test_a_shared_parameter_is_counted_at_every_use():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
            self.decoder.weight = self.encoder.weight
            self.last = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            x = F.relu(self.decoder(F.relu(self.encoder(x))))
            return self.last(x) @ self.encoder.weight.t()

    found = checked_rates(seeded(Shared()), rows())
    expected = {"encoder.weight": 0.25, "encoder.bias": 0.25, "decoder.bias": 0.5}
    assert found == {**expected, "last.weight": 0.25}


def test_unused_and_empty_parameters_do_not_grow():
    model = Function(lambda m, x: torch.cat([x * m.used, m.empty], 1), used=(4,), unused=(3,))
    model.register_parameter("empty", nn.Parameter(torch.zeros(3, 0, dtype=torch.float64)))
    assert checked_rates(model, rows()) == {"used": 1.0, "unused": 0.0, "empty": 1.0}
    # An activation that the output does not depend on may be of any kind.
    dead = Function(lambda m, x: (torch.tanh(x * m.b), x * m.a)[1], a=(4,), b=(4,))
    assert checked_rates(dead, rows()) == {"a": 1.0, "b": 0.0}


def test_embedding_with_positions_and_a_class_token():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(12, 3, bias=False)
            self.position = nn.Parameter(torch.zeros(2, 4))
            self.token = nn.Parameter(torch.zeros(1, 1, 4))

        def forward(self, ids):
            x = self.embedding(ids) + self.position
            x = torch.cat([self.token.expand(len(ids), -1, -1), x], dim=1)
            return self.head(F.relu(x).flatten(1))

    found = checked_rates(seeded(Tokens()), torch.tensor([[1, 2], [3, 6]]))
    assert set(found.values()) == {0.5}
    assert len(found) == 4


def test_weight_normalization_puts_the_rate_on_the_length():
    weight_norm = nn.utils.parametrizations.weight_norm
    network = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.ReLU(), weight_norm(nn.Linear(4, 2)))
    found = checked_rates(seeded(network), rows())
    for layer, bias in (("0", 0.5), ("2", 1.0)):
        assert found[f"{layer}.bias"] == bias
        assert found[f"{layer}.parametrizations.weight.original0"] == 0.5
        assert found[f"{layer}.parametrizations.weight.original1"] == 0.0


def test_spectral_normalization_leaves_the_other_layers():
    spectral_norm = nn.utils.parametrizations.spectral_norm
    network = seeded(nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)))
    found = checked_rates(network, rows())
    assert [name for name, rate in found.items() if rate] == ["2.weight", "2.bias"]
    both = nn.Sequential(spectral_norm(nn.Linear(4, 4)), spectral_norm(nn.Linear(4, 2)))
    with pytest.raises(NotQuasiHomogeneousError, match=r"linear at 1 \(torch\.nn\.Linear\), does"):
        rates(seeded(both), rows())


def test_low_rank_update_of_a_weight():
    # The weight is part of a sum of parameters that multiplies the input: it counts as a factor.
    adapted = Function(
        lambda m, x: F.relu(x @ (m.w + m.a @ m.b)) @ m.v, w=(4, 4), a=(4, 2), b=(2, 4), v=(4, 2)
    )
    assert checked_rates(adapted, rows()) == {"w": 0.5, "a": 0.25, "b": 0.25, "v": 0.5}


def test_modes_are_restored_and_nothing_is_changed():
    network = mlp(2, bias=True)
    network.append(nn.Sequential(nn.BatchNorm1d(4).double(), nn.Dropout()))
    network.train()
    network[3][0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    rates(network, rows())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    network.append(nn.Tanh())
    with pytest.raises(NotQuasiHomogeneousError):
        rates(network, rows())
    assert [module.training for module in network.modules()][:-1] == modes
