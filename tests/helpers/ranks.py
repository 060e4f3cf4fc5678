"""Processes of one torch.distributed group, and calls that they make together."""

import datetime
import multiprocessing
import pickle
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import marginops


class Ranks:
    """Gloo processes that wait for calls. The test fails if one does not answer in time.

    Each has one thread. After a call in which one of them hung, the next call starts new ones.
    Leaving the ``with`` block, or ``close()``, ends them.
    """

    def __init__(self, count: int, folder: Path) -> None:
        # This process compiles the kernels first, so that no rank waits for another.
        marginops.select_smallest(torch.zeros(1), 1)
        self.count, self._folder, self._starts = count, folder, 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes, self._connections = [], []
        self._starts += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            for rank in range(self.count):
                ours, theirs = context.Pipe()
                store = self._folder / f"store{self._starts}"
                arguments = rank, self.count, str(store), theirs
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
        if not all(process.is_alive() for process in self._processes):
            self._start()
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
