"""What all samplers share: an order of each epoch, its share for each rank, and its position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ... import _checks as checks
from .agreement import together
from .order import epoch_order, repeated_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERSION = 1
_STATE = ("version", "seed", "epoch", "position", "weights_version")
_CHUNK = 4096  # ids that become Python numbers at once


class EpochSampler(DistributedSampler[int]):
    """A sampler that draws each epoch from weights: the part that all our samplers share.

    It is a ``DistributedSampler``, so hosts that would wrap an unknown sampler leave it alone.

    Attributes:
        epoch: The number of the epoch that ``iter(sampler)`` begins or continues.
        num_samples: How many samples this rank visits in an epoch.
        total_size: ``num_samples * num_replicas``.
    """

    _repeats = False  # whether an epoch may visit a sample several times

    def __init__(
        self,
        population: int,
        epoch_size: int,
        seed: int,
        num_replicas: int,
        rank: int,
        drop_last: bool,
    ) -> None:
        checks.check_int("num_samples", epoch_size, 1)
        if epoch_size > population:
            raise ValueError(
                f"num_samples: expected at most {population}, the size of the data set, "
                f"got {epoch_size}; no sample comes twice in an epoch"
            )
        checks.check_int("seed", seed, 0)
        if seed >= 2**63:
            raise ValueError(f"seed: expected an int below 2**63, got {seed}")
        checks.check_int("num_replicas", num_replicas, 1)
        checks.check_int("rank", rank, 0)
        if rank >= num_replicas:
            raise ValueError(
                f"rank: expected an int below num_replicas, {num_replicas}, got {rank}"
            )
        if not isinstance(drop_last, bool):
            raise TypeError(f"drop_last: expected a bool, got {type(drop_last).__name__}")
        if drop_last and epoch_size < num_replicas:
            raise ValueError(
                f"num_samples: expected at least num_replicas, {num_replicas}, with drop_last, "
                f"got {epoch_size}"
            )
        self.population = population
        self._position = 0
        super().__init__(
            range(epoch_size),  # type: ignore[arg-type]
            num_replicas=num_replicas,
            rank=rank,
            seed=seed,
            drop_last=drop_last,
        )

    @property
    def epoch_size(self) -> int:
        """How many samples an epoch visits on all ranks together, without padding."""
        return len(self.dataset)  # type: ignore[arg-type]

    @property
    def position(self) -> int:
        """How many samples of this epoch all ranks had consumed where ``iter(sampler)`` begins."""
        return self._position

    @property
    def _longest_epoch(self) -> int:
        """The length of the longest epoch."""
        return self.epoch_size

    def _resize(self, epoch_size: int) -> None:
        """Change the length of this epoch."""
        epoch = self.epoch
        DistributedSampler.__init__(
            self,
            range(epoch_size),  # type: ignore[arg-type]
            num_replicas=self.num_replicas,
            rank=self.rank,
            seed=self.seed,
            drop_last=self.drop_last,
        )
        self.epoch = epoch

    def set_ranks(self, num_replicas: int, rank: int) -> None:
        """Share the epochs among ranks, for a sampler that was made before there were any.

        Args:
            num_replicas: The number of ranks. A sampler that already has several keeps them, and
                another number is an error.
            rank: The number of this rank.

        Raises:
            ValueError: The sampler has other ranks, or a number is out of range.
        """
        wanted, own = (num_replicas, rank), (self.num_replicas, self.rank)
        if own == wanted:
            return
        if self.num_replicas != 1:
            raise ValueError(
                f"sampler: expected num_replicas {num_replicas} and rank {rank}, got {own[0]} and "
                f"{own[1]}; make the sampler without group, num_replicas and rank"
            )
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank: expected an int in [0, {num_replicas}), got {rank}")
        if self.drop_last and self.epoch_size < num_replicas:
            raise ValueError(
                f"num_samples: expected at least num_replicas, {num_replicas}, with drop_last, got "
                f"{self.epoch_size}"
            )
        self.num_replicas, self.rank = num_replicas, rank
        self._resize(self.epoch_size)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next.

        The epoch of a loaded state goes on at its position; every other epoch begins anew.

        Args:
            epoch: The number of the epoch, 0 <= epoch < 2**63.
        """
        check_epoch(epoch)
        if epoch != self.epoch:
            self._position = 0
        self.epoch = int(epoch)

    def _begin_epoch(self, epoch: int, group: ProcessGroup | None) -> None:
        """Call :meth:`set_epoch` on all ranks of a group, which have to agree."""

        def facts(_: None) -> dict[str, int | float]:
            return {**self._facts(), "weights_version": self._version()}

        together(group, lambda: self.set_epoch(epoch), facts)

    def __iter__(self) -> EpochIterator:
        """The ids of this rank in the current epoch, from the position of a loaded state on."""
        weights, version = self._drawn_weights()
        draw = Draw(weights, self.epoch_size, self.seed, self.epoch, version, self._repeats)
        return EpochIterator(draw, self.num_replicas, self.rank, self.drop_last, self._position)

    def indices(self) -> Tensor:
        """What ``iter(sampler)`` yields, as a tensor, for a loop over data in memory.

        Returns:
            ``[n]`` int64 on the CPU, the ids of this rank in the current epoch, from the position
            of a loaded state on. ``sampler.indices().split(128)`` are batches.
        """
        return iter(self).indices()

    def state_dict(self, position: int | None = None) -> dict[str, int]:
        """The state as five integers.

        Args:
            position: How many samples of this epoch all ranks together have consumed, counted from
                the beginning of the epoch. Loaders fetch samples ahead, so only the training loop
                knows it. The default is the position at which ``iter(sampler)`` begins.

        Returns:
            A mapping for :meth:`load_state_dict` of a sampler on any number of ranks.
        """
        if position is None:
            position = self._position
        else:
            checks.check_int("position", position, 0)
            most = self.epoch_size + self.num_replicas - 1
            if position > most:
                raise ValueError(
                    f"position: expected at most {most}, the samples of an epoch with padding, got "
                    f"{position}; count the samples of this epoch only"
                )
        version = self._version()
        return _state(self.seed, self.epoch, min(position, self.epoch_size), version)

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue the epoch of a state at its position.

        Args:
            state_dict: The result of :meth:`state_dict`, also one of another number of ranks.

        Raises:
            TypeError, ValueError: The state is damaged, or of a sampler with another seed or
                another number of samples. The sampler stays as it was.
        """
        _, _, epoch, position, version = _checked(state_dict, self.seed, self._longest_epoch)
        self._load(epoch, position, version)

    def _load(self, epoch: int, position: int, version: int) -> None:
        if version != self._version():
            raise ValueError(
                "state_dict: expected the state of a sampler with the same weights, got one with "
                "other weights"
            )
        self.epoch, self._position = epoch, position

    def _facts(self) -> dict[str, int | float]:
        """What has to be equal on all ranks."""
        return {
            "dynamics.num_samples": self.population,
            "num_samples": self.epoch_size,
            "seed": self.seed,
            "num_replicas": self.num_replicas,
            "drop_last": self.drop_last,
            "epoch": self.epoch,
            "position of the loaded state": self._position,
        }

    def _drawn_weights(self) -> tuple[Tensor, int]:
        """The weights of the current epoch, and their version."""
        raise NotImplementedError

    def _version(self) -> int:
        """The version of the weights, without computing them."""
        return self._drawn_weights()[1]


class Draw(NamedTuple):
    """All that an order of an epoch depends on."""

    weights: Tensor
    epoch_size: int
    seed: int
    epoch: int
    weights_version: int
    repeats: bool

    def order(self) -> Tensor:
        """The ids of the epoch on all ranks."""
        arguments = self.epoch_size, self.seed, self.epoch
        if self.repeats and int((self.weights > 0).sum()) < self.epoch_size:
            return repeated_order(self.weights.nonzero().squeeze(1), *arguments)
        return epoch_order(self.weights, *arguments)


class EpochIterator(Iterator[int]):
    """The ids of one rank in one epoch. The iterator knows its own position."""

    def __init__(
        self, draw: Draw, num_replicas: int, rank: int, drop_last: bool, position: int
    ) -> None:
        self._draw = draw
        self._num_replicas, self._rank, self._drop_last = num_replicas, rank, drop_last
        self._begin_at(position)

    def _begin_at(self, position: int) -> None:
        self._chunk_end = position  # of the chunk whose ids come next
        self._chunk: Iterator[int] = iter(())
        self._chunks: Iterator[list[int]] | None = None

    def __iter__(self) -> EpochIterator:
        return self

    def __next__(self) -> int:
        for sample in self._chunk:  # this is the fastest way to take one
            return sample
        if self._chunks is None:
            self._chunks = map(Tensor.tolist, self.indices().split(_CHUNK))
        chunk = next(self._chunks)
        self._chunk_end += len(chunk) * self._num_replicas
        self._chunk = iter(chunk)
        return next(self._chunk)

    def indices(self) -> Tensor:
        """The ids from the position on, which all ranks share evenly."""
        size, step = self._draw.epoch_size, self._num_replicas
        remaining = max(size - self._position, 0)
        share = remaining // step if self._drop_last else -(-remaining // step)
        if share == 0:
            return torch.empty(0, dtype=torch.int64)
        order = self._draw.order()
        first, last_round = self._position + self._rank, self._position + (share - 1) * step
        own = order[first::step][:share]
        if len(own) == share:
            return own
        # The padding repeats what lower ranks visit at the same step. A sync keeps the visits of
        # the lower ranks, so the padding leaves no trace in the dynamics.
        padding = last_round + self._rank % (size - last_round)
        return torch.cat((own, order[padding : padding + 1]))

    @property
    def _position(self) -> int:
        return self._chunk_end - length_hint(self._chunk) * self._num_replicas

    def state_dict(self) -> dict[str, int]:
        """The state of the sampler after the ids that this iterator has handed out."""
        draw = self._draw
        position = min(self._position, draw.epoch_size)
        return _state(draw.seed, draw.epoch, position, draw.weights_version)

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on at the position of a state of the same epoch."""
        draw = self._draw
        _, _, epoch, position, version = _checked(state_dict, draw.seed, draw.epoch_size)
        if (epoch, version) != (draw.epoch, draw.weights_version):
            raise ValueError(
                f"state_dict: expected the state of epoch {draw.epoch} with weights of version "
                f"{draw.weights_version}, got epoch {epoch} and version {version}; load the state "
                "of the sampler first"
            )
        self._begin_at(position)


def check_epoch(epoch: Any) -> None:
    """Check the number of an epoch."""
    checks.check_int("epoch", epoch, 0)
    if epoch >= 2**63:
        raise ValueError(f"epoch: expected an int below 2**63, got {epoch}")


def _state(*numbers: int) -> dict[str, int]:
    return dict(zip(_STATE, (_VERSION, *numbers), strict=True))


def _checked(state_dict: Any, seed: int, epoch_size: int) -> tuple[int, ...]:
    """The numbers of a state that fits a sampler, in the order of their names."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict: expected a mapping, got {type(state_dict).__name__}")
    if set(state_dict) != set(_STATE):
        raise ValueError(
            f"state_dict: expected the keys {', '.join(_STATE)}, "
            f"got {', '.join(map(str, state_dict))}"
        )
    numbers = tuple(state_dict[name] for name in _STATE)
    for name, number in zip(_STATE, numbers, strict=True):
        if type(number) is not int:
            raise TypeError(f"state_dict: expected {name} as an int, got {type(number).__name__}")
    version, its_seed, epoch, position, weights_version = numbers
    if version != _VERSION:
        raise ValueError(f"state_dict: expected version {_VERSION}, got {version}")
    if its_seed != seed:
        raise ValueError(
            f"state_dict: expected seed {seed}, got {its_seed}; make the sampler with that seed"
        )
    if not 0 <= epoch < 2**63:
        raise ValueError(f"state_dict: expected an epoch in [0, 2**63), got {epoch}")
    if not 0 <= position <= epoch_size:
        raise ValueError(
            f"state_dict: expected a position in [0, {epoch_size}], got {position}; the sampler of "
            "the state had another num_samples"
        )
    if weights_version < -1:
        raise ValueError(f"state_dict: expected weights_version >= -1, got {weights_version}")
    return numbers
