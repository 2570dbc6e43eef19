"""Several devices: the processes that `torchrun --nproc_per_node=N fomo.py update ...` starts, ranks 0 to N - 1.

Ranks are parts of a batch. Rank r decodes and encodes the rows r::N of the batch that one process would take; all
features are gathered, every rank computes the whole batch's loss, takes the gradients of its own rows to the
weights (train.backward_in_parts), and these are summed. So all ranks hold the same weights at every step, for any
N the batches are the same and the losses differ by rounding, and nothing of N is in a checkpoint. Where
open_clip's ClipLoss(local_loss=True, gather_with_grad=True) sends the features' gradients back, here each rank
computes them for all rows: B² D multiplications more, and no message.

Gradients are summed after the backward pass, not by DistributedDataParallel: its reducer takes what a module's
parameters accumulate, while an adapter's hook makes gradients of factors, which are no parameters of the model,
from the dense one and drops that (methods/adapters.py).

Rank 0 reads the recipe, orders the stream, does what ends an update (a Fisher, a merge), writes and prints; the
others take over what it says. Its run folder must be seen by all. The first rank that fails tells why, the others
end quietly. Messages between processes go through gloo, those between GPUs through nccl.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fomo.errors import Failure, FieldError, UserError, one_line

PATIENCE = timedelta(days=7)  # the others wait while the first pretrains, fills a cache or estimates a Fisher
LARGE = 2**18  # elements from which on a tensor is summed where it is, not in a message with others

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Alone, every method gives back what it was given."""

    rank: int = 0  # r
    world_size: int = 1  # N

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.world_size > 1

    def check_batch(self, size: int, parts: int) -> None:
        """Every rank must have as many rows of a batch, and parts of them."""
        if size % self.world_size:
            found = f"{size} pairs for {self.world_size} ranks"
            raise FieldError("optimizer.batch_size", f"{found}, accepted: a multiple of {self.world_size}")
        if parts * self.world_size > size:
            found = f"{parts} parts of the {size // self.world_size} pairs of a rank"
            raise FieldError("optimizer.accumulate", f"{found}, accepted: at most a part per pair")

    def all_reduce_max(self, value: int) -> int:
        """Of all ranks; no device is waited for."""
        if not self.several:
            return value
        own = torch.tensor(int(value))
        with failure_of_another():
            dist.all_reduce(own, dist.ReduceOp.MAX)
        return int(own)

    def barrier(self) -> None:
        """Until all ranks are here."""
        self.all_reduce_max(0)

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """What the first rank makes, for all; tensors arrive on the CPU."""
        if not self.several:
            return make()
        if self.first:
            made, file = make(), io.BytesIO()
            torch.save(made, file)
            self.broadcast(torch.tensor(file.tell()))
            self.broadcast(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
            return made
        size = self.broadcast(torch.tensor(0))
        file = io.BytesIO(self.broadcast(torch.empty(int(size), dtype=torch.uint8)).numpy())
        return torch.load(file, map_location="cpu", weights_only=False)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """From the first to all."""
        with failure_of_another():
            dist.broadcast(tensor, 0)
        return tensor

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first rank goes before the others: what it leaves on the disk they find there."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()

    def all_gather(self, rows: Tensor) -> Tensor:
        """(b, ...) of each rank, as many -> (N b, ...), row i of rank r at place i N + r. Has a gradient."""
        return Gather.apply(rows, self) if self.several else rows

    def own_rows(self, rows: Tensor) -> Tensor:
        """(N b, ...) -> (b, ...): this rank's rows of what `gather` gave."""
        return rows[self.rank :: self.world_size]

    @torch.no_grad()
    def all_reduce_(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes its sum over ranks; the small ones travel together, large ones on the CPU without
        the rows that are zero everywhere: a batch has a few hundred words, the vocabulary 49,408."""
        if not self.several:
            return
        small = [t for t in tensors if t.numel() < LARGE or not t.is_contiguous()]
        joined = torch.cat([t.flatten() for t in small])
        with failure_of_another():
            for large in (joined, *(t for t in tensors if t.numel() >= LARGE and t.is_contiguous())):
                if large.ndim < 2 or large.is_cuda:  # there nothing must be read back to the host
                    dist.all_reduce(large)
                else:
                    sum_rows(large)
        for tensor, total in zip(small, joined.split([t.numel() for t in small]), strict=True):
            tensor.copy_(total.view_as(tensor))


def sum_rows(tensor: Tensor) -> None:
    """(R, ...) float32 becomes its sum over ranks; only rows that are not zero on some rank are sent."""
    bits = tensor.flatten(1).view(torch.int32)  # as numbers NaN would need care, and a copy
    used = ((bits.amax(1) | bits.amin(1)) != 0).to(torch.uint8)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    rows = used.nonzero().squeeze(1)
    values = tensor[rows]
    dist.all_reduce(values)
    tensor[rows] = values


ALONE = Ranks()


class Gather(torch.autograd.Function):
    """Every rank goes on with all rows, so the gradients of a row are the sum of what the ranks make of it."""

    @staticmethod
    def forward(ctx, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        parts = [
            torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(ranks.world_size)
        ]
        with failure_of_another():
            dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    @staticmethod
    def backward(ctx, gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients.clone(memory_format=torch.contiguous_format)
        with failure_of_another():
            dist.all_reduce(total)
        return ctx.ranks.own_rows(total), None


@contextmanager
def failure_of_another() -> Iterator[None]:
    """Around every message: an error of it means that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise Failure(f"another rank has ended or cannot be reached: {one_line(error)}") from error


@contextmanager
def process_group(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started; without it, this process is alone and nothing is set up."""
    count = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
    if count == 1:
        yield ALONE
        return
    with failure_of_another():
        store, number, _ = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    ranks, nowhere = Ranks(number, count), open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        with nullcontext() if ranks.first else silence(nowhere):
            choose_device(device)
            yield ranks
    except BaseException:
        if not fails_first(store):
            sys.stderr = nowhere  # nor a traceback
        raise
    dist.destroy_process_group()


@contextmanager
def silence(nowhere: io.TextIOBase) -> Iterator[None]:
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def fails_first(store: dist.Store) -> bool:
    """Whether this rank is the first that fails."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # its keeper has ended
        return False


def choose_device(device: str) -> None:
    """Make this rank's CUDA device the current one."""
    if device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise UserError(f"--device {device}: several ranks cannot share this machine's GPU, accepted: cpu")
    local, there = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
    if device in ("auto", "cuda") and there:
        if local >= there:
            raise UserError(f"--nproc_per_node: more than the {there} CUDA devices of this machine")
        torch.cuda.set_device(local)
