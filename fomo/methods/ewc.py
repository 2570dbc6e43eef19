"""Elastic weight consolidation, online: weights that mattered so far are held near where the update starts.

Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3; online: Schwarz et al. 2018, arXiv 1805.06370.

    L(θ) = L_clip(θ) + λ/2 Σ_k F_k (θ_k - θ*_k)²           F ← γ F + F_new after each update

θ* are the weights the update starts from (under a merge, the merged ones). F_new is the diagonal of the
empirical Fisher at the tuned weights: the squared gradient of a batch's training loss, mean over batches, since
the contrastive loss has no gradient of a single sample. The first `samples` samples of the update are seen again
for it, in batches as they were trained on (all three pools), or all of them if an update has fewer.

Differs from the released code, in which trained weights are never stored, the Fisher's loss takes the logit scale
without its exponential, and only update data is seen.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fomo.clip import Features, contrastive_loss, encode
from fomo.methods.base import Autocast, Inputs
from fomo.methods.pull import Pulled
from fomo.schema import Count, NotNegative, Share
from fomo.weights import Weights

SCALE = (
    2.0**10
)  # of the Fisher's loss: small gradients would vanish in fp16; elsewhere a power of 2 changes no bit


@dataclass
class Ewc(Pulled):
    """`importance` is F."""

    strength: NotNegative = 1.0  # λ (e_lambda)
    decay: Share = 1.0  # γ
    samples: Count = 50_000  # that the Fisher is estimated on, rounded up to whole batches

    def penalty(self, model: nn.Module, batch: Inputs, features: Features) -> Tensor | float:
        return self.strength / 2 * self.pull()

    def after_update(
        self, model: nn.Module, batches: Iterable[Inputs], autocast: Autocast = nullcontext
    ) -> None:
        fresh = self.estimate(model, batches, autocast)
        for name, old in self.importance.items():
            fresh[name].add_(old, alpha=self.decay)
        self.importance = fresh

    def estimate(self, model: nn.Module, batches: Iterable[Inputs], autocast: Autocast) -> Weights:
        """F_new. In evaluation mode: nothing is dropped, no running statistics of a batch norm move."""
        model.eval()
        total = {name: torch.zeros_like(p) for name, p in self.trained.items()}
        seen = count = 0
        for batch in batches:
            with autocast():
                features = encode(model, batch.images, batch.tokens)
            loss = SCALE * contrastive_loss(features, batch.text_ids)
            gradients = torch.autograd.grad(loss, list(self.trained.values()), materialize_grads=True)
            for squares, gradient in zip(total.values(), gradients, strict=True):
                squares.addcmul_(gradient, gradient)
            count, seen = count + 1, seen + len(batch.images)
            if seen >= self.samples:
                break
        return {name: squares.div_(max(count, 1) * SCALE**2) for name, squares in total.items()}

    def cost(self, step: float, batch: int) -> tuple[float, float]:
        """The Fisher's batches: a forward and a backward pass each, as in a step."""
        return 0.0, math.ceil(self.samples / batch) * step
