"""What train.jsonl says of the training steps."""

import math
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fomo.errors import Failure
from fomo.runs.folder import Run
from fomo.train import Step

LOG_EVERY = 20  # steps between readings of the loss: on a GPU each reading waits for the device


class StepLog:
    """Collects an update's steps; every few, reads their losses, stops if one is not finite, and writes a line."""

    def __init__(self, run: Run, batch_size: int, logit_scale: Tensor):
        self.run, self.batch_size, self.logit_scale = run, batch_size, logit_scale
        self.waiting: list[Step] = []
        self.saved = time.monotonic()

    def add(self, step: Step, loader: "Timed", now: bool) -> None:
        """`now`: write whatever there is."""
        self.waiting.append(step)
        if now or len(self.waiting) == LOG_EVERY:
            self.write(loader)

    def write(self, loader: "Timed") -> None:
        steps, self.waiting = self.waiting, []
        losses = torch.stack([step.loss for step in steps]).tolist()
        update, last = self.run.position.update + 1, steps[-1]
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                kept = f"{self.run.folder} keeps the last good weights"
                raise Failure(f"update {update}, step {step.number}: the loss is {loss}; {kept}")
        seconds, waited = loader.lap()
        line = {
            "update": update,
            "step": last.number,
            "loss": sum(losses) / len(losses),
            "lr": last.lr,
            "logit_scale": self.logit_scale.item(),
            "grad_norm": last.grad_norm.item(),
            "samples_per_second": len(steps) * self.batch_size / seconds,
            "data_wait": waited / seconds,
        }
        self.run.log("train.jsonl", line)


class Timed:
    """Iterates a loader and measures how long its batches are waited for."""

    def __init__(self, loader: Iterable):
        self.loader, self.waited, self.lapped = loader, 0.0, time.monotonic()

    def __iter__(self) -> Iterator:
        iterator = iter(self.loader)
        while True:
            asked = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.monotonic() - asked
            yield batch

    def lap(self) -> tuple[float, float]:
        """-> seconds since the last lap, and seconds waited in it."""
        now = time.monotonic()
        lap = max(now - self.lapped, 1e-9), self.waited
        self.lapped, self.waited = now, 0.0
        return lap
