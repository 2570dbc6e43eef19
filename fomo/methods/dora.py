"""DoRA, weight-decomposed low-rank adaptation: W = m V / ‖V‖, V = W₀ + α B A. Liu et al. 2024, arXiv 2402.09353.

    A, B     as in LoRA, the direction; trained
    m        magnitudes, one per output row (3d of them for in_proj), at first ‖W₀‖; trained
    ‖V‖      length of each row of V, a constant to the gradient (section 4.3 there)

The DoRA paper writes W with outputs in columns; its ‖.‖_c is the norm of our rows. How it trains: adapters.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fomo.methods.lora import Lora
from fomo.weights import Weights


@dataclass
class Dora(Lora):
    TRAINED: ClassVar[tuple[str, ...]] = ("A", "B", "m")

    def fresh(self, base: Tensor) -> Weights:
        return {**super().fresh(base), "m": lengths(base)}

    def fold(self, base: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        V = super().fold(base, A, B)
        return m / lengths(V.detach()) * V

    def gradients(self, dense: Tensor, base: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Weights:
        V = super().fold(base, A, B)
        length = lengths(V)
        of_m = (dense * V).sum(-1, keepdim=True) / length
        return {"m": of_m, **super().gradients(m / length * dense, base, A, B)}


def lengths(V: Tensor) -> Tensor:
    """(P, out, in) -> (P, out, 1). A row of zeros counts as 1e-12 long and stays what it is."""
    return V.norm(dim=-1, keepdim=True).clamp_min(1e-12)
