"""Adapters: a weight matrix W of the model that moves only as a few factors let it, W = fold(W₀, factors).

    lora   fold = W₀ + α B A                                      lora.py
    dora   fold = m (W₀ + α B A) / ‖W₀ + α B A‖                   dora.py
    vera   fold = W₀ + diag(b) B diag(d) A                        vera.py

W is (out, in). The fused in_proj of an attention is three matrices, for q, k and v, each with its factors.

The model always holds the folded W, under open_clip's name; W₀ and the factors live here. So what evaluates, saves
or merges a model knows nothing of adapters, and there is nothing to fold before deploying. A training step is

    forward, backward   as in any model; they end in the dense gradient G = ∂L/∂W
    hook on W           ∂L/∂factor = Σ G ∂fold/∂factor (`gradients`), then G is dropped
    optimizer           moves the factors, the only thing it sees
    after_step          W = fold(W₀, factors)

The released code builds W in the forward pass and differentiates that, which computes the same: gradients of dense
matrices are in the FLOPs of the paper's Table 4. All other parameters are frozen, the logit scale too. Alone,
factors live on from update to update; `load`, which a merge calls before each, takes its weights for a new W₀ and
draws fresh factors.

Where adapters sit: by default on in_proj and c_proj of every transformer block of both towers, as in the released
code. (It has one on out_proj, too, that takes no part in the forward pass; here `targets` means what it says.)
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fomo.errors import FieldError
from fomo.methods.base import Method
from fomo.methods.subsets import TOWERS, in_towers, train_only
from fomo.schema import Count
from fomo.weights import Weights

# Blocks of open_clip's transformers, of timm's ViTs and ConvNeXts, and the attention pool of open_clip's ResNets.
TARGETS = {
    "in_proj": r"(blocks\.\d+\.attn|attnpool)\.(in_proj_weight|qkv\.weight|[qkv]_proj\.weight)$",
    "out_proj": r"(blocks\.\d+\.attn\.(out_proj|proj)|attnpool\.c_proj)\.weight$",
    "c_fc": r"blocks\.\d+\.mlp\.(c_fc|fc1)\.weight$",
    "c_proj": r"blocks\.\d+\.mlp\.(c_proj|fc2)\.weight$",
}
FUSED = r"(in_proj_weight|qkv\.weight)$"  # q, k and v in one matrix


@dataclass
class Adapted:
    """A weight of the model and what it is folded from."""

    weight: nn.Parameter  # W, in the model
    base: Tensor  # W₀ as (P, out, in): P = 3 for q, k, v in one matrix, else 1
    factors: Weights  # the trained ones are nn.Parameter


@dataclass
class Adapter(Method):
    rank: Count = 4  # r, the inner dimension of B A
    targets: list[Literal["in_proj", "out_proj", "c_fc", "c_proj"]] = field(
        default_factory=lambda: ["in_proj", "c_proj"]
    )
    towers: list[Literal["image", "text"]] = field(default_factory=lambda: ["image", "text"])
    adapted: dict[str, Adapted] = field(default_factory=dict, init=False)  # by parameter name
    generator: torch.Generator = field(default_factory=torch.Generator, init=False)
    TRAINED: ClassVar[tuple[str, ...]] = ()  # names of the factors that are

    def __post_init__(self):
        for field_name, known in (("targets", TARGETS), ("towers", TOWERS)):
            if not getattr(self, field_name):
                raise FieldError(f"method.{field_name}", f"say at least one of {', '.join(known)}")

    def fresh(self, base: Tensor) -> Weights:
        """Factors (P, ., .) to start from: fold(base, **fresh(base)) is `base`, bit by bit."""
        raise NotImplementedError

    def fold(self, base: Tensor, **factors: Tensor) -> Tensor:
        """The formula. (P, out, in) -> (P, out, in)."""
        raise NotImplementedError

    def gradients(self, dense: Tensor, base: Tensor, **factors: Tensor) -> Weights:
        """∂L/∂factor of each trained factor, from `dense` = ∂L/∂fold (P, out, in)."""
        raise NotImplementedError

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        self.generator.manual_seed(torch.initial_seed())
        weights = dict(model.named_parameters())
        chosen = self.find(weights)
        train_only(model, in_towers(model, chosen, f"method.targets {self.targets}", self.towers))
        for name in sorted(chosen):
            weight = weights[name]
            parts = 3 if re.search(FUSED, name) else 1
            base = weight.detach().clone().view(parts, len(weight) // parts, -1)
            if self.rank > min(base.shape[1:]):
                shape = " x ".join(map(str, base.shape[1:]))
                raise FieldError("method.rank", f"{self.rank} is above the rank of {name}, which is {shape}")
            self.adapted[name] = Adapted(weight, base, self.as_parameters(self.fresh(base)))
            weight.register_post_accumulate_grad_hook(self.chain_rule(self.adapted[name]))
        return [f for a in self.adapted.values() for f in a.factors.values() if isinstance(f, nn.Parameter)]

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """Factors go by the name of their weight; what else is trained is the logit scale."""
        factors = [(name, f) for name, a in self.adapted.items() for f in a.factors.values()]
        return [*((n, f) for n, f in factors if isinstance(f, nn.Parameter)), *model.named_parameters()]

    def find(self, names: Weights) -> set[str]:
        chosen = set()
        for i, target in enumerate(self.targets):
            found = {name for name in names if re.search(TARGETS[target], name)}
            found = {n for n in found if any(re.search(TOWERS[tower], n) for tower in self.towers)}
            if not found:
                raise FieldError(f"method.targets[{i}]", f"this model has no {target} in any of its blocks")
            chosen |= found
        return chosen

    def as_parameters(self, factors: Weights) -> Weights:
        return {k: nn.Parameter(f) if k in self.TRAINED else f for k, f in factors.items()}

    def chain_rule(self, adapted: Adapted) -> Callable[[nn.Parameter], None]:
        """A hook: the gradient of the weight becomes gradients of its factors."""

        @torch.no_grad()
        def hook(weight: nn.Parameter) -> None:
            dense = weight.grad.view_as(adapted.base)
            for name, gradient in self.gradients(dense, adapted.base, **adapted.factors).items():
                factor = adapted.factors[name]
                factor.grad = gradient if factor.grad is None else factor.grad + gradient
            weight.grad = None

        return hook

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        for adapted in self.adapted.values():
            folded = self.fold(adapted.base, **adapted.factors)
            adapted.weight.copy_(folded.view_as(adapted.weight))

    @torch.no_grad()
    def load(self, model: nn.Module, weights: Weights) -> None:
        """Plain open_clip weights in; fresh factors on them, in place of the old ones."""
        super().load(model, weights)
        for adapted in self.adapted.values():
            adapted.base.copy_(adapted.weight.view_as(adapted.base))
            for name, factor in self.fresh(adapted.base).items():
                adapted.factors[name].copy_(factor)

    def state(self) -> dict:
        tensors = {
            name: {"base": adapted.base, **{k: f.detach() for k, f in adapted.factors.items()}}
            for name, adapted in self.adapted.items()
        }
        return {"adapted": tensors, "generator": self.generator.get_state()}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        self.generator.set_state(state["generator"])
        for name, saved in state["adapted"].items():
            adapted = self.adapted[name]
            for key, tensor in {"base": adapted.base, **adapted.factors}.items():
                tensor.copy_(saved[key])

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """Kaiming uniform with a = sqrt(r): U(-k, k), k² = 6 / ((1 + r) columns). (..., rows, columns)"""
        k = math.sqrt(6 / ((1 + self.rank) * shape[-1]))
        return torch.empty(shape).uniform_(-k, k, generator=self.generator).to(like)
