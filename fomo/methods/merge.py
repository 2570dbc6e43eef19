"""Merging over time: what happens to the weights between updates, around any method that tunes them.

Roth et al. 2024, arXiv 2408.14471, sections 5.2 and A.3; Dziadzio et al. 2024, arXiv 2412.06712. Three axes:

    init     where update t starts      zeroshot: θ_0    finetuned: e_{t-1}    ema: u_{t-1}
    deploy   what is shipped after it                    finetuned: e_t        ema: u_t
    rule     u_t = rule([old, e_t]; θ_0),  old = u_{t-1} (partner: ema) or θ_0 (partner: base)

θ_0 is the untouched model, e_t the weights tuned in update t, u_0 = θ_0. The paper's three:

    EMA-merge   init: ema,       deploy: ema
    ZS-merge    init: zeroshot,  deploy: ema
    FT-merge    init: ema,       deploy: ema,  partner: base

With interpolation and keep = k, EMA-merge gives u_t = k^t θ_0 + Σ_i (1 - k) k^(t-i) e_i while only u is kept:
constant memory over the model's life. A recipe writes the rule's own fields (`keep`, ...) beside these.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from fomo import weights
from fomo.errors import FieldError
from fomo.methods.base import Inputs, Method, Weights
from fomo.recipe import Optimizer, build, one_of

INITS, DEPLOYS, PARTNERS = ("zeroshot", "finetuned", "ema"), ("finetuned", "ema"), ("ema", "base")


@dataclass
class Merge(Method):
    init: str = "ema"
    deploy: str = "ema"
    partner: str = "ema"
    allow_divergent: bool = False  # run a rule whose displacement grows at every update all the same
    tune: dict = field(default_factory=lambda: {"name": "finetune"})
    rule: weights.Rule = field(default_factory=weights.Interpolate)
    kept: dict[str, Weights] = field(default_factory=dict, init=False)  # "zeroshot", "finetuned", "ema"

    @classmethod
    def from_spec(cls, spec: dict, where: str = "method") -> "Merge":
        """What is not a field of Merge is one of the rule's."""
        own = {key: value for key, value in spec.items() if key in cls.__dataclass_fields__ and key != "rule"}
        rule = {"rule": "interpolate", **{key: value for key, value in spec.items() if key not in own}}
        merge = build(cls, own, where)
        merge.rule = weights.build_rule(rule, where)
        merge.check(where)
        return merge

    @classmethod
    def accepted(cls, spec: dict) -> set[str]:
        rule = weights.RULES.get(spec.get("rule", "interpolate"), weights.Rule)
        return super().accepted(spec) | set(rule.__dataclass_fields__)

    def check(self, where: str) -> None:
        from fomo.methods import build_method

        for name, accepted in (("init", INITS), ("deploy", DEPLOYS), ("partner", PARTNERS)):
            one_of(f"{where}.{name}", getattr(self, name), accepted)
        self.inner = build_method(self.tune, f"{where}.tune")
        circular = self.init == "ema" and self.partner == "ema"
        if circular and self.rule.growth > 1 + 1e-9 and not self.allow_divergent:
            stable = abs(self.rule.scale) / self.rule.growth
            raise FieldError(
                f"{where}.scale",
                f"{self.rule.name} under init ema multiplies the distance to the original by "
                f"{self.rule.growth:g} at every update, so it grows exponentially; scale must be at most "
                f"{stable:g} (allow_divergent: true runs it all the same)",
            )

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        original = super().export(model)
        needed = {self.init, self.partner.replace("base", "zeroshot"), *(["zeroshot"] * self.rule.needs_base)}
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

    def after_update(self, model: nn.Module, batches: Iterable[Inputs]) -> None:
        self.inner.after_update(model, batches)
        tuned = self.inner.export(model)
        old = self.kept["zeroshot" if self.partner == "base" else "ema"]
        merged = dict(weights.merge(self.rule, [old, tuned], self.kept.get("zeroshot")))
        fresh = {"finetuned": tuned, "ema": merged}
        self.kept = {name: fresh.get(name, kept) for name, kept in self.kept.items()}
        self.inner.load(model, fresh[self.deploy])

    def export(self, model: nn.Module) -> Weights:
        return self.inner.export(model)

    def load(self, model: nn.Module, weights: Weights) -> None:
        self.inner.load(model, weights)

    def state(self) -> dict:
        return {"kept": self.kept, "inner": self.inner.state()}

    def load_state(self, state: dict) -> None:
        self.kept = state["kept"]
        self.inner.load_state(state["inner"])
