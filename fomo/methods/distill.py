"""Distillation from the untouched model: θ_0's image-text similarities are kept on the pretraining data.

After ZSCL, Zheng et al. 2023, https://arxiv.org/abs/2303.06628, section 3.2; beyond the paper.

    L(θ) = L_clip(θ) + w T² [KL(rows of p_0 || p) + KL(columns of p_0 || p)] / 2
    p = softmax(e^s <images, texts> / T) over the n pretraining pairs of the batch; p_0 the same for θ_0

s is the logit scale of either model, θ_0 the model as it was before the first update. A batch without a pair from
the pretraining pool has no such term.

Differs from ZSCL: pretraining replay takes the place of its reference images and sentences, so the student's
features are those of the step and only the teacher runs in addition; the student's images are compared with its
own texts, not the teacher's; the mean of both directions, not their sum; averaging of weights is left to `merge`.
"""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fomo.clip import Features, encode
from fomo.methods.base import Inputs, Method
from fomo.schema import NotNegative, Positive

PRETRAINING = 0  # of Inputs.pools


@dataclass
class Distill(Method):
    weight: NotNegative = 1.0  # w
    temperature: Positive = 2.0  # T
    teacher: nn.Module | None = field(default=None, init=False)  # θ_0

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        return super().prepare(model)

    def penalty(self, model: nn.Module, batch: Inputs, features: Features) -> Tensor | float:
        chosen = torch.nonzero(batch.ranks.all_gather(batch.pools) == PRETRAINING)[:, 0]  # (n,)
        if not len(chosen):
            return 0.0
        rows = (*features[:2], *self.targets(batch, features))
        images, texts, old_images, old_texts = (batch.ranks.all_gather(x)[chosen] for x in rows)
        with torch.autocast(images.device.type, enabled=False):  # similarities of ±100 need float32
            old = self.teacher.logit_scale.exp() * old_images @ old_texts.T / self.temperature
            new = features.logit_scale * images @ texts.T / self.temperature  # (n, n)
            divergence = (kl(old, new) + kl(old.T, new.T)) / 2
        return self.weight * self.temperature**2 * divergence

    @torch.no_grad()
    def targets(self, batch: Inputs, features: Features) -> list[Tensor]:
        """The teacher's images and texts (B, D), zeros where a pair is not of the pretraining pool."""
        rows = torch.nonzero(batch.pools == PRETRAINING)[:, 0]
        images, texts = (torch.zeros_like(x) for x in features[:2])
        if len(rows):
            images[rows], texts[rows], *_ = encode(self.teacher, batch.images[rows], batch.tokens[rows])
        return [images, texts]

    def state(self) -> dict:
        return {"teacher": self.teacher.state_dict()}

    def load_state(self, state: dict) -> None:
        self.teacher.load_state_dict(state["teacher"])


def kl(old: Tensor, new: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(old) || softmax(new))."""
    return F.kl_div(new.log_softmax(1), old.log_softmax(1), reduction="batchmean", log_target=True)
