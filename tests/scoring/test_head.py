"""Heads from files and functions, and every file that holds none."""

from __future__ import annotations

import contextlib
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import scored_heads as heads
from marginops.scoring import DataError, Scorer
from marginops.scoring.head import Head, load_head

WEIGHT, BIAS = torch.arange(6.0).view(2, 3), torch.tensor([1.0, -1.0])


def save(path: Path, tensors: Any, form: str) -> str:
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    return str(path)


def assert_head(head: Head, weight: Tensor = WEIGHT, bias: Tensor | None = BIAS) -> None:
    torch.testing.assert_close(head.weight, weight, rtol=0, atol=0)
    if bias is None:
        assert head.bias is None
    else:
        torch.testing.assert_close(head.bias, bias, rtol=0, atol=0)
    assert head.weight.is_contiguous()
    assert not head.weight.requires_grad


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / "head"
    assert_head(load_head(save(path, {"weight": WEIGHT, "bias": BIAS}, form), None))
    assert_head(load_head(save(path, {"fc.weight": WEIGHT}, form), None), bias=None)
    several = {
        "module.embed.weight": torch.ones(9, 3),
        "module.norm.weight": torch.ones(3),
        "module.classifier.weight": WEIGHT,
        "module.classifier.bias": BIAS,
    }
    save(path, several, form)
    assert_head(load_head(str(path), "module.classifier"))
    listed = "got 'module.embed' [9, 3], 'module.classifier' [2, 3]; pass layer=, the name of one"
    if form == "safetensors":  # sorted by their names
        listed = "'module.classifier' [2, 3]"
    for layer in (None, "classifier", "module", "module.norm"):
        with pytest.raises(DataError, match=re.escape(listed)):
            load_head(str(path), layer)
    with pytest.raises(DataError, match=re.escape(str(path))):
        load_head(str(path), None)


def test_checkpoints_that_nest_their_state(tmp_path: Path) -> None:
    state = OrderedDict({"net.fc.weight": WEIGHT, "net.fc.bias": BIAS})
    optimizer = {"state": {0: {"exp_avg": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]}
    path = save(tmp_path / "a", {"state_dict": state, "epoch": 3, "optimizer": optimizer}, "zip")
    assert_head(load_head(path, None))
    assert_head(load_head(path, "state_dict.net.fc"))
    assert_head(load_head(save(tmp_path / "b", WEIGHT, "zip"), None), bias=None)


@pytest.mark.parametrize("form", ["safetensors", "zip"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_becomes_float32(form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"weight": WEIGHT.to(dtype), "bias": BIAS.to(dtype)}
    head = load_head(save(tmp_path / "a", tensors, form), None)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert_head(head, WEIGHT.to(wide), BIAS.to(wide))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_a_file_that_runs_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": WEIGHT, "evil": Evil()}, tmp_path / "a.pt")
    torch.save(nn.Linear(3, 2), tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    for name in ("a.pt", "b.pt", "c.pt"):
        with pytest.raises(DataError, match="head: expected a file of tensors, which torch"):
            load_head(str(tmp_path / name), None)
    assert capsys.readouterr().out == ""


def test_files_that_are_no_heads(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.safetensors", {"weight": WEIGHT}, "safetensors")
    zipped = save(tmp_path / "whole.pt", {"weight": torch.ones(300, 300)}, "zip")
    cut = {}
    for path, size in ((whole, 80), (whole, 12), (zipped, 2000), (zipped, 9), (zipped, 0)):
        cut[size] = tmp_path / f"{size}.cut"
        cut[size].write_bytes(Path(path).read_bytes()[:size])
    (tmp_path / "text").write_text("weight = 3\n")
    for path in (*cut.values(), tmp_path / "text"):
        with pytest.raises(DataError, match=f"head: expected .*got {re.escape(str(path))} "):
            load_head(str(path), None)
    damaged = bytearray(Path(save(tmp_path / "legacy", {"weight": WEIGHT}, "legacy")).read_bytes())
    for place in range(0, len(damaged), 7):
        for value in (0, ord("."), 255):
            path = tmp_path / "damaged"
            path.write_bytes(damaged[:place] + bytes([value]) + damaged[place + 1 :])
            with contextlib.suppress(DataError):
                load_head(str(path), None)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match="head: expected a file that can be read, got "):
            load_head(str(path), None)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": WEIGHT.long()}, "expected a floating-point tensor weight [C >= 2, D >= 1] wit"),
        ({"weight": torch.full((2, 3), torch.nan)}, "expected finite values in weight [C >= 2, D"),
        ({"weight": WEIGHT, "bias": torch.tensor([0, torch.inf])}, "expected finite values in bia"),
        ({"weight": torch.full((2, 3), 1e300, dtype=torch.float64), "bias": BIAS}, None),
        ({"weight": torch.ones(1, 3)}, "expected weight [C >= 2, D >= 1], got [1, 3]"),
        ({"weight": torch.ones(2, 0)}, "expected weight [C >= 2, D >= 1], got [2, 0]"),
        ({"weight": WEIGHT, "bias": torch.ones(3)}, "expected bias [2] for weight [2, 3], got [3]"),
        ({"weight": WEIGHT, "bias": torch.ones(2, 1)}, "expected bias [2] for weight [2, 3], got "),
        ({"fc.weight": WEIGHT, "fc.scale": BIAS}, "expected weight and bias alone in the layer 'f"),
        ({"weight": WEIGHT, "scale": BIAS}, "expected weight and bias alone in the layer '' of"),
        ({"W": WEIGHT, "b": BIAS}, "expected one layer with a matrix named NAME.weight in"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["safetensors", "zip"])
def test_tensors_that_are_no_head(
    tensors: dict[str, Tensor], message: str | None, form: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a", tensors, form)
    if message is None:
        assert load_head(path, None).weight.dtype == torch.float64
        return
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_head(path, None)
    assert path in str(error.value)


@pytest.mark.parametrize(
    "source", [heads.linear, heads.pair, heads.network, "helpers.scored_heads:linear"]
)
def test_functions(source: Any) -> None:
    layer = heads.linear()
    assert_head(load_head(source, None), layer.weight.detach(), layer.bias.detach())


def test_layers_of_modules() -> None:
    assert load_head(heads.two_layers, "1").weight.shape == (2, 4)
    for layer in (None, "2"):
        with pytest.raises(
            ValueError, match=re.escape("returns, got '0' [4, 3], '1' [2, 4]; pass")
        ):
            load_head(heads.two_layers, layer)
    for layer in (None, "fc"):
        with pytest.raises(TypeError, match="to return a torch"):
            load_head(heads.number if layer is None else heads.pair, layer)
    with pytest.raises(TypeError, match="head: expected a function without arguments, got helpers"):
        load_head(heads.needs_an_argument, None)


def test_the_width_of_another_head_names_both(tmp_path: Path) -> None:
    path = save(tmp_path / "head.pt", {"fc.weight": WEIGHT}, "zip")
    with pytest.raises(DataError, match=re.escape(
        f"column: expected rows of 3 values in 'embedding', the width of the head {path}, got 4"
    )):  # fmt: skip
        Scorer(path)({"embedding": torch.ones(2, 4)})


def test_a_path_stays_that_of_the_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "head.pt", {"fc.weight": WEIGHT}, "zip")
    monkeypatch.chdir(tmp_path)
    scorer = Scorer("head.pt")
    monkeypatch.chdir("/")
    assert scorer.num_classes == 2


def test_a_model_that_was_saved_as_an_object_is_named(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2), tmp_path / "model.pt")
    message = (
        r"got \S+/model.pt \(it holds a torch.nn.modules.linear.Linear\); save model.state_dict"
    )
    with pytest.raises(DataError, match=message):
        load_head(tmp_path / "model.pt", None)
