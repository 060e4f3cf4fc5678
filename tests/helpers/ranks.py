"""Processes of one torch.distributed group, and calls that they make together."""

import dataclasses
import datetime
import multiprocessing
import pickle
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import marginops
from helpers.rounding import assert_same

DIFFERENTIABLE = ("input", "weight", "bias", "log_norm")


class Ranks:
    """Gloo processes that wait for calls. The test fails if one does not answer in time.

    Each has one thread. Leaving the ``with`` block, or ``close()``, ends them.
    """

    def __init__(self, count: int, folder: Path) -> None:
        # This process compiles the kernels first, so that no rank waits for another.
        marginops.select_smallest(torch.zeros(1), 1)
        self.count = count
        context = multiprocessing.get_context("spawn")
        self._processes, self._connections = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            for rank in range(count):
                ours, theirs = context.Pipe()
                arguments = rank, count, str(folder / "store"), theirs
                process = context.Process(target=_serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(
        self, function: Callable[..., Any], arguments: Sequence[Any], timeout: float = 60
    ) -> list[Any]:
        """Call ``function(groups, argument)`` on each rank; returns its results or exceptions.

        ``groups`` are the group of all ranks and the group of the first and the last rank.
        """
        for connection, argument in zip(self._connections, arguments, strict=True):
            connection.send_bytes(pickle.dumps((function, argument)))
        end = time.monotonic() + timeout
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(end - time.monotonic(), 0)):
                self.close()
                pytest.fail(f"rank {rank} did not answer within {timeout} s")
            answers.append(pickle.loads(connection.recv_bytes()))
        return answers

    def results(
        self, function: Callable[..., Any], arguments: Sequence[Any], timeout: float = 60
    ) -> list[Any]:
        """The results of a call; raises the error of the first rank that has one."""
        answers = self(function, arguments, timeout)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def ranks_fixture(*counts: int) -> Any:
    """A fixture of a module: its processes, for each of these numbers of them."""

    @pytest.fixture(scope="module", params=counts)
    def ranks(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Ranks]:
        with Ranks(request.param, tmp_path_factory.mktemp("ranks")) as started:
            yield started

    return ranks


def _serve(rank: int, count: int, store: str, connection: Any) -> None:
    warnings.simplefilter("error")  # nobody would read warnings here
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=120),
    )
    groups = dist.group.WORLD, dist.new_group([0, count - 1])
    while True:
        function, argument = pickle.loads(connection.recv_bytes())
        try:
            answer = function(groups, argument)
        except Exception as error:
            answer = error
        connection.send_bytes(pickle.dumps(answer))


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a public function.

    Attributes:
        function: The name without ``linear_``.
        arguments: The arguments by name.
        grads: The gradient of each result that is to be differentiated, by the result's name.
        autocast: Whether the call runs under autocast with bfloat16.
        frozen: The arguments that need no gradient.
    """

    function: str
    arguments: dict[str, Any]
    grads: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    autocast: bool = False
    frozen: frozenset[str] = frozenset()

    def replace(self, **arguments: Any) -> "Call":
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def drop(self, *names: str) -> "Call":
        kept = {name: value for name, value in self.arguments.items() if name not in names}
        return dataclasses.replace(self, arguments=kept)

    def shards(self, sizes: Sequence[int]) -> list["Call"]:
        """The calls of all ranks, where each rank has so many classes."""
        assert sum(sizes) == len(self.arguments["weight"])
        weights = self.arguments["weight"].split(list(sizes))
        bias = self.arguments.get("bias")
        biases = [None] * len(sizes) if bias is None else bias.split(list(sizes))
        return [
            self.replace(weight=weight.clone(), bias=None if bias is None else bias.clone())
            for weight, bias in zip(weights, biases, strict=True)
        ]

    def __call__(self, group: Any = None) -> dict[str, torch.Tensor]:
        """The results of the call by name, and the gradients of its arguments."""
        needing_grad = {*DIFFERENTIABLE} - self.frozen if self.grads else set()
        arguments = {
            name: value.clone().requires_grad_(name in needing_grad)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in self.arguments.items()
        }
        function = getattr(marginops, f"linear_{self.function}")
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            returned = function(**arguments, group=group)
        results = {"value": returned} if torch.is_tensor(returned) else returned._asdict()
        differentiable = torch.tensor([value.requires_grad for value in results.values()])
        if self.grads:
            outputs = [results[name] for name in self.grads]
            torch.autograd.backward(outputs, list(self.grads.values()))
        for name in DIFFERENTIABLE:
            gradient = getattr(arguments.get(name), "grad", None)
            if gradient is not None:
                results[f"grad_{name}"] = gradient
        results = {name: value.detach() for name, value in results.items()}
        return {**results, "differentiable": differentiable}


def call_all(groups: Sequence[Any], calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
    """The results of calls over the group of all ranks."""
    return [call(groups[0]) for call in calls]


def results_of(
    ranks: Ranks, calls: Sequence[Call], sizes: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """The results of each call, equal on all ranks, with the gradients of all classes joined."""
    shards = zip(*(call.shards(sizes) for call in calls), strict=True)
    per_rank = ranks.results(call_all, list(shards))
    return [_joined(results) for results in zip(*per_rank, strict=True)]


def _joined(results: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    joined = {}
    for name, value in results[0].items():
        values = [others[name] for others in results]
        if name in ("grad_weight", "grad_bias"):
            joined[name] = torch.cat(values)
        else:
            for other in values:
                assert_same(other, value)
            joined[name] = value
    return joined


def assert_like_one_process(
    ranks: Ranks,
    calls: Sequence[Call],
    sizes: Sequence[int],
    exact: Collection[str],
    tolerance: float,
) -> None:
    """Compare with one process. ``sizes`` are numbers of classes; ``exact`` results are equal."""
    for call, actual in zip(calls, results_of(ranks, calls, sizes), strict=True):
        expected = call()
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            allowed = 0 if name in exact else tolerance
            torch.testing.assert_close(
                actual[name],
                value,
                rtol=allowed,
                atol=allowed,
                equal_nan=True,
                msg=lambda text, where=(call.function, name): f"{where}: {text}",
            )
