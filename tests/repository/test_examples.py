"""Every example is short, says how to run it, runs, and prints what is true."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marginops

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
NAMES = [path.name for path in EXAMPLES]


@functools.cache
def output(name: str) -> str:
    """What the example prints with the package that is tested here."""
    path = next(path for path in EXAMPLES if path.name == name)
    package = str(Path(marginops.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, path],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"\n    python examples/{path.name}\n" in (ast.get_docstring(ast.parse(text)) or "")


@pytest.mark.parametrize("name", NAMES)
def test_example_prints_sentences(name: str) -> None:
    lines = output(name).splitlines()
    assert lines and all(line.endswith(".") for line in lines)


def test_selection_trains_as_well_as_uniform_batches_do() -> None:
    text = output("train_with_selection.py")
    uniform = float(re.search(r"with uniform batches: (.*) %", text)[1])
    selected = float(re.search(r"with minimal-margin batches: (.*) %", text)[1])
    better, seeds = map(int, re.search(r"better for (\d+) of (\d+) seeds", text).groups())
    assert min(uniform, selected) > 90
    assert 0 <= better <= seeds
    # If one way is better for every seed, its mean is higher.
    assert better not in (0, seeds) or (selected > uniform) == (better == seeds)


def test_hardest_samples_have_wrong_labels() -> None:
    text = output("find_hard_samples.py")
    wrong = int(re.search(r"(\d+) of the \d+ labels are wrong", text)[1])
    found = [int(count) for count in re.findall(r", (\d+) have a wrong label", text)]
    assert len(found) == 3
    # By chance it would be one of them.
    assert all(wrong / 2 < count <= wrong for count in found)
    median, low, high = map(
        float, re.search(r"exceed (.*); 90 % lie between (.*) and (.*)\.", text).groups()
    )
    assert low < median < high


def test_training_by_margin_visits_as_many_samples() -> None:
    text = output("train_faster.py")
    lines = re.findall(r"after (\d+) visits by \w+: (.*) %", text)
    # Six epochs of all samples, and fifteen of 40 %.
    assert [int(visits) for visits, _ in lines] == [6 * 1347, 15 * 539]
    assert all(float(accuracy) > 90 for _, accuracy in lines)


def test_suspicious_samples_have_wrong_labels() -> None:
    text = output("find_mislabelled.py")
    found = int(re.search(r"samples, (\d+) have a wrong label", text)[1])
    # By chance it would be 18.
    assert 150 < found <= 180
    wrong, others = map(float, re.findall(r" is (\d\.\d\d)\.", text))
    assert wrong < 0.2 < 0.6 < others


def test_fine_tuning_raises_the_log_probability_of_tokens() -> None:
    text = output("finetune_tokens.py")
    before, after = map(float, re.findall(r"byte of unseen code is (-.*)\.", text))
    guesses = [int(share) for share in re.findall(r"(\d+) % have the largest logit", text)]
    entropies = [float(nats) for nats in re.findall(r"entropy is (.*) nats", text)]
    assert after > before + 0.3
    assert guesses[1] > guesses[0] + 5
    assert 0 < entropies[1] < entropies[0]
    assert float(re.search(r"with logits differs by (.*)\.", text)[1]) < 1e-5


def test_large_head_needs_no_logits_and_chooses_the_same() -> None:
    text = output("large_head.py")
    fused, eager = map(int, re.findall(r"need (\d+) MiB", text))
    same, chosen = map(int, re.search(r"(\d+) of the (\d+) chosen samples", text).groups())
    assert fused < 128 < 250 <= eager
    assert same == chosen
    assert float(re.search(r"losses differ by (.*) at most", text)[1]) < 1e-10


def test_suspicious_rows_have_wrong_labels() -> None:
    text = output("score_a_million_rows.py")
    assert text.startswith("1,000,000 rows have a score.\n")
    found = int(re.search(r"1,000 most suspicious labels, ([\d,]+) are", text)[1].replace(",", ""))
    assert found > 900  # by chance it would be 2
    visited, kept = (
        int(number.replace(",", ""))
        for number in re.search(r"draws ([\d,]+) of the ([\d,]+) other rows", text).groups()
    )
    assert 19_000 <= kept <= 20_000
    assert visited == -(-kept * 2 // 5)
