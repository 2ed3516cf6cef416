"""Batches of an in-memory training set: no workers, no state, any batch reachable at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from torch import Tensor

from toolchain.artifact import EdgestillError

Fetch = Callable[[NDArray[np.int64], int], Mapping[str, Tensor]]


class TrainingError(EdgestillError):
    """A training that cannot be started or cannot go on."""


class Batches:
    """Batches of an in-memory training set, in an order that (seed, epoch) alone decides.

    ``fetch(index, epoch)`` gives the named tensors of the samples ``index``. ``batch_size`` counts the samples of all
    processes together; each process takes its share. The incomplete last batch is dropped unless it is the only one.
    """

    def __init__(self, count: int, batch_size: int, fetch: Fetch, *, seed: int = 0) -> None:
        state = PartialState()
        self.rank, self.world = state.process_index, state.num_processes
        self.count, self.batch_size, self.fetch, self.seed = count, min(batch_size, count), fetch, seed
        if self.batch_size < self.world:
            raise TrainingError(
                f"expected at least one sample per process, found a batch of {self.batch_size} for {self.world} "
                "processes; raise train.batch_size or give more samples"
            )

    def __len__(self) -> int:
        return self.count // self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Sample indices in the order of ``epoch``; override to group samples, by length for example."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.count)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """This process's share of the batches of ``epoch``, from batch ``start`` on."""
        order = self.order(epoch)
        for number in range(start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            share = len(batch) // self.world
            yield self.fetch(batch[self.rank * share : (self.rank + 1) * share], epoch)
