"""Mixtures: every batch is drawn from three pools (paper, section 3.2).

Which samples are in the batch of (update, step), which caption and which crop each gets, is a pure function of
(seed, update, step): no loader state exists, and the number of workers cannot change a batch.
"""

import copy

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fomo.datasets.crops import random_crops
from fomo.datasets.samples import Batch, Collection, Samples, canvas_of, padded
from fomo.errors import UserError
from fomo.recipe import Mixture

POOLS = ("pretraining", "update", "buffer")  # P, D, B: the order in which left-over slots are given out


def sub_batches(batch_size: int, mixture: Mixture, empty: frozenset[str] = frozenset()) -> dict[str, int]:
    """How many of a batch come from each pool: 512 -> 169 P, 175 D, 168 B.

    int(share * batch) each, then one left-over slot to each pool in order. The slots of an empty buffer are split
    between update and pretraining (253 P + 259 D; all to D if lambda_P = 0), as in the released code;
    `empty_buffer: update` gives all to D, as the paper's text has it. Without a pretraining pool its share is
    divided among the others in proportion.
    """
    shares = {name: getattr(mixture, name) for name in POOLS}
    if "pretraining" in empty:
        shares["pretraining"] = 0.0
        total = sum(shares.values())
        if not total:
            raise UserError("mixture.pretraining: the only pool with a share, and the data file has none")
        shares = {name: share / total for name, share in shares.items()}
    counts = {name: int(batch_size * share + 1e-9) for name, share in shares.items()}
    open_pools = [name for name in POOLS if shares[name] > 0]
    for i in range(batch_size - sum(counts.values())):
        counts[open_pools[i % len(open_pools)]] += 1
    if "buffer" in empty and counts["buffer"]:
        spare, counts["buffer"] = counts["buffer"], 0
        half = spare // 2 if mixture.empty_buffer == "split" and counts["pretraining"] else 0
        if not shares["update"] and counts["pretraining"]:
            half = spare
        counts["pretraining"] += half
        counts["update"] += spare - half
    return counts


class Pool:
    """Samples of a collection, drawn in endless epochs, each a fresh permutation: no repetition within one.

    At most two permutations are held: 4 bytes a sample each, 60 MB for 15 million.
    """

    def __init__(self, collection: Collection, numbers: np.ndarray | range, key: tuple[int, ...]):
        self.collection, self.numbers, self.key = collection, numbers, key
        self.epochs: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def __getstate__(self):
        return {**self.__dict__, "epochs": {}}

    def permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self.epochs:
            self.epochs = {e: p for e, p in self.epochs.items() if e == epoch - 1}
            rng = np.random.default_rng([*self.key, epoch])
            self.epochs[epoch] = rng.permutation(np.arange(len(self), dtype=np.int32))
        return self.epochs[epoch]

    def at(self, positions: np.ndarray) -> np.ndarray:
        """(k,) positions of the endless sequence -> sample numbers."""
        epochs, places = np.divmod(positions, len(self))
        for epoch in set(epochs.tolist()):
            here = epochs == epoch
            places[here] = self.permutation(epoch)[places[here]]
        return places + self.numbers.start if isinstance(self.numbers, range) else self.numbers[places]

    def take(self, start: int, count: int) -> np.ndarray:
        """(count,) sample numbers at positions start, start + 1, ... of the endless sequence."""
        return self.at(np.arange(start, start + count))


class Blend(Pool):
    """Several pools as one: a sample of weight 2 comes twice per epoch, one of weight 0.5 in every other."""

    def __init__(self, pools: list[Pool], weights: list[float], key: tuple[int, ...]):
        self.pools = pools
        self.slots = [max(1, round(weight * len(p))) for p, weight in zip(pools, weights, strict=True)]
        self.starts = np.concatenate([[0], np.cumsum(self.slots)])  # of each pool among the slots of an epoch
        super().__init__(pools[0].collection, range(self.starts[-1]), key)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """A shuffled epoch of slots, each the next place of its own pool's endless sequence."""
        epochs, slots = positions // len(self), super().at(positions)
        owner = np.searchsorted(self.starts, slots, side="right") - 1
        for i in set(owner.tolist()):
            here = owner == i
            slots[here] = self.pools[i].at(epochs[here] * self.slots[i] + slots[here] - self.starts[i])
        return slots


def pool_of(collection: Collection, key: tuple[int, ...]) -> Pool:
    """All samples of a collection that have a caption, each source by its weight."""
    usable = collection.usable()
    numbers = range(len(usable)) if usable.all() else np.flatnonzero(usable)
    if all(part.weight == 1 for part in collection.parts):
        return Pool(collection, numbers, key)
    pools = []
    for start, part in zip(collection.starts, collection.parts, strict=False):
        usable = part.described()
        numbers = range(start, start + len(usable)) if usable.all() else start + np.flatnonzero(usable)
        pools.append((Pool(collection, numbers, (*key, start)), part.weight))
    filled = [(pool, weight) for pool, weight in pools if len(pool)]
    return Blend(*map(list, zip(*filled, strict=True)), key) if filled else pools[0][0]


def reservoir(numbers: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """At most `limit` of the samples, uniformly; what was once left out never comes back as `numbers` grows.

    Every sample has a random rank, and the lowest are kept: what a reservoir holds, without its history.
    """
    if limit is None or len(numbers) <= limit:
        return numbers
    secret = np.random.default_rng([seed, 0x4E5E]).integers(0, 2**64, dtype=np.uint64)
    rank = scrambled(scrambled(numbers.astype(np.uint64)) ^ secret)
    return np.sort(numbers[np.argpartition(rank, limit)[:limit]])


def scrambled(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64, every bit depends on all (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Batches(Dataset):
    """The batches of one update, by step."""

    def __init__(self, draws: list[tuple[str, Pool, int]], seed: int, update: int, steps: int):
        self.draws = [(name, pool, count) for name, pool, count in draws if count]
        self.seed, self.update, self.steps = seed, update, steps
        self.first, self.every = 0, 1
        for name, pool, _ in self.draws:
            if not len(pool):
                raise UserError(
                    f"update {update}: the {name} pool has no usable sample, but a share of the batch"
                )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, self.update, step, 0xBA7C])
        size = sum(count for _, _, count in self.draws)
        rows, draws = slice(self.first, None, self.every), rng.random(size)
        pictures, tokens = [], []
        for (name, pool, position, number), draw in zip(self.drawn(step)[rows], draws[rows], strict=True):
            samples, index = pool.collection.locate(number)
            picture = samples.pixels[index]
            if not picture.size:
                samples, index, picture = stand_in(name, pool, position)
            pictures.append(picture)
            tokens.append(samples.caption(index, draw))
        canvas, sides = canvas_of(pictures)
        shapes = np.ones((size, 2), sides.dtype)  # a row's crop does not depend on the others' shapes
        shapes[rows] = sides
        boxes = torch.from_numpy(random_crops(shapes, rng)[rows])
        pools = [POOLS.index(name) for name, _, count in self.draws for _ in range(count)]
        return Batch(canvas, boxes, padded(tokens), torch.tensor(pools[rows]))

    def drawn(self, step: int) -> list[tuple[str, Pool, int, int]]:
        """Each row's pool, its position in the pool's endless sequence, and the sample number there."""
        return [
            (name, pool, position, number)
            for name, pool, count in self.draws
            for position, number in enumerate(pool.take(step * count, count).tolist(), step * count)
        ]

    def rows(self, first: int, every: int) -> "Batches":
        """The same batches, of each only the rows first::every: what a rank decodes."""
        part = copy.copy(self)
        part.first, part.every = first, every
        return part

    def loader(self, start: int = 0, workers: int = 0, pin: bool = False) -> DataLoader:
        """Iterates from step `start`; batches are whole already, workers only assemble them ahead of time."""
        generator = torch.Generator()  # else DataLoader draws from the global one
        steps = range(start, self.steps)
        return DataLoader(
            self, batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin, generator=generator
        )


def stand_in(name: str, pool: Pool, position: int) -> tuple[Samples, int, np.ndarray]:
    """For a picture that cannot be read: the next of the epoch's permutation that can."""
    epoch, place = divmod(position, len(pool))
    for step in range(1, len(pool)):
        next_one = epoch * len(pool) + (place + step) % len(pool)
        samples, index = pool.collection.locate(int(pool.take(next_one, 1)[0]))
        picture = samples.pixels[index]
        if picture.size:
            return samples, index, picture
    raise UserError(f"no picture of the {name} pool can be read")
