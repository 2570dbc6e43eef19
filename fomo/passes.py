"""What a forward pass of training does beside computing: it draws (dropout) and it keeps statistics (batch norm).

A batch may go through the model in parts and each part twice (train.backward_in_parts). Both passes of a part must
compute one function, so what the model draws is decided by a key, like the batches: nothing of a generator is in a
checkpoint. And a batch counts once in the running statistics, however often its parts went through.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from fomo.distributed import Ranks
from fomo.weights import is_statistic, weighted_sum


@contextmanager
def drawing(key: Sequence[int], device: torch.device) -> Iterator[None]:
    """Whatever draws from torch's generators in here (dropout, drop path, patch dropout) draws what `key` decides,
    and outside nobody notices. Costs 20 microseconds, so a model that draws nothing is not looked for."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    generators = generators_of(device)
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def generators_of(device: torch.device) -> list[torch.Generator]:
    """The CPU's too: open_clip draws the patches that it drops there. torch.manual_seed would take 100
    microseconds, for it seeds every device that torch knows."""
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]]
    if device.type == "mps":
        return [torch.default_generator, torch.mps._get_default_mps_generator()]
    return [torch.default_generator]


class RunningStatistics:
    """Of batch norms, while one batch goes through a model.

    Every part begins with those of before the batch, and `settle` leaves the parts' mean: each mean and variance
    moves by `momentum` once, towards the mean over parts and ranks of what they were normalised with, and a count
    grows by one. Passes outside of `counted` (the second one of a part, a recomputation by gradient checkpointing)
    leave no trace. A model without batch norms has nothing to do here.
    """

    def __init__(self, model: nn.Module):
        self.buffers = [buffer for name, buffer in model.named_buffers() if is_statistic(name)]
        self.before = [buffer.clone() for buffer in self.buffers]
        self.after: list[list[Tensor]] = []  # each part's

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Around the first pass of a part."""
        if self.after:
            for buffer, before in zip(self.buffers, self.before, strict=True):
                buffer.copy_(before)
        yield
        self.after.append([buffer.clone() for buffer in self.buffers])

    def settle(self, shares: Sequence[float], ranks: Ranks) -> None:
        """After the backward pass: autograd watches the buffers. shares: of the parts, sum 1 over all ranks."""
        averaged = []
        for buffer, *after in zip(self.buffers, *self.after, strict=True):
            if buffer.is_floating_point():
                buffer.copy_(weighted_sum(shares, after))
                averaged.append(buffer)
            else:
                buffer.copy_(after[0])
        if averaged:
            ranks.all_reduce_(averaged)
