"""GaLore: AdamW whose moments live in a low-rank projection of the gradient of every matrix.

Zhao et al. 2024, https://arxiv.org/abs/2403.03507, algorithm 1. For a weight W (m × n) with gradient G:

    P = the r leading singular vectors of G, renewed every T steps
    R = G P                             (m × r) if P are right singular vectors, else P^T G, (r × n)
    W ← (1 - η λ) W - η α N P^T         N = AdamW's direction for R, its moments as small as R; or P N

The side is the paper's: right singular vectors if m >= n, left ones otherwise, so that the shorter side is
projected. All other parameters, and matrices that r does not make smaller, get plain AdamW; with r from the
shortest side of all up this is AdamW. In contrast to LoRA the change of W is of full rank as soon as P has been
renewed. Each update starts with empty moments, hence with a fresh P.

Differs from the released code: singular vectors have a fixed sign, so moments mean the same before and after a
renewal and on every machine; weights decay before the step and eps is added after the bias correction, as
torch.optim.AdamW does both; rank 16 is the paper plot's (the FoMo-in-Flux config says 8).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fomo.errors import FieldError
from fomo.methods.base import Method
from fomo.recipe import Optimizer
from fomo.schema import Count, NotNegative


@dataclass
class GaLore(Method):
    rank: Count = 16  # r
    gap: Count = 200  # T: steps between renewals of the projection
    scale: NotNegative = 2.0  # α: on the step of projected matrices
    shapes: list[torch.Size] = field(default_factory=list, init=False)  # of projected matrices

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        parameters = super().prepare(model)
        largest = max((min(p.shape) for p in parameters if p.ndim == 2), default=0)
        if self.rank > largest:
            problem = f"{self.rank} is above the shorter side of every matrix of this model"
            raise FieldError("method.rank", f"{problem}, accepted: 1 to {largest}")
        self.shapes = [p.shape for p in parameters if p.ndim == 2 and self.rank < min(p.shape)]
        return parameters

    def optimizer(self, parameters: list, settings: Optimizer) -> torch.optim.Optimizer:
        adamw = {name: getattr(settings, name) for name in ("lr", "betas", "eps", "weight_decay")}
        return GaLoreAdamW(parameters, {**adamw, "rank": self.rank, "gap": self.gap, "scale": self.scale})

    def cost(self, step: float, batch: int) -> tuple[float, float]:
        """The singular vectors, (6 m n² + 20 n³) / T for sides m >= n (Golub and Van Loan, table 8.6.1: R-SVD)."""
        sides = ((max(shape), min(shape)) for shape in self.shapes)
        return sum(6 * m * n**2 + 20 * n**3 for m, n in sides) / self.gap, 0.0


class GaLoreAdamW(torch.optim.Optimizer):
    """Settings of a parameter group: those of AdamW and GaLore's fields.

    State of a parameter: `step`, the moments `exp_avg` and `exp_avg_sq`, and `basis` (P) if it is projected.
    """

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.ndim == 2 and group["rank"] < min(p.shape):
                    p.add_(self.projected(p, group), alpha=-group["lr"] * group["scale"])
                else:
                    p.add_(adam(self.state[p], p.grad, group), alpha=-group["lr"])

    def projected(self, p: Tensor, group: dict) -> Tensor:
        """AdamW's direction for the projected gradient, projected back: (m, n)."""
        state, right = self.state[p], p.shape[0] >= p.shape[1]
        grad = p.grad if right else p.grad.T  # written for the right side
        if state.get("step", 0) % group["gap"] == 0:
            state["basis"] = leading(grad, group["rank"])
        direction = adam(state, grad @ state["basis"], group) @ state["basis"].T
        return direction if right else direction.T


def adam(state: dict, grad: Tensor, group: dict) -> Tensor:
    """One step of the moments in `state` -> the direction to go against."""
    beta1, beta2 = group["betas"]
    if "exp_avg" not in state:
        state.update(step=0, exp_avg=torch.zeros_like(grad), exp_avg_sq=torch.zeros_like(grad))
    state["step"] += 1
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
    return state["exp_avg"] / scale.mul_(1 - beta1 ** state["step"])


def leading(matrix: Tensor, rank: int) -> Tensor:
    """(m, n) -> (n, r): the r leading right singular vectors, each with its largest entry positive."""
    finite = torch.nan_to_num(matrix)  # the loop names the step of a loss that is not finite; SVD would not
    vectors = torch.linalg.svd(finite, full_matrices=False).Vh[:rank].T
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
