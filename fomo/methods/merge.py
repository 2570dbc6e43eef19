"""Merging over time: what happens to the weights between updates, around any method that tunes them.

Roth et al. 2024, arXiv 2408.14471, sections 5.2 and A.3; Dziadzio et al. 2024, arXiv 2412.06712. Three axes:

    init     where update t starts      zeroshot: θ_0   finetuned: e_{t-1}   ema: u_{t-1}   all: a_{t-1}
    deploy   what is shipped after it                   finetuned: e_t       ema: u_t       all: a_t
    rule     u_t = rule([old, e_t]; θ_0),  old = u_{t-1} (partner: ema) or θ_0 (partner: base)
             a_t = rule([e_1 .. e_t]; θ_0), the experts weighted by `recency`

θ_0 is the untouched model, e_t the weights tuned in update t, u_0 = a_0 = θ_0. The first paper's three:

    EMA-merge   init: ema,       deploy: ema
    ZS-merge    init: zeroshot,  deploy: ema
    FT-merge    init: ema,       deploy: ema,  partner: base

With interpolation and keep = k, EMA-merge gives u_t = k^t θ_0 + Σ_i (1 - k) k^(t-i) e_i while only u is kept:
constant memory over the model's life. So is a_t for the rules that have a running form (weights.Rule.fold); for
the others the experts are kept on disk and mapped. A recipe writes the rule's fields (`keep`, ...) beside these.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from torch import Tensor, nn

from fomo import weights
from fomo.atomic import OnDisk, write_tensors
from fomo.errors import FieldError
from fomo.methods.base import Inputs, Method, Weights
from fomo.recipe import Optimizer
from fomo.schema import build, one_of

INITS, DEPLOYS, PARTNERS = (
    ("zeroshot", "finetuned", "ema", "all"),
    ("finetuned", "ema", "all"),
    ("ema", "base"),
)


@dataclass
class Merge(Method):
    init: str = "ema"
    deploy: str = "ema"
    partner: str = "ema"
    recency: str = "equal"  # how `all` weights its experts
    per_step: bool = False  # take every step's weights into u, not every update's: the online EMA
    allow_divergent: bool = False  # run a rule whose displacement grows at every update all the same
    tune: dict = field(default_factory=lambda: {"name": "finetune"})
    rule: weights.Rule = field(default_factory=weights.Interpolate)
    kept: dict[str, Weights] = field(
        default_factory=dict, init=False
    )  # by the names of the axes, and "running"
    experts: int = field(default=0, init=False)  # e_1 .. e_n
    folder: Path | None = field(default=None, init=False)

    @classmethod
    def from_spec(cls, spec: dict, where: str = "method") -> "Merge":
        """What is not a field of Merge is one of the rule's."""
        names = {f.name for f in fields(cls) if f.init} - {"rule"}
        own = {key: value for key, value in spec.items() if key in names}
        rule = {"rule": "interpolate", **{key: value for key, value in spec.items() if key not in own}}
        merge = build(cls, own, where)
        merge.rule = weights.build_rule(rule, where)
        merge.check(where)
        return merge

    @classmethod
    def accepted(cls, spec: dict) -> set[str]:
        rule = weights.RULES.get(str(spec.get("rule", "interpolate")), weights.Rule)
        return super().accepted(spec) | {f.name for f in fields(rule)}

    def check(self, where: str) -> None:
        from fomo.methods import build_method

        for name, accepted in (("init", INITS), ("deploy", DEPLOYS), ("partner", PARTNERS)):
            one_of(f"{where}.{name}", getattr(self, name), accepted)
        try:
            weights.recency(self.recency, 1)
        except FieldError as error:
            raise FieldError(f"{where}.recency", str(error).partition(": ")[2]) from None
        if self.uses_all and self.rule.pairwise:
            raise FieldError(
                f"{where}.rule", f"{self.rule.name} merges two models, it has no merge of all experts"
            )
        if self.per_step and not (isinstance(self.rule, weights.Interpolate) and not self.uses_all):
            raise FieldError(
                f"{where}.per_step", "is for rule interpolate with init and deploy other than all"
            )
        self.inner = build_method(self.tune, f"{where}.tune")
        circular = self.init == "ema" and self.partner == "ema"
        if circular and self.rule.growth > 1 + 1e-9 and not self.allow_divergent:
            raise FieldError(f"{where}.scale", self.trap())

    def trap(self) -> str:
        grows = (
            f"{self.rule.name} under init ema multiplies the distance to the original by {self.rule.growth:g}"
        )
        stable = f"scale must be at most {abs(self.rule.scale) / self.rule.growth:g}"
        return f"{grows} at every update, so it grows exponentially; {stable} (or say allow_divergent: true)"

    @property
    def uses_all(self) -> bool:
        return "all" in (self.init, self.deploy)

    @property
    def uses_ema(self) -> bool:
        return "ema" in (self.init, self.deploy)

    def keep_in(self, folder: Path) -> None:
        self.folder = folder / "experts"
        self.inner.keep_in(folder)

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        original = super().export(model)
        needed = {self.init, *(["ema"] * self.uses_ema), *(["running"] * self.uses_all)}
        if self.rule.needs_base or self.uses_all or (self.uses_ema and self.partner == "base"):
            needed.add("zeroshot")
        self.kept = dict.fromkeys(needed, original)
        return self.inner.prepare(model)

    def before_update(self, model: nn.Module) -> None:
        self.inner.load(model, self.kept[self.init])
        self.inner.before_update(model)

    def optimizer(self, parameters: list[nn.Parameter], settings: Optimizer):
        return self.inner.optimizer(parameters, settings)

    def penalty(self, model, batch, features):
        return self.inner.penalty(model, batch, features)

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.inner.after_step(model, lr)
        if self.per_step:
            self.kept["ema"] = self.merge([self.kept["ema"], self.inner.export(model)])

    def after_update(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        self.inner.after_update(model, batches)
        self.experts += 1
        fresh = {"finetuned": self.inner.export(model)}
        if self.uses_ema:
            fresh["ema"] = self.kept["ema"] if self.per_step else self.merge_with_old(fresh["finetuned"])
        if self.uses_all:
            fresh["running"], fresh["all"] = self.merge_all(fresh["finetuned"])
        self.kept = {name: fresh.get(name, kept) for name, kept in self.kept.items()}
        self.inner.load(model, fresh[self.deploy])

    def merge(self, models: list[Mapping[str, Tensor]], rule: weights.Rule | None = None) -> Weights:
        return dict(weights.merge(rule or self.rule, models, self.kept.get("zeroshot")))

    def merge_with_old(self, newest: Weights) -> Weights:
        """u_t. DARE draws other masks at every update."""
        old = self.kept["zeroshot" if self.partner == "base" else "ema"]
        seeded = isinstance(self.rule, weights.Dare)
        rule = replace(self.rule, seed=self.rule.seed + self.experts) if seeded else self.rule
        return self.merge([old, newest], rule)

    def merge_all(self, newest: Weights) -> tuple[Weights, Weights]:
        """-> (running form, merge of all experts); the running form stays θ_0 where the rule has none."""
        n = self.experts
        shares = weights.recency(self.recency, n)
        weighing = {"weights", "keep"} & {f.name for f in fields(self.rule)}
        alone = replace(self.rule, **dict.fromkeys(weighing))
        fold = (
            None
            if self.recency.startswith("reversed")
            else self.rule.fold(weights.recency(self.recency, max(n, 2)))
        )
        if fold is not None:
            running = newest if n == 1 else self.merge([self.kept["running"], newest], fold)
            return running, self.merge([running], alone)
        write_tensors(newest, self.folder / f"expert_{n:03d}.safetensors")
        experts = [OnDisk(self.folder / f"expert_{i:03d}.safetensors") for i in range(1, n + 1)]
        return self.kept["running"], self.merge(
            experts, replace(alone, weights=shares) if weighing else alone
        )

    def cost(self, step: float, batch: int) -> tuple[float, float]:
        """The tuning method's, and of each merge 3 FLOPs a parameter to interpolate, 10 by any other rule."""
        per_step, per_update = self.inner.cost(step, batch)
        parameters = sum(tensor.numel() for tensor in self.kept[self.init].values())
        once = (3 if isinstance(self.rule, weights.Interpolate) else 10) * parameters
        if self.per_step:
            return per_step + once, per_update
        return per_step, per_update + once * (self.uses_ema + self.uses_all)

    def export(self, model: nn.Module) -> Weights:
        return self.inner.export(model)

    def load(self, model: nn.Module, weights: Weights) -> None:
        self.inner.load(model, weights)

    def state(self) -> dict:
        return {"kept": self.kept, "experts": self.experts, "inner": self.inner.state()}

    def load_state(self, state: dict) -> None:
        self.kept, self.experts = state["kept"], state["experts"]
        self.inner.load_state(state["inner"])
