"""VeRA, vector-based random matrix adaptation: W = W₀ + diag(b) B diag(d) A. Kopiczko 2023, arXiv 2310.11454.

    A (r, in)    kaiming uniform with a = sqrt(r), frozen, the same for all weights of one shape
    B (out, r)   likewise
    d (r)        zeros, trained
    b (out)      0.1, trained

So there is one pair (A, B) for the attention and one for the MLP of each width; q, k and v share it, each with d
and b of its own. The VeRA paper starts the other way round, d at 0.1 and b at zeros; peft does so too, and slices
one pair for all shapes. Either way W = W₀ at first. How it trains: adapters.py.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from fomo.methods.adapters import Adapter
from fomo.weights import Weights


@dataclass
class Vera(Adapter):
    shared: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)
    TRAINED: ClassVar[tuple[str, ...]] = ("d", "b")

    def fresh(self, base: Tensor) -> Weights:
        parts, rows, columns = base.shape
        if (rows, columns) not in self.shared:
            A, B = self.uniform(base, self.rank, columns), self.uniform(base, rows, self.rank)
            self.shared[rows, columns] = A, B
        A, B = self.shared[rows, columns]
        d, b = base.new_zeros(parts, self.rank, 1), base.new_full((parts, rows, 1), 0.1)
        return {"A": A, "B": B, "d": d, "b": b}

    def fold(self, base: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
        return base + b * (B @ (d * A))

    def gradients(self, dense: Tensor, base: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Weights:
        of_d = (B.mT @ (b * dense) * A).sum(-1, keepdim=True)
        return {"d": of_d, "b": (dense * (B @ (d * A))).sum(-1, keepdim=True)}
