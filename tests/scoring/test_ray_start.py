"""A Ray that starts with a run of the engine Ray, and ends with it."""

import signal
from pathlib import Path

import pytest

from helpers.processes import alive, python, wait_until
from helpers.scoring_runs import digests, waiting
from marginops.scoring import Scorer, score_files

pytest.importorskip("ray")

from helpers.ray_runs import TESTS, parent, write_data

pytestmark = pytest.mark.slow
SCRIPT = """
import sys
from pathlib import Path
import ray
from helpers.scoring_runs import WaitingScorer
from marginops.scoring import Scorer, score_files

folder = Path(sys.argv[1])

def run(kind, name):
    scorer = kind(folder / "data" / "head.safetensors", target="label", id="id")
    if kind is WaitingScorer:
        scorer.behind(folder / "gate", 0)
    score_files(folder / "data", scorer, folder / name, engine="ray", workers=1)

run(Scorer, "whole")
assert not ray.is_initialized()
run(WaitingScorer, "interrupted")
"""


def test_ray_starts_and_ends_with_a_run_also_by_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data", files=1, rows=2000)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gate = tmp_path / "gate"
    process = python(SCRIPT, tmp_path)
    wait_until(lambda: not alive(process.pid) or (gate.exists() and waiting(gate) != []))
    actors = waiting(gate) if gate.exists() else []
    raylets = [parent(actor) for actor in actors]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()

    assert process.returncode == -signal.SIGINT, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")
    wait_until(lambda: not any(alive(ended) for ended in [*actors, *raylets]))
    assert output == ""
    # Neither a bar nor a plan of Ray Data.
    assert "Dataset" not in errors

    scorer = Scorer(tmp_path / "data" / "head.safetensors", target="label", id="id")
    score_files(tmp_path / "data", scorer, tmp_path / "local", workers=1)
    assert digests(tmp_path / "whole") == digests(tmp_path / "local")
