"""LoRA, low-rank adaptation: W = W₀ + α B A. Hu et al. 2021, arXiv 2106.09685.

    A (r, in)    kaiming uniform with a = sqrt(r), trained
    B (out, r)   zeros, trained
    α            `alpha`, multiplies B A as it is; peft's lora_alpha is α r

The released code's defaults are rank 5 and α = 1; the paper runs ranks 4 and 64. How it trains: adapters.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fomo.methods.adapters import Adapter
from fomo.weights import Weights


@dataclass
class Lora(Adapter):
    alpha: float = 1.0  # α, the scale of the change
    TRAINED: ClassVar[tuple[str, ...]] = ("A", "B")

    def fresh(self, base: Tensor) -> Weights:
        parts, rows, columns = base.shape
        A = self.uniform(base, parts, self.rank, columns)
        return {"A": A, "B": base.new_zeros(parts, rows, self.rank)}

    def fold(self, base: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return base + self.alpha * (B @ A)

    def gradients(self, dense: Tensor, base: Tensor, A: Tensor, B: Tensor) -> Weights:
        return {"A": self.alpha * (B.mT @ dense), "B": self.alpha * (dense @ A.mT)}
