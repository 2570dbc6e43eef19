"""Mixtures: every batch is drawn from three pools (paper, section 3.2).

Which samples are in the batch of (update, step), which caption and which crop each gets, is a pure function of
(seed, update, step): no loader state exists, and the number of workers cannot change a batch.
"""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fomo.datasets.crops import random_crops
from fomo.datasets.samples import Batch, Collection, canvas_of, padded
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
    """Samples of a collection, drawn in endless epochs, each a fresh permutation: no repetition within one."""

    def __init__(self, collection: Collection, numbers: np.ndarray, key: tuple[int, ...]):
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
            self.epochs[epoch] = rng.permutation(len(self)).astype(np.int32)
        return self.epochs[epoch]

    def take(self, start: int, count: int) -> np.ndarray:
        """(count,) sample numbers at positions start, start + 1, ... of the endless sequence."""
        epochs, places = np.divmod(np.arange(start, start + count), len(self))
        return self.numbers[[self.permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)]]


class Batches(Dataset):
    """The batches of one update, by step."""

    def __init__(self, draws: list[tuple[str, Pool, int]], seed: int, update: int, steps: int):
        self.draws = [(name, pool, count) for name, pool, count in draws if count]
        self.seed, self.update, self.steps = seed, update, steps
        for name, pool, _ in self.draws:
            if not len(pool):
                raise UserError(
                    f"update {update}: the {name} pool has no usable sample, but a share of the batch"
                )

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, self.update, step, 0xBA7C])
        pictures, tokens, pools = [], [], []
        for name, pool, count in self.draws:
            for number in pool.take(step * count, count):
                samples, index = pool.collection.locate(number)
                pictures.append(samples.pixels[index])
                tokens.append(samples.caption(index, rng.random()))
            pools += [POOLS.index(name)] * count
        canvas, shapes = canvas_of(pictures)
        boxes = torch.from_numpy(random_crops(shapes, rng))
        return Batch(canvas, boxes, padded(tokens), torch.tensor(pools))

    def loader(self, start: int = 0, workers: int = 0, pin: bool = False) -> DataLoader:
        """Iterates from step `start`; batches are whole already, workers only assemble them ahead of time."""
        steps = range(start, self.steps)
        return DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin)
