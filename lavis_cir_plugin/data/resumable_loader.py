"""Training batches that depend on seed, epoch and position alone, so that a run can go on in the middle of an epoch.

LAVIS shuffles and augments with the global random generators. Its batches therefore depend on everything that was
drawn before and on the number of loader workers, and a stopped run cannot continue with the batches it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lavis_cir_plugin.core.random_state import get_random_state, seed_cpu, set_random_state
from lavis_cir_plugin.core.workers import worker_setup


def training_loader(dataset: Dataset[Any], seed: int, **options: Any) -> DataLoader[Any]:
    """Return a loader of shuffled batches for :class:`EpochLoader`, which leaves out an incomplete last batch.

    Args:
        dataset: Map-style data set; each process gets its own share.
        seed: Seed of order and augmentation, equal on every process.
        options: Options of torch's DataLoader except sampler, shuffle, generator and worker_init_fn. The seed does
            not cover random numbers that ``collate_fn`` draws itself.
    """
    sampler = _EpochSampler(dataset, seed)
    # A loader with its own generator draws nothing from the global one when an epoch starts.
    own: dict[str, Any] = {"generator": torch.Generator(), "worker_init_fn": worker_setup()}
    return DataLoader(_SeededDataset(dataset, seed), sampler=sampler, **own, **options)


class EpochLoader:
    """Yields batches of a :func:`training_loader` without end, epoch after epoch, from any position on.

    Args:
        loader: A :func:`training_loader`, or LAVIS's prefetcher around one.

    Attributes:
        taken: Number of batches since the beginning of the first epoch.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.taken = 0
        self._iterator: Iterator[Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 0."""
        return self.taken // len(self)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> EpochLoader:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch; at the end of an epoch the next epoch begins."""
        batch = next(self._iterator, None) if self._iterator is not None else None
        if batch is None:
            epoch, position = divmod(self.taken, len(self))
            self.loader.sampler.start_at(epoch, position * self.loader.batch_size)
            self._iterator = iter(self.loader)
            batch = next(self._iterator)
        self.taken += 1
        return batch

    def seek(self, taken: int) -> None:
        """Go on after the first ``taken`` batches without loading them."""
        self.taken = taken
        self._iterator = None


def epoch_loaders(loader: Any) -> list[EpochLoader]:
    """Return the :class:`EpochLoader` s in LAVIS's training loader; streams have no position and are left out."""
    return [each for each in getattr(loader, "loaders", [loader]) if isinstance(each, EpochLoader)]


class _EpochSampler(DistributedSampler[Any]):
    """Yields pairs (epoch, index), from which a worker seeds its generators."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=True, seed=seed)
        self.first = 0

    def start_at(self, epoch: int, first: int) -> None:
        self.set_epoch(epoch)
        self.first = first

    def __iter__(self) -> Iterator[Any]:
        return iter([(self.epoch, index) for index in super().__iter__()][self.first :])


class _SeededDataset(Dataset[Any]):
    """Loads each batch with generators that are seeded by the run's seed, the epoch and the batch's first index."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """Load one batch, then restore the generators, which without workers are those of the training."""
        state = get_random_state()
        try:
            digest = hashlib.blake2b(repr((self.seed, *keys[0])).encode(), digest_size=8).digest()
            seed_cpu(int.from_bytes(digest, "big") >> 1)
            return [self.dataset[index] for _, index in keys]
        finally:
            set_random_state(state)
