"""Whether a training step fits in memory, before it is tried: a process that is killed for it says nothing.

What it takes is counted (flops_memory.py); measured on CPUs it is 5 to 15 % more.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from fomo.budget.mafs import counted_once, training_of, work_of
from fomo.devices import Precision, available_memory
from fomo.errors import Failure, UserError, one_line
from fomo.progress import Progress
from fomo.recipe import Recipe

SHORTEST = 8  # tokens of the shortest captions, with the start and the end
FEWEST = 2  # pairs of which there is a loss
LESS = "a smaller optimizer.batch_size, --set checkpointing=true (slower), or a smaller model"
# What the allocators of CUDA, the CPU, MPS and cuBLAS say.
MESSAGES = ("out of memory", "allocate memory", "not enough memory", "ALLOC_FAILED")


class Shortage(NamedTuple):
    sure: bool  # even of the shortest captions; else some may be short enough
    line: str


def step_memory(recipe: Recipe, device: torch.device, pairs: int, shortest: bool = False) -> int:
    """Bytes at the peak of a step, in the precision that it has on the device, with `pairs` in the graph at once.

    At the full context, or of the shortest captions: causal text towers are trimmed to what a batch has.
    """
    training = training_of(recipe)
    config, text = training.config, training.config["text_cfg"]
    if shortest and "hf_model_name" not in text and not text.get("no_causal_mask"):
        config = {**config, "text_cfg": {**text, "context_length": SHORTEST}}
    half = Precision(recipe.precision, device, config["embed_dim"]).dtype is not None
    pretraining = training.pretraining * pairs // training.batch_size
    found = replace(training, config=config, half=half, batch_size=pairs, pretraining=pretraining)
    return counted_once(found).peak_memory


def pairs_at_once(recipe: Recipe, world_size: int = 1) -> int:
    """Of a batch: a part of a rank's rows."""
    return max(math.ceil(recipe.optimizer.batch_size / recipe.optimizer.accumulate / world_size), FEWEST)


def shortage(recipe: Recipe, device: torch.device, world_size: int = 1) -> Shortage | None:
    """What a step lacks of memory, None where it fits. A model that cannot be counted is taken to fit."""
    there = available_memory(device)
    try:
        if 2 * work_of(recipe).peak_memory <= there:  # the whole batch, in float32 twice as much at most
            return None
    except UserError:  # whoever trains it says so
        return None
    pairs, saves = pairs_at_once(recipe, world_size), recipe.checkpointing or recipe.compile
    needed = step_memory(recipe, device, pairs)
    # What checkpointing and compiling save is not counted, so with them only what two pairs take is sure.
    least = step_memory(recipe, device, FEWEST if saves else pairs, shortest=True)
    if (least if saves else needed) <= there:
        return None
    takes = f"a step of {recipe.optimizer.batch_size} pairs takes {gib(needed)}"
    takes += f", {gib(least)} of the shortest captions" if least < needed and not saves else ""
    line = f"optimizer.batch_size: {takes}, this {device.type} has {gib(there)}"
    return Shortage(least > there, f"{line}; {remedy(recipe, device, pairs, needed, there)}")


def check_memory(recipe: Recipe, device: torch.device, world_size: int = 1) -> None:
    """A UserError if a step surely does not fit, a warning if it hardly does."""
    if lacking := shortage(recipe, device, world_size):
        if lacking.sure:
            raise UserError(lacking.line)
        Progress.write(f"warning: {lacking.line}", file=sys.stderr)


def remedy(recipe: Recipe, device: torch.device, pairs: int, needed: int, there: int) -> str:
    """In how many parts a batch fits, as memory grows with the pairs."""
    fixed = step_memory(recipe, device, FEWEST)
    if fixed > there:
        return "not even two pairs fit, take a smaller model"
    parts = 2
    while fixed + (needed - fixed) / parts > there and parts < pairs:
        parts *= 2
    return f"to need less: --set optimizer.accumulate={parts * recipe.optimizer.accumulate}, {LESS}"


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


@contextmanager
def memory_told(where: Callable[[], str]) -> Iterator[None]:
    """What an allocator refuses is a Failure of one line, with what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in MESSAGES):
            raise
        less = f"--set optimizer.accumulate=N (a batch in N parts), {LESS}"
        raise Failure(f"{where()}: out of memory: {one_line(error)}; to need less: {less}") from None
