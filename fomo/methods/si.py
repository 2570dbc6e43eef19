"""Synaptic intelligence: weights whose way lowered the loss are held near where the update starts.

Zenke et al. 2017, https://arxiv.org/abs/1703.04200, eqs. 3 to 5.

    L(θ) = L_clip(θ) + c Σ_k Ω_k (θ_k - θ*_k)²
    ω_k ← ω_k - g_k Δθ_k                              each step; Σ_k ω_k approximates how far the loss fell
    Ω_k ← Ω_k + max(ω_k, 0) / ((θ_k - θ*_k)² + ξ)     after each update, then ω = 0

θ* are the weights the update starts from (under a merge, the merged ones), Δθ what the step did to the weights
(momentum, weight decay and the bound on the logit scale included), g the gradient that the optimizer saw: clipped,
and of the whole loss. The original takes the gradient without the penalty; here a weight that is held gains a
little less new importance, and a clipped step counts for less. As in the authors' code, a way that raised the
loss earns no negative importance.

Differs from the released code: that adds lr g² in place of -g Δθ, which is the same for plain SGD only, and never
stores the trained weights.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fomo.clip import Features
from fomo.methods.base import Autocast, Inputs
from fomo.methods.pull import Pulled
from fomo.schema import NotNegative, Positive


@dataclass
class SynapticIntelligence(Pulled):
    """`importance` is Ω."""

    strength: NotNegative = 0.5  # c
    damping: Positive = 1.0  # ξ
    before: dict[str, Tensor] = field(default_factory=dict, init=False)  # θ before the step
    path: dict[str, Tensor] = field(default_factory=dict, init=False)  # ω

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        parameters = super().prepare(model)
        for name, p in self.trained.items():
            p.register_post_accumulate_grad_hook(partial(self.remember, name))
        return parameters

    def remember(self, name: str, parameter: nn.Parameter) -> None:
        """When a gradient is there: earlier, the copy would lie beside all activations."""
        self.before[name] = parameter.detach().clone()

    def before_update(self, model: nn.Module) -> None:
        super().before_update(model)
        self.path = {name: torch.zeros_like(p) for name, p in self.trained.items()}

    def penalty(self, model: nn.Module, batch: Inputs, features: Features) -> Tensor | float:
        return self.strength * self.pull()

    @torch.no_grad()
    def after_step(self, model: nn.Module, lr: float) -> None:
        for name, p in self.trained.items():
            if p.grad is not None:
                self.path[name].addcmul_(p.grad, p - self.before.pop(name), value=-1)

    @torch.no_grad()
    def after_update(
        self, model: nn.Module, batches: Iterable[Inputs], autocast: Autocast = nullcontext
    ) -> None:
        for name, p in self.trained.items():
            fresh = self.path[name].clamp_(min=0).div_((p - self.anchor[name]).square_().add_(self.damping))
            self.importance[name] = self.importance[name] + fresh if name in self.importance else fresh
        self.path, self.before = {}, {}

    def state(self) -> dict:
        return {**super().state(), "path": self.path}
