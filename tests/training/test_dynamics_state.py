"""The state of TrainingDynamics: dictionaries, copies, files, and merging."""

import copy
import errno
import fcntl
import io
import os
import pickle
import re
import subprocess
import sys

import pytest
import torch

from helpers.dynamics_batches import assert_same_dynamics, batches
from helpers.rounding import assert_same
from marginops.training import TrainingDynamics

SAMPLES = 30


def trained(seed=0, count=8, **options):
    dynamics = TrainingDynamics(SAMPLES, **options)
    for batch in batches(SAMPLES, count, 7, seed):
        dynamics.update(*batch)
    return dynamics


def with_weights():
    dynamics = trained()
    dynamics.weights = torch.rand(SAMPLES)
    dynamics.weights[3] = torch.inf
    dynamics.weights_version = 4
    return dynamics


def test_a_state_goes_through_a_file_and_goes_on(device):
    before, after = with_weights(), TrainingDynamics(SAMPLES, device=device)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    after.load_state_dict(state)
    assert_same_dynamics(before, after)
    unseen = before._state.last_seen == -1
    assert torch.equal(after._state.last_seen.cpu() == -1, unseen) and unseen.any()
    for value in (state["values"], state["weights"]):
        value.zero_()  # the dynamics have copies
    for batch in batches(SAMPLES, 5, 7, seed=3):
        before.update(*batch)
        after.update(*(value.to(device) for value in batch))
    assert_same_dynamics(before, after)
    assert after.weights_version == 4 and after.weights[3] == torch.inf


def test_a_state_dict_is_a_copy():
    dynamics = with_weights()
    state = dynamics.state_dict()
    before = copy.deepcopy(state)
    dynamics.weights[0] = 7
    for batch in batches(SAMPLES, 2, 7, seed=9):
        dynamics.update(*batch)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert_same(value, before[name])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda value: pickle.loads(pickle.dumps(value))]
)
def test_copies_go_their_own_way(duplicate):
    dynamics = with_weights()
    other = duplicate(dynamics)
    assert_same_dynamics(dynamics, other)
    other.update(*batches(SAMPLES, 1, 7, seed=5)[0])
    assert (other.num_updates, dynamics.num_updates) == (9, 8)


def changed(name, change):
    def damage(state):
        state[name] = change(state[name])

    return damage


def at(name, place, value):
    def damage(state):
        state[name][place] = value

    return damage


DAMAGES = {
    "expected version 1, got None": lambda state: state.pop("version"),
    "expected version 1, got 2": changed("version", lambda _: 2),
    "expected the keys": lambda state: state.pop("counts"),
    "expected the keys .* more": lambda state: state.update(more=1),
    "expected num_samples 30, got 31": changed("num_samples", lambda n: n + 1),
    "expected decay 0.5, got 0.9": changed("decay", lambda _: 0.9),
    r"values as a tensor \[30, 8\] of torch.float32, got list": changed("values", list),
    r"values .* got \[30, 8\] of torch.float64": changed("values", torch.Tensor.double),
    r"counts .* got \[29, 4\] of torch.int32": changed("counts", lambda v: v[1:]),
    r"last_step .* got \[30\] of torch.int32": changed("last_step", torch.Tensor.int),
    r"totals .* got \[3\] of torch.int64": changed("totals", lambda v: torch.cat((v, v[:1]))),
    r"weights .* got \[29\] of torch.float32": changed("weights", lambda v: v[1:]),
    "weights_version as an int >= -1, got -2": changed("weights_version", lambda _: -2),
    "weights_version as an int >= -1, got True": changed("weights_version", lambda _: True),
    "weights >= 0, which fails at index 5": at("weights", 5, -1.0),
    "weights >= 0, which fails at index 6": at("weights", 6, torch.nan),
    "totals >= 0": at("totals", 1, -1),
    r"last_step in \[-1, 8\), which fails at index 2": at("last_step", 2, 8),
    r"last_step in \[-1, 8\), which fails at index 3": at("last_step", 3, -2),
    "counts >= 0": at("counts", (4, 1), -1),
    "no visits of samples that were never seen": at("last_step", 4, -1),
    "no more correct visits than visits": at("counts", 4, torch.tensor([0, 1, 0, 0])),
    "learnt no more often than correct": at("counts", 4, torch.tensor([1, 0, 1, 0])),
    "forgotten no more often than not correct": at("counts", 4, torch.tensor([1, 1, 1, 1])),
    "forgotten as often as learnt": at("counts", 4, torch.tensor([2, 0, 0, 1])),
    "a squared deviation >= 0": at("values", (4, 6), -0.1),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(message):
    state, dynamics = with_weights().state_dict(), trained(seed=1)
    state["last_step"][4] = 7
    DAMAGES[message](state)
    before = dynamics.state_dict()
    with pytest.raises(ValueError, match=f"state_dict: .*{message}"):
        dynamics.load_state_dict(state)
    for name, value in dynamics.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert_same(value, before[name])
    assert dynamics.weights is None and dynamics.weights_version == -1
    with pytest.raises(TypeError, match="state_dict: expected a mapping, got list"):
        dynamics.load_state_dict([state])


def test_a_file_is_made_once_and_opened_again(tmp_path):
    path, plain = tmp_path / "state", trained()
    mapped = trained(path=path)
    assert_same_dynamics(mapped, plain)
    assert path.stat().st_size == 4096 + 56 * SAMPLES
    copied = copy.deepcopy(mapped)  # in memory
    with pytest.raises(BlockingIOError, match=r"path: expected a file that nobody has open"):
        TrainingDynamics.open(path)
    with pytest.raises(FileExistsError, match=r"path: expected a new file, .*TrainingDynamics.op"):
        TrainingDynamics(SAMPLES, path=path)
    del mapped
    opened = TrainingDynamics.open(path)
    assert_same_dynamics(opened, plain)
    for dynamics in (opened, plain, copied):
        for batch in batches(SAMPLES, 4, 7, seed=2):
            dynamics.update(*batch)
    assert_same_dynamics(opened, plain)
    assert_same_dynamics(copied, plain)
    opened.load_state_dict(trained(seed=8).state_dict())
    del opened
    assert_same_dynamics(TrainingDynamics.open(str(path)), trained(seed=8))


def test_a_file_that_is_no_whole_state_is_refused(tmp_path):
    path = tmp_path / "state"
    trained(path=path)
    good = path.read_bytes()
    cases = {
        "got another file": b"",
        "got another file, or one whose creation was interrupted": b"\0" * 16 + good[16:],
        "got version 7, and this release reads version 1": good[:16] + b"\7" + good[17:],
        "damaged header with num_samples=0": good[:24] + b"\0" * 8 + good[32:],
        "got 5775 bytes, and 30 samples take 5776": good[:-1],
        "got 5777 bytes, and 30 samples take 5776": good + b"\0",
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"path: expected a file of Train.*{message}"):
            TrainingDynamics.open(path)
    path.write_bytes(good)
    assert_same_dynamics(TrainingDynamics.open(path), trained())
    with pytest.raises(FileNotFoundError):
        TrainingDynamics.open(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"device: expected cpu for a state in a file, got meta"):
        TrainingDynamics(SAMPLES, path=tmp_path / "other", device="meta")


def test_a_creation_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        TrainingDynamics(SAMPLES, path=tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_the_file_holds_what_a_killed_process_wrote(tmp_path):
    path = tmp_path / "state"
    code = (
        "import os, sys, torch\n"
        "from marginops.training import TrainingDynamics\n"
        f"dynamics = TrainingDynamics(5, path={str(path)!r})\n"
        "dynamics.update(torch.tensor([3]), torch.tensor([[2.0, 0.5]]), torch.tensor([0]))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    dynamics = TrainingDynamics.open(path)
    assert dynamics.margin[3] == 1.5 and dynamics.num_updates == 1


def test_merged_runs_with_other_samples_are_one_run(device):
    whole = trained(count=9)
    parts = TrainingDynamics(SAMPLES, device=device), TrainingDynamics(SAMPLES)
    for indices, logits, target in batches(SAMPLES, 9, 7):
        for part, own in zip(parts, (indices % 2 == 0, indices % 2 == 1), strict=True):
            labels = torch.where(own, target, -100)
            part.update(indices, logits.to(part.device), labels.to(part.device))
    parts[0].merge(parts[1])
    assert_same_dynamics(parts[0], whole)


def one_run(histories, steps=0):
    """Dynamics whose sample i is correct or not as its history says, one update for each visit."""
    dynamics = TrainingDynamics(len(histories), decay=0.0)
    dynamics._state.totals[0] = steps
    random = torch.Generator().manual_seed(steps)
    for visit in range(max(map(len, histories))):
        indices = [i for i, history in enumerate(histories) if len(history) > visit]
        size = 0.1 + torch.rand(len(indices), generator=random)
        right = torch.tensor([histories[i][visit] for i in indices])
        logits = torch.stack((torch.where(right == 1, size, -size), torch.zeros(len(indices))), 1)
        zeros = torch.zeros(len(indices), dtype=torch.int64)
        dynamics.update(torch.tensor(indices), logits, zeros)
        yield indices, logits
    yield dynamics


def test_merged_visits_of_the_same_samples_are_one_history():
    before = [[0, 1], [1], [0], [0, 1, 0], [1, 0], [1], [], [0, 1, 0, 1]]
    after = [[1, 1], [0, 0], [1], [0], [1, 1], [], [1, 1], [0]]  # each begins as it goes on
    *first, early = one_run(before)
    *second, late = one_run(after, steps=len(first))
    whole = TrainingDynamics(len(before), decay=0.0)
    for indices, logits in first + second:
        zeros = torch.zeros(len(indices), dtype=torch.int64)
        whole.update(torch.tensor(indices), logits, zeros)
    for one, other in ((early, late), (late, early)):
        merged = copy.deepcopy(one)
        merged.merge(other)
        for name in ("count", "forgetting", "learnt", "last_step", "correctness"):
            assert_same(getattr(merged, name), getattr(whole, name))
        for name in ("margin", "score", "loss", "margin_average"):
            assert_same(getattr(merged, name), getattr(whole, name))
        for name in ("aum", "confidence", "variability", "el2n"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name))
        assert merged.num_updates == whole.num_updates
        merged.load_state_dict(merged.state_dict())  # a merged state is a whole state


def test_a_state_may_have_more_visits_than_steps():
    """So it is after the merge of two runs that visit every sample at every step."""
    runs = TrainingDynamics(20), TrainingDynamics(20)
    random = torch.Generator().manual_seed(0)
    for run in runs * 4:
        logits = torch.randn(20, 2, generator=random)
        run.update(torch.arange(20), logits, torch.zeros(20, dtype=torch.int64))
    runs[0].merge(runs[1])
    assert runs[0].count.tolist() == [8] * 20 and runs[0].num_updates == 4
    assert_same_dynamics(copy.deepcopy(runs[0]), runs[0])


def test_dynamics_that_do_not_match_are_not_merged():
    dynamics = trained()
    with pytest.raises(ValueError, match=r"other: expected num_samples 30 .* got 31"):
        dynamics.merge(TrainingDynamics(31))
    with pytest.raises(ValueError, match=r"other: expected decay 0.5 .* got 0.25"):
        dynamics.merge(TrainingDynamics(SAMPLES, decay=0.25))
    with pytest.raises(ValueError, match=re.escape("other: expected other dynamics, got these")):
        dynamics.merge(dynamics)
    with pytest.raises(TypeError, match="other: expected TrainingDynamics, got dict"):
        dynamics.merge(dynamics.state_dict())


def test_the_lock_of_a_file_ends_with_the_dynamics(tmp_path):
    dynamics = TrainingDynamics(3, path=tmp_path / "state")
    with (tmp_path / "state").open("r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        margin = dynamics.margin
        del dynamics
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert margin.isnan().all()
