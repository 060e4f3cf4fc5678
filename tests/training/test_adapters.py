"""Heads under PEFT: the scores are those of the merged weight, or there is a clear error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import marginops
from marginops.training import report_epoch, score_batch, select_batch

peft = pytest.importorskip("peft")

CLASSES, WIDTH = 5, 16
INPUTS = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classifier(self.body(inputs).relu())


def adapted(*targets: str, trained: bool = True, **options: Any) -> Any:
    """A network under LoRA, after some training: all adapters have an effect."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), **options)
    network = peft.get_peft_model(Network(), config).eval()
    return train(network) if trained else network


def train(network: Any) -> Any:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter))
    return network


def classifier(network: Any) -> Any:
    return network.base_model.model.classifier


def assert_scores_of(network: Any, weight: Tensor, **options: Any) -> None:
    with torch.no_grad():
        logits = network(INPUTS)
        expected = marginops.minimal_margin_score(logits, weight.detach())
    torch.testing.assert_close(score_batch(network, INPUTS, **options), expected)
    scores = score_batch(network, logits=logits, **options)
    torch.testing.assert_close(scores, expected)
    chosen = select_batch(network, INPUTS, k=6, **options)
    assert chosen.tolist() == expected.argsort(stable=True)[:6].tolist()


def merged_weight(layer: Any, name: str = "default") -> Tensor:
    up, down = layer.lora_B[name].weight, layer.lora_A[name].weight
    return layer.base_layer.weight + layer.scaling[name] * up @ down


def test_trained_copy_of_the_head() -> None:
    network = adapted("body", modules_to_save=["classifier"])
    copy = classifier(network).modules_to_save["default"]
    original = classifier(network).original_module
    assert not torch.equal(copy.weight, original.weight)
    assert_scores_of(network, copy.weight)
    with network.disable_adapter():
        assert_scores_of(network, original.weight)
    assert_scores_of(network, copy.weight)
    network.merge_adapter()
    assert_scores_of(network, copy.weight)


def test_head_that_is_passed_is_checked_again_if_adapters_change() -> None:
    network = adapted("body", modules_to_save=["classifier"])
    head = classifier(network).modules_to_save["default"]
    assert_scores_of(network, head.weight, head=head)
    with (
        network.disable_adapter(),
        pytest.raises(ValueError, match=r"^head: expected network to call this layer"),
    ):
        score_batch(network, INPUTS, head=head)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}]
)
def test_lora_on_the_head(options: dict[str, Any], trained: bool) -> None:
    network = adapted("classifier", trained=trained, **options)
    layer = classifier(network)
    assert_scores_of(network, merged_weight(layer))
    assert_scores_of(network, merged_weight(layer), head=layer)
    train(network)  # a check that passed says nothing of the values
    assert_scores_of(network, merged_weight(layer))
    with network.disable_adapter():
        assert_scores_of(network, layer.base_layer.weight)
    weight = merged_weight(layer).detach()
    network.merge_adapter()
    assert_scores_of(network, weight)
    network.unmerge_adapter()
    assert_scores_of(network, merged_weight(layer))
    assert_scores_of(network.merge_and_unload(), weight)


def test_bias_of_lora_counts_in_the_norm() -> None:
    network = adapted("classifier", lora_bias=True)
    layer = classifier(network)
    bias = layer.base_layer.bias + layer.scaling["default"] * layer.lora_B["default"].bias
    weight, logits = merged_weight(layer).detach(), network(INPUTS).detach()
    expected = marginops.minimal_margin_score(logits, weight, bias.detach(), bias_in_norm=True)
    torch.testing.assert_close(score_batch(network, INPUTS, bias_in_norm=True), expected)


def test_several_adapters() -> None:
    network = adapted("classifier")
    layer = classifier(network)
    network.add_adapter("other", peft.LoraConfig(r=2, target_modules=["classifier"]))
    train(network)
    assert_scores_of(network, merged_weight(layer))
    network.set_adapter("other")
    assert_scores_of(network, merged_weight(layer, "other"))
    network.base_model.set_adapter(["default", "other"])
    both = merged_weight(layer) + merged_weight(layer, "other") - layer.base_layer.weight
    assert_scores_of(network, both)


def test_lora_of_as_many_columns_as_classes_is_no_head() -> None:
    network = peft.get_peft_model(
        Network(), peft.LoraConfig(r=CLASSES, target_modules=["body"])
    ).eval()
    assert_scores_of(network, classifier(network).weight)


@pytest.mark.parametrize("trained", [False, True])
def test_dora_is_refused_until_it_is_merged(trained: bool) -> None:
    network = adapted("classifier", use_dora=True, trained=trained)
    for call in (
        lambda: score_batch(network, INPUTS),
        lambda: score_batch(network, logits=torch.randn(4, CLASSES)),
    ):
        with pytest.raises(ValueError, match=r"^head: expected LoRA .* got Dora.*; merge"):
            call()
    network.merge_adapter()
    assert_scores_of(network, classifier(network).base_layer.weight)


def test_other_adapters_are_refused_until_they_are_merged() -> None:
    config = peft.LoHaConfig(r=2, target_modules=["classifier"], init_weights=False)
    network = peft.get_peft_model(Network(), config).eval()
    for call in (
        lambda: score_batch(network, INPUTS),
        lambda: score_batch(network, logits=torch.randn(4, CLASSES)),
    ):
        with pytest.raises(ValueError, match=r"^network: .* got one inside an adapter; merge"):
            call()
    network.merge_adapter()
    assert_scores_of(network, classifier(network).base_layer.weight)


def test_the_layer_inside_lora_is_refused() -> None:
    network = adapted("classifier", trained=False)
    with pytest.raises(ValueError, match=r"^head: expected logits .*merge an adapter"):
        score_batch(network, INPUTS, head=classifier(network).base_layer)


ADAPTED = {
    "LoRA": lambda: adapted("classifier"),
    "copy": lambda: adapted("body", modules_to_save=["classifier"]),
}


@pytest.mark.parametrize("make", ADAPTED.values(), ids=ADAPTED)
def test_normalised_report_needs_a_merged_network(make: Callable[[], Any]) -> None:
    network, target = make(), torch.arange(len(INPUTS)) % CLASSES
    with pytest.raises(ValueError, match=r"^model: .* if one is an adapter, merge it"):
        report_epoch(network, INPUTS, target)
    apart = report_epoch(network, INPUTS, target, log_norm=0)
    network.merge_adapter()
    merged = report_epoch(network, INPUTS, target, log_norm=0)
    torch.testing.assert_close(apart.margins, merged.margins)
    # The merged weight is rounded.
    torch.testing.assert_close(apart.collapse, merged.collapse, rtol=1e-5, atol=1e-6)
    report = report_epoch(network, INPUTS, target)
    expected = report_epoch(make().merge_and_unload(), INPUTS, target)
    torch.testing.assert_close(report.margins, expected.margins)
    torch.testing.assert_close(report.collapse, expected.collapse)


class NextToken(nn.Module):
    """The logits ``[B, C]`` of the token that follows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits[:, -1]


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"target_modules": ["c_attn"]},
        {"target_modules": ["wte"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": ["wte", "lm_head"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_tied_embeddings(options: dict[str, Any] | None) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    head = model.lm_head
    if options is not None:
        model = train(peft.get_peft_model(model, peft.LoraConfig(r=4, **options))).eval()
        head = model.base_model.model.lm_head
    tokens = torch.randint(0, 20, (12, 6))
    network = NextToken(model)
    with torch.no_grad():
        weight = (head(torch.eye(16)) - head(torch.zeros(16, 16))).t()
        expected = marginops.minimal_margin_score(network(tokens), weight)
    torch.testing.assert_close(score_batch(network, tokens), expected, rtol=1e-4, atol=1e-6)
