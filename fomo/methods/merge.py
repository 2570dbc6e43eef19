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

The follow-up's released code merges as these three do only for EMA-merge and ZS-merge; all its other cells with an
ema leave θ_0 out of it, u_1 = e_1, which is `first_ema: expert`. Its offline merges can take θ_0 in as an expert:
`include_zero_shot: true`.

With interpolation and keep = k, EMA-merge gives u_t = k^t θ_0 + Σ_i (1 - k) k^(t-i) e_i while only u is kept:
constant memory over all updates. So is a_t for the rules that have a running form (weights.Rule.fold); for
the others the experts are kept on disk and mapped. A recipe writes the rule's fields (`keep`, ...) beside these.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from torch import nn

from fomo import weights
from fomo.atomic import OnDisk, write_tensors
from fomo.errors import FieldError
from fomo.methods.base import Autocast, Inputs, Method
from fomo.recipe import Optimizer
from fomo.weights import Weights

KEEPS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # that `auto` chooses among


@dataclass
class Merge(Method):
    init: Literal["zeroshot", "finetuned", "ema", "all"] = "ema"
    deploy: Literal["finetuned", "ema", "all"] = "ema"
    partner: Literal["ema", "base"] = "ema"
    recency: weights.Recency = "equal"  # how `all` weights its experts
    include_zero_shot: bool = False  # take θ_0 into `all` as the oldest expert
    first_ema: Literal["merged", "expert"] = "merged"  # u_1: rule([θ_0, e_1]; θ_0), or e_1
    allow_divergent: bool = False  # run a rule whose displacement grows at every update all the same
    tune: Method = field(default_factory=Method)
    rule: weights.Rule = field(default_factory=weights.Interpolate)
    models: dict[str, Weights] = field(default_factory=dict, init=False)  # "zeroshot", "ema", ..., "running"
    experts: int = field(default=0, init=False)  # e_1 .. e_n
    folder: Path | None = field(default=None, init=False)

    def __post_init__(self):
        if self.include_zero_shot and not self.uses_all:
            raise FieldError("method.include_zero_shot", "is for init or deploy all, which are not said here")
        if self.first_ema == "expert" and (self.partner == "base" or not self.uses_ema):
            raise FieldError("method.first_ema", "is for init or deploy ema, with partner ema")
        if self.uses_all and self.rule.pairwise:
            problem = f"{self.rule.name} merges two models, it has no merge of all experts"
            raise FieldError("method.rule", problem)
        circular = self.init == "ema" and self.partner == "ema"
        if circular and self.rule.growth > 1 + 1e-9 and not self.allow_divergent:
            grows = f"multiplies the distance to the original by {self.rule.growth:g} at every update"
            stable = f"scale must be at most {abs(self.rule.scale) / self.rule.growth:g}"
            raise FieldError(
                "method.scale",
                f"{self.rule.name} under init ema {grows}, so it grows exponentially; {stable} "
                "(or say allow_divergent: true)",
            )

    @property
    def uses_all(self) -> bool:
        return "all" in (self.init, self.deploy)

    @property
    def uses_ema(self) -> bool:
        return "ema" in (self.init, self.deploy)

    def keep_in(self, folder: Path) -> None:
        self.folder = folder / "experts"
        self.tune.keep_in(folder)

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        original = super().export(model)
        needed = {self.init, *(["ema"] * self.uses_ema), *(["running"] * self.uses_all)}
        if self.rule.needs_base or self.uses_all or (self.uses_ema and self.partner == "base"):
            needed.add("zeroshot")
        self.models = dict.fromkeys(needed, original)
        return self.tune.prepare(model)

    def before_update(self, model: nn.Module) -> None:
        self.tune.load(model, self.models[self.init])
        self.tune.before_update(model)

    def optimizer(self, parameters: list[nn.Parameter], settings: Optimizer):
        return self.tune.optimizer(parameters, settings)

    def penalty(self, model, batch, features):
        return self.tune.penalty(model, batch, features)

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        return self.tune.named_parameters(model)

    def after_step(self, model: nn.Module, lr: float) -> None:
        self.tune.after_step(model, lr)

    def after_update(
        self, model: nn.Module, batches: Iterable[Inputs], autocast: Autocast = nullcontext
    ) -> None:
        self.tune.after_update(model, batches, autocast)
        self.experts += 1
        fresh = {"finetuned": self.tune.export(model)}
        if self.uses_ema:
            fresh["ema"] = self.merge_with_old(fresh["finetuned"], self.chosen)
        if self.uses_all:
            fresh["running"], fresh["all"] = self.merge_all(fresh["finetuned"])
        self.models = {name: fresh.get(name, old) for name, old in self.models.items()}
        self.tune.load(model, fresh[self.deploy])

    def merge(self, models: Sequence[Weights], rule: weights.Rule) -> Weights:
        return dict(weights.merge(rule, models, self.models.get("zeroshot")))

    def deployable(self, model: nn.Module) -> Iterator[tuple[float | None, Weights]]:
        if not self.uses_ema:
            yield from super().deployable(model)
            return
        newest = self.tune.export(model)
        for keep in KEEPS if getattr(self.rule, "keep", None) == "auto" else [None]:
            yield keep, self.merge_with_old(newest, keep)

    def merge_with_old(self, newest: Weights, keep: float | None = None) -> Weights:
        """u_t, with the rule's `keep` or another. DARE draws other masks at every update."""
        if self.first_ema == "expert" and self.experts == 1:
            return newest
        old = self.models["zeroshot" if self.partner == "base" else "ema"]
        rule = self.rule if keep is None else replace(self.rule, keep=keep)
        if isinstance(rule, weights.Dare):
            rule = replace(rule, seed=rule.seed + self.experts)
        return self.merge([old, newest], rule)

    def merge_all(self, newest: Weights) -> tuple[Weights, Weights]:
        """-> (running form, merge of all experts); the running form stays θ_0 where the rule has none."""
        n = self.experts + self.include_zero_shot
        weighing = {"weights", "keep"} & {f.name for f in fields(self.rule)}
        alone = replace(self.rule, **dict.fromkeys(weighing))
        backwards = self.recency.startswith("reversed")
        # Running statistics become the mean over all experts, of which only interpolation has a running form.
        measured = not isinstance(self.rule, weights.Interpolate) and any(map(weights.is_statistic, newest))
        fold = None if backwards or measured else self.rule.fold(weights.recency(self.recency, max(n, 2)))
        if fold is not None:
            running = newest if n == 1 else self.merge([self.models["running"], newest], fold)
            return running, self.merge([running], alone)
        write_tensors(newest, self.folder / f"expert_{self.experts:03d}.safetensors")
        experts = [OnDisk(self.folder / f"expert_{i:03d}.safetensors") for i in range(1, self.experts + 1)]
        if self.include_zero_shot:
            experts.insert(0, self.models["zeroshot"])
        weighed = replace(alone, weights=weights.recency(self.recency, n)) if weighing else alone
        return self.models["running"], self.merge(experts, weighed)

    def cost(self, step: float, batch: int) -> tuple[float, float]:
        """The tuning method's, and of each merge 3 FLOPs a parameter to interpolate, 10 by any other rule."""
        per_step, per_update = self.tune.cost(step, batch)
        parameters = sum(tensor.numel() for tensor in self.models[self.init].values())
        once = (3 if isinstance(self.rule, weights.Interpolate) else 10) * parameters
        return per_step, per_update + once * (self.uses_ema + self.uses_all)

    def export(self, model: nn.Module) -> Weights:
        return self.tune.export(model)

    def load(self, model: nn.Module, weights: Weights) -> None:
        self.tune.load(model, weights)

    def state(self) -> dict:
        return {"models": self.models, "experts": self.experts, "tune": self.tune.state()}

    def load_state(self, state: dict) -> None:
        self.models, self.experts = state["models"], state["experts"]
        self.tune.load_state(state["tune"])
