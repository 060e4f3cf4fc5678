"""One sampler in five hosts visits the same samples, also after a kill and on other ranks.

Each training runs in real processes, which kill themselves in the middle of a step.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.hosts.run import BATCH, SAMPLES, STEPS, VISITED, Run
from helpers.processes import INSTALLED
from helpers.seen import seen

HOSTS = ["loop", "loop:0", "loop:2", "accelerate", "transformers", "lightning"]
Steps = dict[int, list[int]]


@pytest.fixture(scope="module", autouse=True)
def _start() -> Iterator[None]:
    """The processes are copies of one that has imported everything."""
    seen([0.0])  # this process compiles the kernels first, so that no rank waits for another
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"helpers.hosts.{host}" for host in HOSTS if ":" not in host])
    tests = str(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{INSTALLED}:{tests}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """What one process visits that is never killed."""
    return Run("loop", 1, tmp_path_factory.mktemp("alone") / "run")()


def test_one_process_visits_what_it_should(alone: Steps) -> None:
    assert [*alone] == [*range(1, STEPS + 1)]
    size = VISITED // BATCH
    epochs = [
        [sample for step in range(first, first + size) for sample in alone[step]]
        for first in range(1, STEPS, size)
    ]
    assert all(len(set(epoch)) == VISITED for epoch in epochs)
    assert {*epochs[0], *epochs[1]} == {*range(SAMPLES)}  # samples that were never seen come first
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == len(epochs)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_a_host_goes_on_after_kills_on_any_number_of_ranks(
    host: str, alone: Steps, tmp_path: Path
) -> None:
    whole = Run(host, 2, tmp_path / "whole")()
    assert whole == alone

    first = Run(host, 2, tmp_path / "first", save_at=4, die_at=6)
    assert first() == {step: alone[step] for step in range(1, 7)}
    on_two = Run(host, 2, tmp_path / "on-two", resume=(first.folder, 4))()
    assert on_two == {step: alone[step] for step in range(5, STEPS + 1)}

    # Step 9 ends an epoch.
    second = Run(host, 1, tmp_path / "second", resume=(first.folder, 4), save_at=9, die_at=11)
    assert second() == {step: alone[step] for step in range(5, 12)}
    last = Run(host, 2, tmp_path / "last", resume=(second.folder, 9))()
    assert last == {step: alone[step] for step in range(10, STEPS + 1)}
