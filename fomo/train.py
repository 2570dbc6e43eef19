"""The training step: forward, loss, backward, clipping, optimizer. Everything that trains runs through `train`."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from fomo.clip import Clip, Features, contrastive_loss, encode, ids_of_texts, text_tower, trimmable
from fomo.datasets.crops import crop
from fomo.datasets.samples import Batch
from fomo.devices import Precision
from fomo.distributed import ALONE, Ranks
from fomo.methods import Method
from fomo.methods.base import Inputs
from fomo.passes import RunningStatistics, drawing

LENGTHS = (16, 32)  # of captions in a compiled model, beside the whole context

Encoder = Callable[[nn.Module, Tensor, Tensor], Features]


def on_device(
    batches: Iterable[Batch],
    clip: Clip,
    device: torch.device,
    ranks: Ranks = ALONE,
    equal_captions: str = "negatives",
) -> Iterator[Inputs]:
    """Batches as the model takes them: moved, cropped and normalised on the device."""
    layout = torch.channels_last if fast_channels_last(clip.model.visual) else torch.contiguous_format
    for canvas, boxes, tokens, pools in moved(batches, device):
        images = crop(canvas, boxes, clip.image_size, clip.mean, clip.std)
        text_ids = ids_of_texts(tokens) if equal_captions == "positives" else None
        yield Inputs(images.contiguous(memory_format=layout), tokens, pools, ranks, text_ids)


def moved(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; on CUDA the next one is copied there while the model works on this one."""
    if device.type != "cuda":
        yield from (Batch(*(t.to(device) for t in batch)) for batch in batches)
        return
    model, copies, ready = torch.cuda.current_stream(device), torch.cuda.Stream(device), None
    for batch in batches:
        model.wait_stream(copies)  # for `ready`, whose copy began a step ago
        with torch.cuda.stream(copies):
            coming = Batch(*(t.to(device, non_blocking=True) for t in batch))
        for tensor in coming:
            tensor.record_stream(model)  # else a later copy could take its memory while it is in use
        if ready is not None:
            yield ready
        ready = coming
    model.wait_stream(copies)
    if ready is not None:
        yield ready


def fast_channels_last(visual: nn.Module) -> bool:
    """Towers of convolutions that this layout was tried on.

    On a CPU an RN50 is 4 to 9 % faster and a ConvNeXt as fast. MobileCLIP begins with a 1x1 convolution of the
    picture with stride 2, in whose backward pass oneDNN dies of a segmentation fault.
    """
    return isinstance(getattr(visual, "trunk", visual), (ModifiedResNet, ConvNeXt))


def compiled() -> Encoder:
    """`encode`, compiled once for each of a few lengths of text: captions are padded to the next of LENGTHS."""
    fast = torch.compile(encode, dynamic=False)

    def encoder(model: nn.Module, images: Tensor, tokens: Tensor) -> Features:
        text, length = text_tower(model), tokens.shape[1]
        if trimmable(text):
            longer = min(n for n in (*LENGTHS, len(text.attn_mask)) if n >= length)
            tokens = F.pad(tokens, (0, longer - length))
        return fast(model, images, tokens)

    return encoder


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
    draws: Sequence[int] = (),
    accumulate: int = 1,
    compile: bool = False,
    ranks: Ranks = ALONE,
    equal_captions: str = "negatives",
) -> Iterator[Step]:
    """Take one optimizer step per batch and yield after each. `rate(step)` is the learning rate.

    `draws`: seed and update, which decide with the step and the part what the model draws (dropout).
    `accumulate`: in how many parts a batch goes through the model, for one that does not fit in memory whole.
    `ranks`: that train together; `batches` has this rank's rows of each.
    `equal_captions`: of a batch, "positives" or "negatives" of each other's pictures.
    Nothing here reads a value back from the device, but for fp16's scaler.
    """
    model, scaler = clip.model, precision.scaler  # the scaler passes everything through but in fp16
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    encoder = compiled() if compile else encode
    for number, batch in enumerate(on_device(batches, clip, device, ranks, equal_captions), start):
        model.train()
        lr = rate(number)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_share", 1.0)
        if accumulate == 1 and not ranks.several:
            loss = backward(model, encoder, method, batch, precision, (*draws, number))
        else:
            loss = backward_in_parts(model, encoder, method, batch, precision, accumulate, (*draws, number))
            ranks.all_reduce_([loss, *(p.grad for p in parameters if p.grad is not None)])
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
        yield Step(number, lr, loss, grad_norm.detach())


def backward(
    model: nn.Module,
    encoder: Encoder,
    method: Method,
    batch: Inputs,
    precision: Precision,
    draws: Sequence[int] = (),
) -> Tensor:
    """Add the batch's gradients to the parameters' own; -> its loss. `draws` as in `train`, and the step."""
    running = RunningStatistics(model)
    with precision.autocast(), drawing((*draws, 0), precision.device):
        with running.counted():
            features = encoder(model, batch.images, batch.tokens)
        penalty = method.penalty(model, batch, features)
    loss = contrastive_loss(features, batch.text_ids) + penalty
    precision.scaler.scale(loss).backward()
    running.settle([1.0], batch.ranks)
    return loss.detach()


def backward_in_parts(
    model: nn.Module,
    encoder: Encoder,
    method: Method,
    batch: Inputs,
    precision: Precision,
    count: int,
    draws: Sequence[int] = (),
) -> Tensor:
    """The same gradients with the graph of one part in memory at a time (GradCache, arXiv 2101.06983).

    First all features without a graph, and the loss's gradients by them; then each part once more, whose graph
    takes its rows of them to the weights. A penalty counts as the mean over parts. Every count-th pair is in the
    same part, so that all parts have the mixture. A batch norm sees the parts, not the batch.

    Ranks have parts of one batch, too: gradients and loss are this rank's share of it, to be summed over all. A
    rank's only part goes through the model once, its graph is kept. Part i of rank r of N draws as part i N + r of
    one rank with `count` N parts, which has the same rows.
    """
    ranks, running = batch.ranks, RunningStatistics(model)
    ids = batch.text_ids
    parts = [
        Inputs(*(tensor[i::count] for tensor in batch[:3]), ranks, None if ids is None else ids[i::count])
        for i in range(count)
    ]
    keys = [(*draws, i * ranks.world_size + ranks.rank) for i in range(count)]
    cached = []
    with torch.set_grad_enabled(count == 1), precision.autocast():
        for part, key in zip(parts, keys, strict=True):
            with drawing(key, precision.device), running.counted():
                cached.append(encoder(model, part.images, part.tokens))
    in_parts = None if ids is None else torch.cat([part.text_ids for part in parts])
    loss, gradients = loss_gradients(cached, ranks, in_parts)
    sizes = [len(part.images) for part in parts]
    shares = [size / sum(sizes) / ranks.world_size for size in sizes]
    rows = zip(*(gradient.split(sizes) for gradient in gradients[:2]), strict=True)
    for part, key, share, by_rows, features in zip(parts, keys, shares, rows, cached, strict=True):
        with precision.autocast(), drawing(key, precision.device):
            if count > 1:
                features = encoder(model, part.images, part.tokens)
            penalty = method.penalty(model, part, features)
        by_value = [
            *by_rows,
            *(share * gradient for gradient in gradients[2:]),
        ]  # scale and bias are in all parts
        linear = sum((value * gradient).sum() for value, gradient in zip(features, by_value, strict=False))
        precision.scaler.scale(linear + share * penalty).backward()
        loss = (loss + share * penalty).detach()
    running.settle(shares, ranks)
    return loss


def loss_gradients(
    parts: list[Features], ranks: Ranks, text_ids: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """-> this rank's share of the batch's loss, and its gradients by the rank's rows, the scale and the bias."""
    images, texts, (scale, *_), (bias, *_) = zip(*parts, strict=True)
    rows = torch.cat([torch.cat(images), torch.cat(texts)], 1)  # (B, 2 D): one message
    pairs = ranks.all_gather(rows.detach())
    whole = [*pairs.chunk(2, 1), scale, *([] if bias is None else [bias])]
    leaves = [tensor.detach().contiguous().requires_grad_() for tensor in whole]
    everywhere = None if text_ids is None else ranks.all_gather(text_ids)
    loss = contrastive_loss(Features(*leaves), everywhere)
    images, texts, *rest = torch.autograd.grad(loss, leaves)
    return loss.detach() / ranks.world_size, [ranks.own_rows(images), ranks.own_rows(texts), *rest]
