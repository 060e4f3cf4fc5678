"""MarginTrainer trains as a Trainer of Transformers does, and knows which samples it visits."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="the extra transformers is not installed")

from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from helpers.trainers import (
    SAMPLES,
    Bag,
    Watched,
    arguments,
    bare,
    joined,
    make,
    mean_loss,
    network,
    parameters,
    sampler,
    texts,
)
from marginops.integrations.transformers import MarginTrainer
from marginops.training import (
    MarginSampler,
    ReductionSampler,
    SelectionSchedule,
    TrainingDynamics,
    Uniform,
    WeightedSampler,
    select_batch,
)


def train(folder, *, host=Watched, dropout=0.0, data=None, training=None, **options):
    """A trained MarginTrainer; ``options`` are of the trainer, ``training`` of its arguments."""
    trainer = make(
        host,
        network(dropout),
        arguments(folder, **(training or {})),
        train_dataset=texts() if data is None else data,
        **options,
    )
    trainer.train()
    return trainer


def batch_of(rows):
    items = texts()
    ids = torch.tensor([items[row]["input_ids"] for row in rows])
    return ids, torch.tensor([items[row]["labels"] for row in rows])


def assert_same_parameters(left, right, **tolerance):
    for name, value in parameters(left).items():
        torch.testing.assert_close(value, parameters(right)[name], **tolerance)


def step(model, rows, rate=0.1):
    """One step of plain gradient descent on the mean loss of some samples."""
    ids, target = batch_of(rows)
    model.train()
    loss = F.cross_entropy(model(input_ids=ids).logits, target)
    gradients = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
    with torch.no_grad():
        for value, gradient in zip(model.parameters(), gradients, strict=True):
            if gradient is not None:
                value -= rate * gradient


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"gradient_accumulation_steps": 4},
        {"bf16": True},
        {"label_smoothing_factor": 0.1},
        {"dataloader_num_workers": 1},
        {"optim": "adamw_torch", "lr_scheduler_type": "linear", "max_grad_norm": 0.5},
    ],
    ids=["plain", "accumulation", "bf16", "smoothing", "workers", "adamw"],
)
def test_recording_changes_nothing_in_the_training(tmp_path, training):
    plain = bare(tmp_path / "bare", dropout=0.1, **training)
    trainer = train(tmp_path / "ours", dropout=0.1, training=training)
    assert trainer.state.global_step == plain.state.global_step
    assert trainer.state.epoch == plain.state.epoch
    assert_same_parameters(trainer, plain, rtol=0, atol=0)
    assert trainer.dynamics.count.tolist() == [2] * SAMPLES
    assert trainer.progress.position == SAMPLES


def test_a_loss_of_the_user_stays(tmp_path):
    plain = bare(tmp_path / "bare", compute_loss_func=mean_loss)
    trainer = train(tmp_path / "ours", compute_loss_func=mean_loss)
    assert_same_parameters(trainer, plain, rtol=0, atol=0)
    assert trainer.items == [10] * 12


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dynamics_hold_the_margin_and_loss_of_every_sample(tmp_path, smoothing):
    training = {"learning_rate": 0.0, "label_smoothing_factor": smoothing}
    trainer = train(tmp_path, training=training)
    ids, target = batch_of(range(SAMPLES))
    with torch.no_grad():
        logits = network().eval()(input_ids=ids).logits
    loss = F.cross_entropy(logits, target, reduction="none")
    own = logits.gather(1, target[:, None])[:, 0]
    others = logits.scatter(1, target[:, None], -torch.inf).amax(1)
    torch.testing.assert_close(trainer.dynamics.loss, loss)
    torch.testing.assert_close(trainer.dynamics.margin, own - others)


def test_a_sampler_that_draws_all_gives_the_training_of_its_order(tmp_path):
    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return MarginSampler(TrainingDynamics(SAMPLES), Uniform(keep=1.0), seed=3)

    plain = bare(tmp_path / "bare", dropout=0.1, host=Ordered)
    order = MarginSampler(TrainingDynamics(SAMPLES), Uniform(keep=1.0), seed=3)
    trainer = train(tmp_path / "ours", dropout=0.1, sampler=order)
    assert_same_parameters(trainer, plain, rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_stale_scores_train_as_a_plain_loop_does(tmp_path, accumulation):
    training = {
        **{"num_train_epochs": 5, "per_device_train_batch_size": 12 // accumulation},
        "gradient_accumulation_steps": accumulation,
    }
    trainer = train(
        tmp_path, training=training, sampler=sampler(seed=2), compute_loss_func=mean_loss
    )

    model, order = network(), sampler(seed=2)
    visited = []
    for epoch in range(5):
        order.set_epoch(epoch)
        for rows in order.indices().split(12):
            ids, target = batch_of(rows.tolist())
            with torch.no_grad():
                logits = model.train()(input_ids=ids).logits
            for part in torch.arange(12).split(12 // accumulation):
                order.dynamics.update(rows[part], logits[part], target[part])
                visited.append(rows[part].tolist())
            step(model, rows.tolist())
    assert trainer.visited == visited
    for name, value in model.named_parameters():
        torch.testing.assert_close(parameters(trainer)[name], value.detach())


def test_the_arithmetic_of_epochs_follows_the_sampler(tmp_path):
    trainer = train(tmp_path, training={"num_train_epochs": 3}, sampler=sampler())
    assert len(trainer.visited) == trainer.state.global_step == trainer.state.max_steps == 9
    assert [len(rows) for rows in trainer.visited] == [10, 10, 4] * 3
    assert trainer.state.epoch == 3
    loader = trainer.get_train_dataloader()
    assert len(loader) == 3
    assert trainer.num_examples(loader) == 24
    # Each of the first epochs visits samples that were never seen.
    assert len({*joined(trainer.visited[:6])}) == 48


def test_max_steps_ends_within_an_epoch(tmp_path):
    trainer = train(tmp_path, training={"max_steps": 4}, sampler=sampler())
    assert trainer.state.global_step == 4
    assert trainer.state.epoch == pytest.approx(4 / 3)
    assert (trainer.progress.epoch, trainer.progress.position) == (1, 10)


def test_a_last_batch_that_is_too_small_can_be_dropped(tmp_path):
    training = {"dataloader_drop_last": True}
    trainer = train(tmp_path, training=training, sampler=sampler())
    assert [len(rows) for rows in trainer.visited] == [10, 10] * 2


def test_a_second_training_begins_anew(tmp_path):
    trainer = train(tmp_path, training={"num_train_epochs": 1}, sampler=sampler())
    trainer.train()
    assert len({row for rows in trainer.visited for row in rows}) == 48


def test_reduction_trains_on_the_smallest_margins(tmp_path):
    dynamics = TrainingDynamics(SAMPLES)
    order = ReductionSampler(dynamics, num_kept=6, trigger=0.0)
    trainer = train(tmp_path, sampler=order)
    assert sorted(joined(trainer.visited[:6])) == [*range(SAMPLES)]
    assert {*joined(trainer.visited[6:])} == {*order.kept.tolist()}
    assert len(order.kept) == 6


class Spy:
    """Notes how a network is called."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        rows = len(kwargs["input_ids"])
        self.calls.append((torch.is_grad_enabled(), module.training, "labels" in kwargs, rows))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_selection_trains_on_what_select_batch_chooses(tmp_path, accumulation):
    training = {
        **{"per_device_train_batch_size": 20, "gradient_accumulation_steps": accumulation},
        **{"num_train_epochs": 1, "max_steps": 1},
    }
    trainer = make(
        Watched, network(0.1), arguments(tmp_path, **training), train_dataset=texts(), select=5
    )
    spy = Spy(trainer.model)
    delivered, closest = [], trainer._closest
    trainer._closest = lambda batch: delivered.append(batch["index"].tolist()) or closest(batch)
    torch.manual_seed(5)
    trainer.train()

    model, chosen = network(0.1), []
    for rows in delivered:
        picked = select_batch(model, {"input_ids": batch_of(rows)[0]}, 5)
        chosen.append([rows[place] for place in picked.tolist()])
    assert [len(rows) for rows in delivered] == [20] * accumulation
    assert trainer.visited == chosen
    # Scoring: without gradient, in evaluation mode and without labels. Then training on 5 rows.
    scoring = [call for call in spy.calls if not call[0]]
    assert {call[1:3] for call in scoring} == {(False, False)}
    assert {call[3] for call in scoring if call[3] == 20} == {20}
    assert [call[1:] for call in spy.calls if call[0]] == [(True, True, 5)] * accumulation
    assert trainer.progress.position == 20 * accumulation
    assert int(trainer.dynamics.count.sum()) == 5 * accumulation


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_of_selected_samples_is_their_mean(tmp_path, accumulation):
    training = {"per_device_train_batch_size": 20, "gradient_accumulation_steps": accumulation}
    training |= {"max_steps": 1}
    # The host has a mean of each batch, and some versions forget to divide by the accumulation.
    for name, loss in {"host": None, "user": mean_loss}.items():
        if loss is None and accumulation > 1:
            continue
        trainer = train(tmp_path / name, training=training, select=5, compute_loss_func=loss)
        model = network()
        step(model, joined(trainer.visited))
        for key, value in model.named_parameters():
            torch.testing.assert_close(parameters(trainer)[key], value.detach())
        if loss is not None:
            assert trainer.items == [5 * accumulation] * accumulation


def test_candidates_count_for_epochs_once(tmp_path):
    training = {"per_device_train_batch_size": 20, "num_train_epochs": 2}
    trainer = train(tmp_path, training=training, select=5)
    assert trainer.state.global_step == 6
    assert trainer.state.epoch == 2
    assert int(trainer.dynamics.count.sum()) == 6 * 5


def test_a_batch_of_few_candidates_is_trained_as_a_whole(tmp_path):
    training = {"per_device_train_batch_size": 25, "num_train_epochs": 1}
    trainer = train(tmp_path, training=training, select=12)
    assert [len(rows) for rows in trainer.visited] == [12, 12, 10]


def test_a_schedule_says_when_to_select(tmp_path):
    schedule = SelectionSchedule(begin=1, end=4, every=2, candidate_ratio=5)
    training = {"per_device_train_batch_size": 10, "num_train_epochs": 1}
    trainer = train(tmp_path, training=training, schedule=schedule)
    assert [len(rows) for rows in trainer.visited] == [10, 2, 10, 2, 10, 10]
    trainer = train(tmp_path, training=training, schedule=schedule, select=7)
    assert [len(rows) for rows in trainer.visited] == [10, 7, 10, 7, 10, 10]


def test_options_of_the_selection(tmp_path):
    options = {"select": 5, "training": {"per_device_train_batch_size": 20, "max_steps": 1}}
    trainers = [train(tmp_path, select_options={"skip": skip}, **options) for skip in (0, 5)]
    closest, next_closest = (each.visited[0] for each in trainers)
    assert not {*closest} & {*next_closest}


def test_a_weighted_sampler_draws_by_given_weights(tmp_path):
    weights = (torch.arange(SAMPLES) % 3 == 0).float()
    trainer = train(tmp_path, sampler=WeightedSampler(weights))
    assert trainer.dynamics.count.tolist() == (2 * weights).tolist()


def test_selection_and_sampler_work_together(tmp_path):
    trainer = train(tmp_path, training={"bf16": True}, sampler=sampler(), select=3)
    assert [len(rows) for rows in trainer.visited] == [3] * 6
    assert trainer.progress.position == 24


def test_evaluation_is_not_recorded(tmp_path):
    training = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 10}
    plain = make(
        Trainer,
        network(0.1),
        arguments(tmp_path / "bare", **training),
        train_dataset=texts(),
        eval_dataset=texts(30, seed=9),
    )
    plain.train()
    trainer = make(
        Watched,
        network(0.1),
        arguments(tmp_path / "ours", **training),
        train_dataset=texts(),
        eval_dataset=texts(30, seed=9),
    )
    trainer.train()
    assert trainer.dynamics.count.tolist() == [2] * SAMPLES
    evaluations = [
        [log["eval_loss"] for log in each.state.log_history if "eval_loss" in log]
        for each in (plain, trainer)
    ]
    assert len(evaluations[0]) == 6
    assert evaluations[0] == evaluations[1]
    assert len(trainer.predict(texts(7)).predictions) == 7


def test_a_table_keeps_its_rows_and_loses_unused_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**item, "index": 7, "note": "unused"} for item in texts()]
    table = datasets.Dataset.from_list(rows)
    trainer = train(tmp_path, data=table, training={"num_train_epochs": 1})
    assert sorted(joined(trainer.visited)) == [*range(SAMPLES)]
    plain = bare(tmp_path / "bare", num_train_epochs=1)
    assert_same_parameters(trainer, plain, rtol=0, atol=0)


def test_items_may_be_tuples_if_the_collator_knows_them(tmp_path):
    pairs = [(item["input_ids"], item["labels"]) for item in texts()]

    def collate(items):
        ids, labels = zip(*items, strict=True)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    trainer = train(tmp_path, data=pairs, data_collator=collate)
    assert trainer.dynamics.count.tolist() == [2] * SAMPLES


def test_logits_of_tokens_can_be_reduced_by_the_user(tmp_path):
    class First(Watched):
        def logits_and_target(self, inputs, outputs):
            return outputs.logits[:, 0], inputs["labels"][:, 0]

    from transformers import DistilBertForTokenClassification

    data = [{**item, "labels": [item["labels"]] * 6} for item in texts()]
    for host in (First, MarginTrainer):
        model = DistilBertForTokenClassification(network().config)
        trainer = make(host, model, arguments(tmp_path), train_dataset=data)
        if host is MarginTrainer:
            with pytest.raises(ValueError, match=r"logits: expected shape \[B, C\].*\[10, 6, 3\]"):
                trainer.train()
        else:
            trainer.train()
            assert trainer.dynamics.count.tolist() == [2] * SAMPLES


def test_the_example_adds_at_most_five_lines():
    text = (Path(__file__).resolve().parents[2] / "examples/transformers_text.py").read_text()
    marked = [line for line in text.splitlines() if line.endswith("  # marginops")]
    others = [line for line in text.splitlines() if line not in marked]
    assert 0 < len(marked) <= 5
    names = ("Margin", "marginops", "TrainingDynamics", "sampler")
    assert not any(name in line for line in others[12:] for name in names)


class Syncs(TorchDispatchMode):
    """Counts what waits for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"select": 4}], ids=["recording", "selection"])
def test_a_step_waits_no_more_often_than_the_host(tmp_path, options):
    def syncs(steps, host, **given):
        trainer = make(
            host,
            Bag(),
            arguments(tmp_path / f"{host.__name__}{steps}", max_steps=steps),
            train_dataset=texts(),
            **given,
        )
        with Syncs() as mode:
            trainer.train()
        return mode.count

    added = syncs(6, MarginTrainer, **options) - syncs(3, MarginTrainer, **options)
    assert added == syncs(6, Trainer) - syncs(3, Trainer) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"select": 4}], ids=["recording", "selection"])
def test_a_step_does_not_wait_for_the_gpu(tmp_path, options):
    class Strict(MarginTrainer):
        def compute_loss(self, *args, **kwargs):
            return self.strictly(super().compute_loss, *args, **kwargs)

        def _closest(self, candidates):
            return self.strictly(super()._closest, candidates)

        def strictly(self, function, *args, **kwargs):
            # The first steps check the head and warm up the libraries.
            torch.cuda.set_sync_debug_mode("error" if self.state.global_step > 1 else "default")
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    trainer = train(tmp_path, host=Strict, training={"use_cpu": False}, **options)
    assert trainer.dynamics.device.type == "cuda"
    assert trainer.state.global_step == 12
