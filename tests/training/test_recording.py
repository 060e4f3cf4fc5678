"""RunRecorder: what it notes of samples and epochs, its folder, resuming, and wrong arguments."""

import collections
import json
import shutil

import numpy as np
import pytest
import torch
import torch.distributed as dist

import marginops
from helpers.ranks import Ranks
from marginops.training import MarginSampler, RunRecorder, TrainingDynamics, TrainingProgress
from marginops.training.recording import folder as folders
from marginops.training.recording import numbers as epoch_numbers

SAMPLES, CLASSES = 60, 4
TARGET = torch.arange(SAMPLES) % CLASSES


def batches(epoch, count=6, size=8):
    """Batches of ids without repetition, logits and targets."""
    random = torch.Generator().manual_seed(epoch)
    order = torch.randperm(SAMPLES, generator=random)[: count * size]
    for indices in order.split(size):
        logits = torch.randn(len(indices), CLASSES, generator=random)
        yield indices, logits, TARGET[indices]


def train(recorder, epochs):
    for epoch in epochs:
        for batch in batches(epoch):
            recorder.update(*batch)
        recorder.end_epoch(epoch, loss=epoch / 7)
    return recorder


def written(folder):
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def without_time(epochs):
    return [{name: value for name, value in epoch.items() if name != "time"} for epoch in epochs]


def test_the_numbers_of_an_epoch_are_those_of_a_count_by_hand(tmp_path):
    recorder = RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES), name="by hand")
    last, before = {}, {}
    for epoch in (1, 2, 3):
        visits = collections.Counter()
        for indices, logits, target in batches(epoch):
            recorder.update(indices, logits, target)
            for index, row, label in zip(indices.tolist(), logits, target.tolist(), strict=True):
                others = [value for place, value in enumerate(row.tolist()) if place != label]
                last[index] = row[label].item() - max(others), int(row.argmax()), label
                visits[index] += 1
        recorder.end_epoch(
            epoch, loss=torch.tensor(0.25, requires_grad=True), accuracy=np.float32(0.5)
        )
        seen = written(tmp_path / "run")[-1]
        margins = [margin for margin, _, _ in last.values()]
        assert seen["epoch"] == epoch and seen["values"] == {"loss": 0.25, "accuracy": 0.5}
        assert (seen["seen"], seen["visited"]) == (len(last), len(visits))
        assert seen["visits"] == sum(visits.values())
        assert seen["new"] == len(set(visits) - set(before))
        right = [predicted == label for _, predicted, label in last.values()]
        assert seen["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)
        levels = np.linspace(0, 1, len(seen["margins"]))
        np.testing.assert_allclose(
            seen["margins"], np.quantile(margins, levels), rtol=1e-4, atol=1e-5
        )
        for label in range(CLASSES):
            own = {index: value for index, value in last.items() if value[2] == label}
            classes = {name: values[label] for name, values in seen["classes"].items()}
            assert classes["samples"] == len(own)
            assert classes["correct"] == sum(value[1] == label for value in own.values())
            assert classes["visited"] == sum(TARGET[index] == label for index in visits)
            assert classes["margin"] == pytest.approx(
                np.mean([v[0] for v in own.values()]), rel=1e-4
            )
        if before:
            order = sorted(before, key=lambda index: before[index][0])
            shares = [np.mean([i in visits for i in part]) for part in np.array_split(order, 10)]
            assert seen["visited_by_margin"] == pytest.approx(shares, rel=1e-5)
        else:
            assert seen["visited_by_margin"] is None
        before = dict(last)
    expected = [last.get(index, (0, -1, -1)) for index in range(SAMPLES)]
    assert recorder.predictions.tolist() == [predicted for _, predicted, _ in expected]
    assert recorder.labels.tolist() == [label for _, _, label in expected]
    run = folders.read(tmp_path / "run")
    assert run.header["name"] == "by hand" and run.header["num_samples"] == SAMPLES
    assert torch.equal(run.labels, recorder.labels)
    assert torch.equal(run.predictions, recorder.predictions)
    assert torch.equal(run.dynamics.count, recorder.dynamics.count)


def test_update_is_that_of_the_dynamics(tmp_path):
    plain, recorder = TrainingDynamics(SAMPLES), RunRecorder(tmp_path, TrainingDynamics(SAMPLES))
    for indices, logits, target in batches(1):
        logits.requires_grad_()
        expected = plain.update(indices, logits, target, log_norm=0.5)
        statistics = recorder.update(indices, logits, target, log_norm=0.5)
        assert torch.equal(statistics.margin, expected.margin)
        assert statistics.mean_loss().requires_grad
    for name in ("values", "counts", "last_seen", "totals"):
        torch.testing.assert_close(
            getattr(recorder.dynamics._state, name), getattr(plain._state, name), rtol=0, atol=0
        )


def test_ignored_and_repeated_samples(tmp_path):
    recorder = RunRecorder(tmp_path, TrainingDynamics(4))
    logits = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3]])
    recorder.update(torch.tensor([2, 2, 1]), logits, torch.tensor([1, 1, -100]))
    assert recorder.labels.tolist() == [-1, -1, 1, -1]
    assert recorder.predictions.tolist() == [-1, -1, 1, -1]
    recorder.update(torch.tensor([2]), logits[:1], torch.tensor([0]))  # a new label
    assert (recorder.labels[2], recorder.predictions[2]) == (0, 0)
    recorder.update(torch.tensor([2, 0]), logits[1:], torch.tensor([2, 1]), ignore_index=2)
    assert (recorder.labels[2], recorder.predictions[2]) == (0, 0)
    statistics = marginops.sample_statistics(logits[2:], torch.tensor([0]))
    recorder.record(torch.tensor([3]), statistics, torch.tensor([0]))
    assert (recorder.labels[3], recorder.predictions[3]) == (0, 2)


def test_a_fault_in_a_batch_changes_nothing(tmp_path):
    recorder = RunRecorder(tmp_path, TrainingDynamics(4))
    logits = torch.zeros(1, 3)
    for indices, target in (([4], [0]), ([0], [3])):
        with pytest.raises(RuntimeError):
            recorder.update(torch.tensor(indices), logits, torch.tensor(target))
    statistics = marginops.sample_statistics(logits, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"target: expected shape \[1\]"):
        recorder.record(torch.tensor([0]), statistics, torch.tensor([0, 1]))
    assert recorder.labels.tolist() == [-1] * 4 and recorder.dynamics.num_updates == 0


def test_values_that_are_not_finite_are_null(tmp_path):
    recorder = RunRecorder(tmp_path, TrainingDynamics(4))
    recorder.update(torch.tensor([0]), torch.tensor([[float("nan"), 0]]), torch.tensor([0]))
    recorder.end_epoch(1, loss=float("inf"))
    recorder.end_epoch(2)
    first, second = written(tmp_path)
    assert first["values"] == {"loss": None} and second["values"] == {}
    assert first["margins"] is None and first["nonfinite"] == 1 and first["accuracy"] == 0


def test_an_epoch_of_many_samples_and_classes_has_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_numbers, "_MOST_SORTED", 1000)
    monkeypatch.setattr(epoch_numbers, "MOST_CLASSES", 20)
    recorder = RunRecorder(tmp_path, TrainingDynamics(50_000))
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(50_000, 30, generator=random)
    recorder.update(torch.arange(50_000), logits, torch.arange(50_000) % 30)
    recorder.end_epoch(1)
    seen = written(tmp_path)[0]
    assert seen["classes"] is None
    margin = recorder.dynamics.margin.numpy()
    expected = np.quantile(margin, np.linspace(0, 1, 257))
    assert (seen["margins"][0], seen["margins"][-1]) == pytest.approx(
        (margin.min(), margin.max()), rel=1e-5
    )
    np.testing.assert_allclose(seen["margins"][20:-20], expected[20:-20], atol=0.3)
    assert len((tmp_path / "epochs.jsonl").read_bytes()) < 4000


@pytest.mark.parametrize("through", ["recorder", "progress"])
def test_a_resumed_run_is_the_run_without_interruption(tmp_path, through):
    whole = train(RunRecorder(tmp_path / "whole", TrainingDynamics(SAMPLES)), [1, 2, 3, 4])
    first = RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES))
    train(first, [1, 2])
    early = list(batches(3))
    for batch in early[:3]:
        first.update(*batch)
    progress = TrainingProgress(recorder=first)
    state = progress.state_dict(), first.state_dict(), first.dynamics.state_dict()
    torch.save(state, tmp_path / "state")
    for batch in early[3:]:  # what the interrupted run did after its checkpoint
        first.update(*batch)
    train_end = torch.zeros(1, CLASSES)
    first.update(torch.tensor([0]), train_end, TARGET[:1])
    first.end_epoch(3)
    first.end_epoch(4)

    state = torch.load(tmp_path / "state", weights_only=True)
    second = RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES), resume=True)
    if through == "progress":
        TrainingProgress(recorder=second).load_state_dict(state[0])
    else:
        second.load_state_dict(state[1])
        second.dynamics.load_state_dict(state[2])
    for batch in early[3:]:
        second.update(*batch)
    second.end_epoch(3, loss=3 / 7)
    assert without_time(written(tmp_path / "run")) == without_time(written(tmp_path / "whole"))[:3]
    train(second, [4])
    assert without_time(written(tmp_path / "run")) == without_time(written(tmp_path / "whole"))
    assert torch.equal(second.predictions, whole.predictions)


def test_the_folder_of_a_killed_run_is_whole(tmp_path, monkeypatch):
    recorder = train(RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES)), [1])
    replace, left = folders._replace, []

    def replace_or_die(path, write):
        if left and left.pop() == "dies":
            raise OSError(28, "No space left on device")
        replace(path, write)

    monkeypatch.setattr(folders, "_replace", replace_or_die)
    for fate in (["dies"], ["dies", "lives"]):
        left[:] = fate
        with pytest.raises(OSError, match="No space left"):
            recorder.end_epoch(2)
        assert [epoch["epoch"] for epoch in folders.read(tmp_path / "run").epochs] == [1]
    recorder.end_epoch(2)  # the call can be made again
    assert [epoch["epoch"] for epoch in folders.read(tmp_path / "run").epochs] == [1, 2]
    # Of a run that dies within its first write nothing counts, so a new run may begin.
    new = RunRecorder(tmp_path / "new", TrainingDynamics(SAMPLES))
    left[:] = ["dies", "lives", "lives"]
    with pytest.raises(OSError, match="No space left"):
        new.end_epoch(1)
    RunRecorder(tmp_path / "new", TrainingDynamics(SAMPLES))
    assert not list(tmp_path.glob("*/.*"))


def test_a_folder_with_a_run(tmp_path):
    state = train(RunRecorder(tmp_path, TrainingDynamics(SAMPLES), data="one"), [1, 2]).state_dict()
    with pytest.raises(FileExistsError, match="which holds one; pass resume=True"):
        RunRecorder(tmp_path, TrainingDynamics(SAMPLES), data="one")
    with pytest.raises(ValueError, match="expected a run with num_samples 5, got 60"):
        RunRecorder(tmp_path, TrainingDynamics(5), data="one", resume=True)
    with pytest.raises(ValueError, match="expected a run with data 'two', got 'one'"):
        RunRecorder(tmp_path, TrainingDynamics(SAMPLES), data="two", resume=True)
    recorder = RunRecorder(tmp_path, TrainingDynamics(SAMPLES), data="one", resume=True)
    with pytest.raises(ValueError, match=r"call load_state_dict\(\) before the first update"):
        train(recorder, [3])
    recorder.load_state_dict(state)
    with pytest.raises(ValueError, match="epoch: expected more than 2, the last epoch, got 2"):
        recorder.end_epoch(2)
    indices = torch.arange(SAMPLES)
    recorder.update(indices, torch.zeros(SAMPLES, CLASSES), (TARGET + 1) % CLASSES)
    before = (tmp_path / "epochs.jsonl").read_bytes()
    with pytest.raises(ValueError, match="expected the labels of the run that was loaded"):
        recorder.end_epoch(3)
    assert (tmp_path / "epochs.jsonl").read_bytes() == before


def test_two_runs_into_one_new_folder(tmp_path):
    one, two = (RunRecorder(tmp_path, TrainingDynamics(SAMPLES)) for _ in range(2))
    train(one, [1])
    with pytest.raises(FileExistsError, match="another training has written meanwhile"):
        train(two, [1])
    train(one, [2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "expected version 1, got 2"),
        ({"num_samples": 5}, "expected num_samples 60, got 5"),
        ({"data": "other"}, "expected data '', got 'other'"),
        ({"notes": torch.zeros(3, 2, dtype=torch.int64)}, "expected notes as a tensor"),
        ({"notes": torch.full((60, 2), 2**40)}, "expected notes of the steps 0 to 12"),
        ({"step": "1"}, "expected step as an int"),
        ({"epochs": ["x"]}, "expected epochs as a list of lines of JSON"),
        ({"epochs": ['{"epoch": 2}', '{"epoch": 1}']}, "expected epochs with ascending numbers"),
        ({"more": 1}, "expected the keys"),
    ],
)
def test_wrong_states(tmp_path, change, message):
    recorder = train(RunRecorder(tmp_path, TrainingDynamics(SAMPLES)), [1, 2])
    before = recorder.state_dict()
    with pytest.raises(ValueError, match=f"state_dict: {message}"):
        recorder.load_state_dict({**before, **change})
    assert torch.equal(recorder.state_dict()["notes"], before["notes"])
    with pytest.raises(TypeError, match="state_dict: expected a mapping, got list"):
        recorder.load_state_dict([])


def test_wrong_arguments(tmp_path):
    dynamics = TrainingDynamics(4)
    with pytest.raises(TypeError, match="dynamics: expected TrainingDynamics, got int"):
        RunRecorder(tmp_path, 4)
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        RunRecorder(tmp_path, dynamics, name=3)
    for names in ("ab", 3, [1]):
        with pytest.raises(TypeError, match="class_names: expected a sequence of str"):
            RunRecorder(tmp_path, dynamics, class_names=names)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="folder: expected a folder, got the file"):
        RunRecorder(tmp_path / "file", dynamics)
    recorder = RunRecorder(tmp_path / "run", dynamics)
    for value in (True, "1", None):
        with pytest.raises(TypeError, match="loss: expected a number"):
            recorder.end_epoch(1, loss=value)
    with pytest.raises(ValueError, match=r"loss: expected one number, got shape \[2\]"):
        recorder.end_epoch(1, loss=torch.zeros(2))
    with pytest.raises(TypeError, match="report: expected the result of report_epoch, got dict"):
        recorder.end_epoch(1, report={})
    with pytest.raises(TypeError, match="epoch: expected an int"):
        recorder.end_epoch(1.0)
    assert not folders.has_run(tmp_path / "run")
    with pytest.raises(ValueError, match="recorder: expected a recorder of the same dynamics"):
        TrainingProgress(MarginSampler(TrainingDynamics(4)), recorder=recorder)


def damage(folder, name, change):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(change(content))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("run.json", lambda content: content[:40], "damaged run.json .it is no JSON"),
        ("run.json", lambda content: b"{}", "with another run.json"),
        ("run.json", lambda content: b"[]", "expected a mapping, got list"),
        ("run.json", lambda c: c.replace(b'"version": 1', b'"version": 9'), "got version 9"),
        (
            "run.json",
            lambda c: c.replace(b'"num_samples": 60', b'"num_samples": -1'),
            "no right num",
        ),
        ("run.json", lambda content: b"\xff\xfe", "it is no text"),
        ("epochs.jsonl", lambda content: content[:-30], "damaged epochs.jsonl .it is no JSON"),
        ("epochs.jsonl", lambda content: b"", "expected one or more lines"),
        ("epochs.jsonl", lambda c: c.replace(b'"seen"', b'"x"'), "line 1: expected seen as an int"),
        ("epochs.jsonl", lambda c: c.replace(b"0.142857", b'"x"'), "expected values as numbers"),
        (
            "epochs.jsonl",
            lambda c: c.replace(b'"margins": [', b'"margins": [1, '),
            "as 257 numbers",
        ),
        ("epochs.jsonl", lambda c: c.replace(b'"correct": [', b'"correct": [1, '), "equal lengths"),
        ("epochs.jsonl", lambda c: c.replace(b'"report": null', b'"report": 1'), "report as a map"),
        ("dynamics.pt", lambda content: content[:1000], "damaged dynamics.pt"),
        ("dynamics.pt", lambda content: b"", "damaged dynamics.pt"),
    ],
)
def test_damaged_folders(tmp_path, name, change, message):
    train(RunRecorder(tmp_path, TrainingDynamics(SAMPLES)), [1])
    damage(tmp_path, name, change)
    with pytest.raises(ValueError, match=f"^folder: .*{message}"):
        folders.read(tmp_path)


def test_folders_without_a_run(tmp_path):
    for folder, message in (
        (tmp_path, "which has no run.json"),
        (tmp_path / "none", "which is not there"),
    ):
        with pytest.raises(ValueError, match=message):
            folders.read(folder)
    train(RunRecorder(tmp_path / "run", TrainingDynamics(SAMPLES)), [1])
    with pytest.raises(ValueError, match="got the file"):
        folders.read(tmp_path / "run" / "run.json")
    (tmp_path / "run" / "epochs.jsonl").unlink()
    with pytest.raises(ValueError, match=r"damaged epochs.jsonl \(it is missing\)"):
        folders.read(tmp_path / "run")


def train_ranks(groups, arguments):
    """Train on every second sample of each batch, and write into one folder."""
    folder, rank, resume = arguments
    recorder = RunRecorder(folder, TrainingDynamics(SAMPLES), resume=resume)
    progress = TrainingProgress(recorder=recorder)
    for epoch in (1, 2):
        for indices, logits, target in batches(epoch):
            progress.update(indices[rank::2], logits[rank::2], target[rank::2])
        if epoch == 1:
            recorder.end_epoch(epoch, loss=epoch / 7)
    state = progress.state_dict()
    recorder.end_epoch(2, loss=2 / 7)
    return state["recorder"]["notes"], recorder.predictions


def lose_the_folder(groups, arguments):
    """End an epoch when the folder is gone."""
    folder, rank, _ = arguments
    recorder = RunRecorder(folder, TrainingDynamics(SAMPLES))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    recorder.end_epoch(1)


def test_ranks_write_the_run_of_one_process(tmp_path):
    alone = train(RunRecorder(tmp_path / "alone", TrainingDynamics(SAMPLES)), [1, 2])
    with Ranks(2, tmp_path) as ranks:
        arguments = [(str(tmp_path / "ranks"), rank, False) for rank in (0, 1)]
        for notes, predictions in ranks.results(train_ranks, arguments):
            assert torch.equal(notes, alone.state_dict()["notes"])
            assert torch.equal(predictions, alone.predictions)
        assert without_time(written(tmp_path / "ranks")) == without_time(
            written(tmp_path / "alone")
        )
        arguments = [(str(tmp_path / "gone"), rank, False) for rank in (0, 1)]
        errors = ranks(lose_the_folder, arguments)
        assert [type(error) for error in errors] == [FileNotFoundError, RuntimeError]
        assert "rank 0 failed: FileNotFoundError" in str(errors[1])
