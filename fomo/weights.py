"""Arithmetic on named tensors: the merge rules.

    rule = build_rule({"rule": "ties", "density": 0.2})
    merged = dict(merge(rule, [old, new], base))

θ_0 is the base, θ_1 .. θ_n are the models from oldest to newest, τ_i = θ_i − θ_0 their task vectors. All is
streamed, tensor by tensor and model by model, so a model may be a lazy mapping over a memory-mapped file.

Under `init: ema` a rule sees two models, old = u and new = e, which was trained from old. Written with the
displacements d = u − θ_0 and δ = e − u, each rule's docstring ends with what becomes of d.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal, NamedTuple
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.errors import FieldError, UserError
from fomo.schema import Range, Share, build, dotted, one_of
from fomo.text import plural

Weights = Mapping[str, Tensor]
Named = Iterator[tuple[str, Tensor]]


def merge(rule: "Rule", models: Sequence[Weights], base: Weights | None = None) -> Named:
    """Yield (name, merged tensor), sorted by name; checks and passes over whole models come before the first.

    Arithmetic is float32, on the device of the newest model; a result has the widest dtype that any model or the
    base has it in. Integer buffers and masks are copied from the newest; running statistics are interpolated,
    whatever the rule (`merged_statistic`). No result shares memory with an input. An input tensor is fetched once
    per pass.
    """
    if not models or (rule.pairwise and len(models) != 2):
        expected = "two models, old and new" if rule.pairwise else "at least one model"
        raise UserError(f"{rule.name} merges {expected}, got {len(models)}")
    if getattr(rule, "keep", None) == "auto":
        raise UserError("keep: auto is chosen by `update` after training, here it is a number from 0 to 1")
    if rule.needs_base and base is None:
        raise UserError(f"{rule.name} works on task vectors here: it needs the base model")
    stack = Stack(models, base if rule.needs_base else None)
    return merged_tensors(rule, stack, rule.plan(stack))


def merged_tensors(rule: "Rule", stack: "Stack", plan: Any) -> Named:
    layer_scale = rule.lines.factors(stack.kinds) if rule.lines else {}
    for name, kind in stack.kinds.items():
        if is_constant(name, kind):
            yield name, stack.models[-1][name].clone()
            continue
        if is_statistic(name):
            yield name, merged_statistic(rule, stack, name, layer_scale.get(name, 1.0)).to(kind.dtype)
            continue
        base = None if stack.base is None else stack.read(stack.base, name)
        merged = rule.tensor(name, (stack.read(model, name) for model in stack.models), base, plan)
        if rule.lines:
            merged = torch.lerp(base, merged, layer_scale[name])  # exactly `merged` where the scale is 1
        yield name, merged.to(kind.dtype)


def is_constant(name: str, kind: "Kind | Tensor") -> bool:
    """Counts and ids, and the text's causal mask that some files have: buffers that not every version of a model
    stores, and that no rule merges (of masks, −∞ less −∞ would be NaN)."""
    return not kind.dtype.is_floating_point or name.endswith("attn_mask")


def is_statistic(name: str) -> bool:
    """Whether a buffer of this name is measured while training, as by a batch norm, and not learned."""
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def merged_statistic(rule: "Rule", stack: "Stack", name: str, layer_scale: float) -> Tensor:
    """θ_0 + s (Σ w_i θ_i − θ_0),  0 <= s <= 1: as far as the rule takes weights that all moved alike, no further.

    Beyond what the models measured a variance turns negative, and with DARE it takes one entry; what a rule trims,
    elects or rescales are weights. w_i are the weights of an interpolation, equal if the rule has none.
    """
    count = len(stack.models)
    mean = weighted_sum(rule.averaging(count), (stack.read(model, name) for model in stack.models))
    if stack.base is None:
        return mean
    share = min(max(layer_scale * rule.reach(count), 0.0), 1.0)
    return torch.lerp(stack.read(stack.base, name), mean, share)


class Kind(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Stack:
    """Models that agree in names and shapes, oldest first, and their base; `kinds` are what the merge has."""

    def __init__(self, models: Sequence[Weights], base: Weights | None):
        self.models, self.base, newest = models, base, f"model {len(models)}"
        self.kinds = {name: kind_of(models[-1][name]) for name in sorted(models[-1])}
        for i, model in enumerate(models[:-1], 1):
            self.compare(model, f"model {i}", newest)
        if base is not None:
            self.compare(base, "base", newest)

    def compare(self, other: Weights, label: str, newest: str) -> None:
        if odd := sorted(set(other) ^ set(self.kinds)):
            first = ", ".join(f"{name} only in {label if name in other else newest}" for name in odd[:3])
            raise UserError(f"models differ in {plural(len(odd), 'tensor name')}: {first}")
        for name, kind in self.kinds.items():
            shape, dtype, _ = kind_of(other[name])
            if shape != kind.shape or dtype.is_floating_point != kind.dtype.is_floating_point:
                found, wanted = f"{shape} {dtype} in {label}", f"{kind.shape} {kind.dtype} in {newest}"
                raise UserError(f"models differ in tensor {name}: {found}, {wanted}")
            if (
                dtype.is_floating_point
            ):  # else what one model has in float32 would be rounded as another's bf16
                self.kinds[name] = kind._replace(dtype=torch.promote_types(kind.dtype, dtype))

    @property
    def floats(self) -> list[str]:
        """The names that a rule works on."""
        tensors = self.kinds.items()
        return [name for name, kind in tensors if not (is_constant(name, kind) or is_statistic(name))]

    def read(self, weights: Weights, name: str) -> Tensor:
        """In float32; only float64 stays what it is."""
        tensor, kind = weights[name].detach().contiguous(), self.kinds[name]
        return tensor.to(kind.device, torch.promote_types(kind.dtype, torch.float32))

    def task_vector(self, i: int) -> Iterator[Tensor]:
        return (self.read(self.models[i], name) - self.read(self.base, name) for name in self.floats)


def kind_of(tensor: Tensor) -> Kind:
    return Kind(tuple(tensor.shape), tensor.dtype, tensor.device)


# Blocks are resblocks.N in open_clip, blocks.N in timm, layer.N in Hugging Face.
BLOCK = re.compile(r"(.*?\b(?:resblocks|blocks|layers?|stages))\.(\d+)\.")


@dataclass(frozen=True)
class Lines:
    """θ_0 + s_l (θ − θ_0),  s_l = α + β l / (L − 1) in block l of the L of its tower, α outside blocks.

    LiNeS (Wang et al. 2024, arXiv 2410.17146): layer-wise scaling of the merged task vector, on top of any
    rule. The released code scales weights, not task vectors, with interpolation, and elsewhere drops `scale`.
    """

    alpha: float = 0.5
    beta: float = 0.5

    def factors(self, names: Iterable[str]) -> dict[str, float]:
        """s_l by name."""
        found = {name: (block[1], int(block[2])) for name in names if (block := BLOCK.match(name))}
        last: dict[str, int] = {}  # tower -> L − 1
        for tower, block in found.values():
            last[tower] = max(block, last.get(tower, 1))
        depth = {name: block / last[tower] for name, (tower, block) in found.items()}
        return {name: self.alpha + self.beta * depth.get(name, 0.0) for name in names}


class SumTo1:
    """What a list of shares accepts: Annotated[list[float], SumTo1()]."""

    def __str__(self) -> str:
        return "numbers from 0 that sum to 1"

    def __contains__(self, shares: list[float]) -> bool:
        return min(shares, default=-1) >= 0 and abs(sum(shares) - 1) < 1e-6


Density = Annotated[float, Range(0, 1, above=True)]
Shares = Annotated[list[float], SumTo1()]
Scope = Literal["model", "tensor"]  # what a density is a share of


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A merge rule; its fields are what a recipe may say of it. Every rule takes two models (old, new).

    It defines `tensor`, on weights, or `each` and `combine`, on task vectors.
    """

    lines: Lines | None = None
    scale: ClassVar[float] = 1.0  # of the merged task vector
    feedback: ClassVar[float] = 1.0  # growth at scale 1
    pairwise: ClassVar[bool] = False  # takes two models only
    relative: ClassVar[bool] = True  # works on task vectors

    @property
    def name(self) -> str:
        return next(name for name, rule in RULES.items() if rule is type(self))

    @property
    def needs_base(self) -> bool:
        return self.relative or self.lines is not None

    @property
    def growth(self) -> float:
        """What `init: ema` multiplies d by, root mean square. Above 1, d grows exponentially: the trap."""
        stretch = max(abs(self.lines.alpha), abs(self.lines.alpha + self.lines.beta)) if self.lines else 1.0
        return self.feedback * abs(self.scale) * stretch

    def averaging(self, count: int) -> list[float]:
        """Weights of the models, sum 1, where they are interpolated by any rule: running statistics."""
        return shares(None, count)

    def reach(self, count: int) -> float:
        """s in θ_0 + s τ, the merge of `count` models whose task vectors are all τ."""
        return self.scale

    def plan(self, stack: Stack) -> Any:
        """What must be known of all models before the first tensor can be merged."""

    def fold(self, raw: Sequence[float]) -> "Rule | None":
        """The rule that takes the n-th expert into a running merge of those before it, so that they need not be
        kept: a merge of n models is this rule alone on [running merge]. None where there is no such form.
        raw: the experts' weights up to a common factor, oldest first.
        """

    def tensor(self, name: str, thetas: Iterator[Tensor], base: Tensor | None, plan: Any) -> Tensor:
        """One merged tensor, new memory; thetas come one by one, oldest first."""
        taus = (self.each(theta - base, name, i, plan) for i, theta in enumerate(thetas))
        return self.combine(taus).mul_(self.scale).add_(base)

    def each(self, tau: Tensor, name: str, i: int, plan: Any) -> Tensor:
        """What takes part of the task vector of model i (from 0); may overwrite tau."""
        return tau

    def combine(self, taus: Iterator[Tensor]) -> Tensor:
        return reduce(Tensor.add_, taus)


@dataclass(frozen=True, kw_only=True)
class Interpolate(Rule):
    """Σ w_i θ_i,  Σ w_i = 1;  for two models  keep · old + (1 − keep) · new.

    The paper's merge, section 4 (keep is its w); Wortsman et al. 2022, arXiv 2109.01903. The mean, if neither
    keep nor weights are given. init ema: d ← d + (1 − keep) δ.
    """

    keep: Share | Literal["auto"] | None = None  # 1 returns old bit for bit, 0 new; auto: chosen by `update`
    weights: Shares | None = None  # w_i, oldest first; wins over keep
    relative: ClassVar[bool] = False

    def plan(self, stack):
        return self.averaging(len(stack.models))

    def averaging(self, count):
        if self.weights or self.keep is None:
            return shares(self.weights, count)
        if count != 2:
            raise FieldError("keep", f"is the share of old of two models, got {count} models: give weights")
        return [self.keep, 1 - self.keep]

    def fold(self, raw):
        return Interpolate(keep=sum(raw[:-1]) / sum(raw))

    def tensor(self, name, thetas, base, plan):
        return weighted_sum(plan, thetas)


@dataclass(frozen=True, kw_only=True)
class Slerp(Rule):
    """sin(keep · ω) / sin ω · old + sin((1 − keep) · ω) / sin ω · new,  cos ω = ⟨old, new⟩ / (|old| |new|).

    Shoemake 1985, per tensor; linear where |cos ω| > 0.9995; a zero tensor counts as orthogonal, as in
    mergekit. In the released code the weight pulls the other way than interpolation's.
    init ema: as interpolate.
    """

    keep: Share | Literal["auto"] = 0.5
    pairwise: ClassVar[bool] = True
    relative: ClassVar[bool] = False

    def averaging(self, count):
        return [self.keep, 1 - self.keep]

    def tensor(self, name, thetas, base, plan):
        (old, new), w = thetas, [self.keep, 1 - self.keep]
        cos = F.cosine_similarity(old.flatten(), new.flatten(), dim=0).item()
        if abs(cos) <= 0.9995:
            angle = math.acos(cos)
            w = [math.sin(x * angle) / math.sin(angle) for x in w]
        return weighted_sum(w, [old, new])


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(Rule):
    """θ_0 + scale · Σ τ_i   (Ilharco et al. 2023, arXiv 2212.04089).

    Weights w_i that sum to 1 put n w_i before τ_i, so equal weights change nothing.
    init ema: d ← 2 scale · d + scale · δ, which diverges above 1/2; at 1/2 it is the mean of old and new.
    """

    scale: float = 0.5
    weights: Shares | None = None
    feedback: ClassVar[float] = 2.0

    def plan(self, stack):
        n = len(stack.models)
        return [n * w for w in self.averaging(n)]

    def averaging(self, count):
        return shares(self.weights, count)

    def reach(self, count):
        return count * self.scale

    def fold(self, raw):
        return TaskArithmetic(scale=1.0) if len(set(raw)) == 1 else None  # other weights change with n

    def each(self, tau, name, i, plan):
        return tau.mul_(plan[i])


@dataclass(frozen=True, kw_only=True)
class Ties(Rule):
    """θ_0 + scale · mean{τ̂_i : sign τ̂_i = sign Σ τ̂_j},  τ̂_i the k = int(density · n) largest of τ_i.

    Yadav et al. 2023, arXiv 2306.01708: trim, elect a sign per coordinate (a sum of zero counts as positive),
    average what has it. n counts the whole model or one tensor. The released code ranks each tower, keeps one
    entry too many, or more where magnitudes tie, and gives a sum of zero the sign that is elected most.
    init ema: d ← scale · (mean of d and d + δ; the other where one is trimmed, the larger where signs differ).
    """

    density: Density = 0.2
    scale: float = 1.0
    scope: Scope = "model"

    def plan(self, stack):
        if self.scope == "model":
            return [self.trim(stack.task_vector(i)) for i in range(len(stack.models))]

    def trim(self, taus: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
        """What stays of a task vector: a function of its tensors, in their order, to masks."""
        magnitudes = flat_magnitudes(taus)
        return Largest(int(self.density * len(magnitudes)), magnitudes).mask

    def each(self, tau, name, i, plan):
        stays = plan[i] if plan else self.trim([tau])
        return tau.masked_fill_(~stays(tau), 0)

    def combine(self, taus):
        return elect_and_average(taus)


@dataclass(frozen=True, kw_only=True)
class Dare(Rule):
    """τ̂_i = m_i ⊙ τ_i / density,  m_i ~ Bernoulli(density),  then task_arithmetic, or ties without trimming.

    Yu et al. 2024, arXiv 2311.03099. m_i is a function of (seed, i, tensor name); the released code draws from an
    unseeded generator, a fixed number of entries. init ema: as the rule it ends in, on average; but the noise of
    rescaling grows with d (see feedback), and a seed that stays drops the same entries each time.
    """

    density: Density = 0.2
    scale: float = 0.25  # stable under init ema at this density
    seed: int = 0
    then: Literal["task_arithmetic", "ties"] = "task_arithmetic"

    @property
    def feedback(self):
        """With fresh masks √E[(m_1 + m_2)²] / density, under ties √P(m_1 or m_2) / density."""
        square = 2 + 2 * self.density if self.then == "task_arithmetic" else 2 - self.density
        return math.sqrt(square / self.density)

    def reach(self, count):
        return self.scale if self.then == "ties" else count * self.scale

    def each(self, tau, name, i, plan):
        generator = torch.Generator().manual_seed(crc32(f"{self.seed} {i} {name}".encode()))
        dropped = torch.rand(tau.shape, generator=generator) >= self.density
        return tau.masked_fill_(dropped.to(tau.device), 0).div_(self.density)

    def combine(self, taus):
        return elect_and_average(taus) if self.then == "ties" else reduce(Tensor.add_, taus)


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Ties):
    """Ties where τ̂_i are the int(density · n) largest entries of τ_i after its int(outliers · n) largest.

    Davari & Belilovsky 2024, arXiv 2312.06795, counted as in mergekit, which ranks per tensor: where both shares
    together exceed 1, fewer outliers go. The released code ranks each tower; by its configuration 70 % of the
    smallest and 1 % of the largest go, which is density 0.29 here.
    init ema: as ties, without the outliers.
    """

    outliers: Share = 0.01
    scope: Scope = "tensor"

    def trim(self, taus):
        magnitudes = flat_magnitudes(taus)
        n = len(magnitudes)
        k = int(self.density * n)
        dropped = min(int(self.outliers * n), n - k)
        outliers, largest = Largest(dropped, magnitudes), Largest(dropped + k, magnitudes)
        return lambda tau: largest.mask(tau) & ~outliers.mask(tau)


@dataclass(frozen=True, kw_only=True)
class MagMax(Rule):
    """θ_0 + scale · τ_m,  m = argmax_i |τ_i| per coordinate, where the newer wins a tie.

    Marczak et al. 2024, arXiv 2407.06322. In the released code the older wins.
    init ema: d ← scale · (the larger of d and d + δ).
    """

    scale: float = 1.0

    def fold(self, raw):
        return MagMax(scale=1.0)

    def combine(self, taus):
        return reduce(lambda old, new: torch.where(new.abs() >= old.abs(), new, old), taus)


@dataclass(frozen=True, kw_only=True)
class ModelStock(Rule):
    """t · mean θ_i + (1 − t) · θ_0,  t = n c / (1 + (n − 1) c);  for two models  t = 2c / (1 + c).

    Jang et al. 2024, arXiv 2403.19522, per tensor. c is the mean cosine of all pairs of task vectors, from
    the sum of directions r = Σ τ_i / |τ_i|:  |r|² = n + n (n − 1) c. A model that did not move says nothing of
    where to go and does not count; of one that did, alone, the result is that model. Where directions cancel (the
    pole of t: a logit scale that moved both ways) the result is θ_0. The released code knows two models and
    counts both, so that under init ema it never leaves θ_0.
    init ema: d ← t · (d + δ / 2), from d = δ after the first update.
    """

    def combine(self, taus):
        total, directions, n = 0, 0, 0
        for tau in taus:
            total += tau
            wide = tau.double()  # in float32 a cosine near 0 is rounding, and its sign decides the direction
            length = wide.norm()
            if length > 0:
                directions, n = directions + wide / length, n + 1
        if n < 2:
            return total
        c = (directions.square().sum().item() - n) / (n * (n - 1))
        pole = 1 + (n - 1) * c
        return total.mul_(c / pole if pole > 1e-6 else 0.0)  # t · total / n


@dataclass(frozen=True, kw_only=True)
class Opcm(Rule):
    """θ_0 + A_n · mean |τ_i| / |A_n|,  A_1 = τ_1,  A_i = A_{i−1} + P(τ_i),  P removes what A_{i−1} holds.

    Tang et al. 2025, arXiv 2501.09522. Per matrix, A = U S Vᵀ: P projects out the leading directions, left
    and right, that hold the share alpha of Σ S, then what is left along any u_i v_iᵀ, so that ⟨P(τ), A⟩ = 0;
    other tensors are added up. Norms are the whole model's; of the paper's rescalings only the last matters.
    The authors' code clears only the block where both directions lead. Holds one model's size.
    init ema: d ← d + P(δ) in matrices but 2 d + δ elsewhere; meant for experts that start from θ_0.
    """

    alpha: Share = 0.5
    feedback: ClassVar[float] = 2.0

    def plan(self, stack):
        merged, squares = {}, [0.0] * len(stack.models)
        for name in stack.floats:
            base = stack.read(stack.base, name)
            for i, model in enumerate(stack.models):
                tau = stack.read(model, name) - base
                squares[i] += tau.square().sum().item()
                merged[name] = merged[name] + self.project(tau, merged[name]) if i else tau
        norm = math.sqrt(sum(a.square().sum().item() for a in merged.values()))
        return merged, sum(map(math.sqrt, squares)) / len(squares) / norm if norm else 0.0

    def project(self, tau, merged):
        if tau.ndim != 2 or not merged.any():
            return tau
        u, s, vt = torch.linalg.svd(merged, full_matrices=False)
        r = 1 + int((s.cumsum(0) < self.alpha * s.sum()).sum())
        tau = tau - u[:, :r] @ (u[:, :r].T @ tau)
        tau = tau - (tau @ vt[:r].T) @ vt[:r]
        return tau - (u * torch.einsum("mi,mn,in->i", u, tau, vt)) @ vt

    def tensor(self, name, thetas, base, plan):
        merged, scale = plan
        return merged.pop(name).mul_(scale).add_(base)


RULES: dict[str, type[Rule]] = {
    "interpolate": Interpolate,
    "slerp": Slerp,
    "task_arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": Dare,
    "breadcrumbs": Breadcrumbs,
    "magmax": MagMax,
    "model_stock": ModelStock,
    "opcm": Opcm,
}


def build_rule(spec: dict, where: str = "") -> Rule:
    """{"rule": "ties", "density": 0.2} -> Ties(density=0.2); `where` is spec's dotted path, for messages."""
    one_of(dotted(where, "rule"), spec.get("rule"), tuple(RULES))
    return build(RULES[spec["rule"]], {key: v for key, v in spec.items() if key != "rule"}, where)


RECENCY: dict[str, Callable[[int, int], float]] = {
    "equal": lambda i, n: 1.0,
    "linear": lambda i, n: i,
    "sqrt": lambda i, n: i**0.5,
    "square": lambda i, n: i**2,
    "cube": lambda i, n: i**3,
    "pow5": lambda i, n: i**5,
    "pow10": lambda i, n: i**10,
    "exp2": lambda i, n: 2.0 ** (i - n),  # ∝ 2^i, and never too large
    "log": lambda i, n: math.log(i + 1),
}
Recency = Literal[(*RECENCY, *(f"reversed_{name}" for name in RECENCY))]


def recency(kind: Recency, n: int) -> list[float]:
    """Weights for n models, oldest first, sum 1."""
    raw = [RECENCY[kind.removeprefix("reversed_")](i, n) for i in range(1, n + 1)]
    return [w / sum(raw) for w in (reversed(raw) if kind.startswith("reversed_") else raw)]


def flat_magnitudes(tensors: Iterable[Tensor]) -> Tensor:
    """|x| of all entries in one vector; making it takes twice its memory."""
    return torch.cat([torch.zeros(0), *(tensor.abs().flatten().cpu() for tensor in tensors)])


class Largest:
    """The k entries of largest magnitude in a sequence of tensors: exactly k, the first of those that are equal.

    `magnitudes` are those of all entries; their order is lost, nothing of them is held. Then `mask` wants the same
    tensors in the same order.
    """

    def __init__(self, k: int, magnitudes: Tensor):
        first = len(magnitudes) - k
        self.threshold, self.equals = math.inf, 0  # how many of the entries equal to the threshold are chosen
        if k:
            magnitudes.numpy().partition(
                first
            )  # in place, where torch.kthvalue takes three times the memory more
            self.threshold = magnitudes[first].item()
            self.equals = k - int((magnitudes[first:] > self.threshold).sum())

    def mask(self, tensor: Tensor) -> Tensor:
        """Which entries are among the k; NaN is, so that it shows in the merged model."""
        magnitudes = tensor.abs()
        chosen = ~(magnitudes <= self.threshold)
        equal = (magnitudes == self.threshold).flatten().nonzero().flatten()[: self.equals]
        chosen.view(-1)[equal] = True
        self.equals -= len(equal)
        return chosen


def elect_and_average(taus: Iterator[Tensor]) -> Tensor:
    """Per coordinate, the mean of the values that have the sign of the sum; zeros do not count."""
    total = next(taus)
    up, ups, downs = total.clamp(min=0), (total > 0).short(), (total < 0).short()
    for tau in taus:
        total += tau
        ups += tau > 0
        downs += tau < 0
        up += tau.clamp_(min=0)
        del tau  # before the next one is made
    positive, down = total >= 0, total.sub_(up)
    count = torch.where(positive, ups, downs, out=ups).clamp_(min=1)
    return torch.where(positive, up, down, out=up).div_(count)


def weighted_sum(weights: Sequence[float], tensors: Iterable[Tensor]) -> Tensor:
    """Σ w_i x_i, new memory. What has no weight is left out, so weights 0 and 1 give a tensor bit for bit."""
    total = None
    for w, x in zip(weights, tensors, strict=True):
        if w:
            total = x * w if total is None else total.add_(x, alpha=w)
    return total


def shares(weights: list[float] | None, n: int) -> list[float]:
    if weights and len(weights) != n:
        raise FieldError("weights", f"expected one for each of {n} models, got {weights}")
    return weights or [1 / n] * n
