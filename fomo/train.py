"""The training step: forward, loss, backward, clipping, optimizer. Everything that trains runs through `train`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fomo.clip import Clip, contrastive_loss, encode
from fomo.datasets.crops import crop
from fomo.datasets.samples import Batch
from fomo.errors import UserError
from fomo.methods import Method
from fomo.methods.base import Inputs


def on_device(batches: Iterable[Batch], clip: Clip, device: torch.device) -> Iterator[Inputs]:
    """Batches as the model takes them: moved, cropped and normalised on the device."""
    for batch in batches:
        canvas, boxes, tokens, pools = (t.to(device, non_blocking=True) for t in batch)
        yield Inputs(crop(canvas, boxes, clip.image_size, clip.mean, clip.std), tokens, pools)


class Precision:
    """Mixed precision: what the forward pass computes in. The weights are float32 always.

    auto: on CUDA bf16, or fp16 with loss scaling where bf16 is missing; float32 elsewhere.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "float32"
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        self.device = device
        self.dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)


class Step(NamedTuple):
    """What one optimizer step was like; tensors stay on the device."""

    number: int
    lr: float
    loss: Tensor
    grad_norm: Tensor


def train(
    clip: Clip,
    method: Method,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    rate: Callable[[int], float],
    *,
    device: torch.device,
    precision: Precision,
    clip_norm: float,
    max_scale: float | None,
    start: int = 0,
) -> Iterator[Step]:
    """Take one optimizer step per batch and yield after each. `rate(step)` is the learning rate."""
    model, scaler = clip.model, precision.scaler  # the scaler passes everything through but in fp16
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, batch in enumerate(on_device(batches, clip, device), start):
        model.train()
        lr = rate(number)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with precision.autocast():
            features = encode(model, batch.images, batch.tokens)
            penalty = method.penalty(model, batch, features)
        loss = contrastive_loss(features) + penalty
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
        scale = scaler.get_scale()  # 1 but in fp16
        scaler.step(optimizer)
        scaler.update()
        if max_scale is not None:
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(max_scale))  # as open_clip
        if scaler.get_scale() >= scale:  # else the gradients overflowed fp16 and the step was left out
            method.after_step(model, lr)
        optimizer.zero_grad(set_to_none=True)
        yield Step(number, lr, loss.detach(), grad_norm.detach())


class Timed:
    """Iterates a loader and measures how long its batches are waited for."""

    def __init__(self, loader: Iterable[Batch]):
        self.loader, self.waited, self.lapped = loader, 0.0, time.monotonic()

    def __iter__(self) -> Iterator[Batch]:
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


def pick_device(name: str, threads: int | None = None) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU, there with so many threads."""
    if threads:
        torch.set_num_threads(threads)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(
            f"--device {name}: not available here, accepted: {', '.join(k for k, v in available.items() if v)}"
        )
    return torch.device(name)
