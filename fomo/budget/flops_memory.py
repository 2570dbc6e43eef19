"""What a training step costs: its FLOPs and its peak of memory, counted on fake tensors.

Fake tensors have shapes and storages of a size, but no content: a step of any model at any batch size runs in
seconds on a laptop. What runs is the training itself, the real methods on open_clip's model, through two updates:

    prepare, before_update              weights, and what a method holds
    after_update                        EWC's Fisher, a merge
    before_update, optimizer's moments  all that a method holds in its second update
    forward, backward, clipping, optimizer step, after_step      counted: FLOPs
    all of it                           counted: the peak

FLOPs are those of torch's FlopCounterMode: matrix products and convolutions, 2 for a multiply and add, and
attention, whose backward pass computes the scores once more (so it is in the paper's Table 4). The text is at its
full context. Memory is what live tensors take, as on a CUDA device in mixed precision.
"""

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from fomo.architectures import build
from fomo.clip import encode, text_tower
from fomo.devices import Precision
from fomo.errors import UserError
from fomo.methods import build_method
from fomo.methods.base import Inputs, Method
from fomo.methods.merge import Merge
from fomo.recipe import Optimizer
from fomo.train import backward
from fomo.weights import Interpolate

VERSION = 2  # of the counting: raised when the same settings would give other numbers
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Counted:
    step_flops: float  # of a training step, with what the method says it adds
    update_flops: float  # at the end of an update
    peak_memory: int  # bytes


@dataclass(frozen=True)
class Training:
    """What is counted."""

    config: dict  # open_clip's model_cfg
    method: dict
    batch_size: int
    half: bool  # forward pass in bf16 or fp16
    pretraining: int  # pairs of a batch that come from the pretraining pool


def count(training: Training) -> Counted:
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with warnings.catch_warnings(), Fake(), Peak(training.pretraining) as memory, CudaPrecision():
        warnings.filterwarnings("ignore", message="Accessing the data pointer")  # by copying a model
        with Built():
            model = new_model(training.config)
        method = build_method(training.method)
        try:
            two_updates(model, method, training, CPU, flops)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            name = training.method["name"]
            problem = (
                f"what {name} costs depends on the values of tensors ({error.func}), it cannot be counted"
            )
            raise UserError(f"method.name: {problem}") from None
        per_step, per_update = method.cost(flops.get_total_flops(), training.batch_size)
    return Counted(flops.get_total_flops() + per_step, per_update, memory.peak)


def measure(training: Training) -> int:
    """The peak on the CUDA device that is here, in bytes."""
    if not torch.cuda.is_available():
        raise UserError("--measure: there is no CUDA device here; without it the peak is counted")
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = new_model(training.config).to(device)
    two_updates(model, build_method(training.method), training, device, nullcontext())
    return torch.cuda.max_memory_allocated()


def two_updates(
    model: nn.Module,
    method: Method,
    training: Training,
    device: torch.device,
    around_step: AbstractContextManager,
) -> None:
    """Two updates, the second one with a step of training, as update.py and train.py make them."""
    precision = Precision("bf16" if training.half else "float32", device)
    batch = inputs(model, training, device)
    parameters = method.prepare(model)
    inner = method
    while isinstance(inner, Merge):
        inner.rule = Interpolate()  # which models it holds is decided; other rules may look at values
        inner = inner.tune
    method.before_update(model)
    method.after_update(model, [batch], precision.autocast)
    method.before_update(model)
    optimizer = method.optimizer(parameters, Optimizer(lr=1e-5))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    with around_step:
        model.train()
        backward(model, encode, method, batch, precision)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        method.after_step(model, 1e-5)


def new_model(config: dict) -> nn.Module:
    """open_clip's model of a model_cfg, without weights."""
    if "multimodal_cfg" in config:
        raise UserError("model: CoCa has a decoder and another loss, it is not trained here")
    return build(config, "model")


def parameter_count(config: dict) -> int:
    """Of open_clip's model of a model_cfg; no memory is taken for them."""
    with Fake(), Built():
        return sum(p.numel() for p in new_model(config).parameters())


def inputs(model: nn.Module, training: Training, device: torch.device) -> Inputs:
    size = model.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    context = text_tower(model).context_length
    return Inputs(
        torch.zeros(training.batch_size, 3, height, width, device=device),
        torch.zeros(training.batch_size, context, dtype=torch.int64, device=device),
        (torch.arange(training.batch_size, device=device) >= training.pretraining).long(),  # 0: pretraining
    )


class Fake(FakeTensorMode):
    def __deepcopy__(self, memo: dict) -> "Fake":
        """A copied model, as distill's teacher, stays in the mode that its tensors know."""
        return self


class Built(TorchDispatchMode):
    """timm asks a tensor for each layer's drop rate; a fake one has no value, and the rates are 0."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return 0.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class Peak(TorchDispatchMode):
    """Follows every storage that a tensor operation makes until it is gone: bytes now, and at most."""

    def __init__(self, pretraining: int):
        super().__init__()
        self.pretraining, self.now, self.peak, self.alive = pretraining, 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.nonzero.default:  # by which distill finds its pairs; fakes hold no values
            out = torch.zeros(self.pretraining, 1, dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage())
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class CudaPrecision(TorchFunctionMode):
    """Fake tensors are on the CPU; there, autocast leaves these in half precision, on CUDA it does not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def attention(query: torch.Size, key: torch.Size, value: torch.Size, *rest, **named) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest, **named
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# torch's counter knows CUDA's fused attention, not the CPU's, which computes the same.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
