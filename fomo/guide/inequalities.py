"""What a claim needs: inequalities over scores, and the verdict that paired runs give.

    ka(finetune) - ka(lora-64) > 0.5                  points of knowledge accumulation at the end of the life
    zs.peak(ema-merge) - zs.start(ema-merge) > 0      best after any update, against the untouched model
    |ka(cosine) - ka(rsqrt)| < 1.5                    no difference that matters
    line(ema-merge) > 0                               above the linear trade-off

Metrics: ka, zs, gm, and line, the distance of the end from the straight line between the untouched model and the
study's variant `joint` in the KA-ZS plane (points, positive on the side where more is kept and learned). Moments:
end (the default), area (mean over the updates), first (after the first), peak (best after any), start, swing (mean
step from one update to the next, either way).

Statistics. Runs of one seed share stream, base model and pictures, so score = variant + seed + noise, a two-way
layout of V variants and S seeds. The noise is pooled over all variants of the study: with coefficients a_v,

    Var = MS_E (Σ a² - (Σ a)²/V) / S  +  MS_S (Σ a)² / (V S)

where MS_E is the mean square of the residuals, (V-1)(S-1) degrees of freedom, and MS_S that of the seeds, S-1.
In a difference of variants (Σ a = 0) the seeds cancel and the interval is exact; otherwise each part is widened by
its own quantile of Student's t, which errs on the wide side. A combination of moments, as peak - start, is first
formed for every variant of the study.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

METRICS = ("ka", "zs", "gm", "line")
MOMENTS: dict[str, Callable[[np.ndarray], float]] = {  # of the scores after updates 0 .. T
    "end": lambda scores: scores[-1],
    "area": lambda scores: scores[1:].mean(),
    "first": lambda scores: scores[1],
    "peak": lambda scores: scores[1:].max(),
    "start": lambda scores: scores[0],
    "swing": lambda scores: abs(np.diff(scores)).mean(),
}
JOINT = "joint"  # the variant at the other end of the trade-off line
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"

Life = Mapping[str, np.ndarray]  # "ka", "zs", "gm" -> scores after updates 0 .. T
Lives = Mapping[str, Mapping[int, Life]]  # variant -> seed -> life


# --- reading an inequality -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Σ weight * measure(variant) > margin, or < margin, or |Σ ...| < margin."""

    text: str
    weights: dict[str, float]  # by variant, a_v
    pattern: dict[tuple[str, str], float]  # (metric, moment) -> its share in what is compared
    margin: float
    kind: str  # ">", "<" or "||"

    @property
    def mentioned(self) -> list[str]:
        needs_joint = any(metric == "line" for metric, _ in self.pattern)
        return list(dict.fromkeys([*self.weights, *([JOINT] * needs_joint)]))


TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|([a-z]+(?:\.[a-z]+)?)\s*\(\s*([\w.@-]+)\s*\)|([-+*|<>]))")


def parse(text: str) -> Comparison:
    """Read an inequality; a ValueError names the column of what cannot be read."""
    tokens, column = [], 0
    while text[column:].strip():
        match = TOKEN.match(text, column)
        if not match:
            start = len(text) - len(text[column:].lstrip()) + 1
            raise ValueError(f"column {start}: expected a number, METRIC(variant) or one of + - * | < >")
        tokens.append((match.end() - len(match.group().lstrip()) + 1, *match.groups()))
        column = match.end()
    return Reader(text, tokens).comparison()


class Reader:
    """One inequality, token by token: (column, number, metric, variant, symbol)."""

    def __init__(self, text: str, tokens: list[tuple]):
        self.text, self.tokens, self.at = text, tokens, 0

    def peek(self) -> str | None:
        """The symbol that comes next."""
        return self.tokens[self.at][4] if self.at < len(self.tokens) else None

    def fail(self, expected: str):
        column = self.tokens[self.at][0] if self.at < len(self.tokens) else len(self.text) + 1
        raise ValueError(f"column {column}: expected {expected}")

    def take(self, *symbols: str) -> str:
        if self.peek() not in symbols:
            self.fail(" or ".join(symbols))
        self.at += 1
        return self.tokens[self.at - 1][4]

    def comparison(self) -> Comparison:
        within = self.peek() == "|"
        if within:
            self.take("|")
        terms, constant = self.sum(1.0)
        if within:
            self.take("|")
        sign = self.take("<") if within else self.take("<", ">")
        more, right = self.sum(-1.0)
        if self.at < len(self.tokens):
            self.fail("the end")
        if within and (more or constant):
            raise ValueError("column 1: expected |METRIC(variant) ...| < number")
        kind = "||" if within else sign
        return Comparison(self.text, *factored(terms + more), -constant - right, kind)

    def sum(self, sign: float) -> tuple[list, float]:
        """-> [(weight, (metric, moment), variant)], and what is constant in it."""
        terms, constant, factor = [], 0.0, sign
        if self.peek() == "-":
            self.take("-")
            factor = -sign
        while True:
            weight, term = self.product()
            if term:
                terms.append((factor * weight, *term))
            else:
                constant += factor * weight
            if self.peek() not in ("+", "-"):
                return terms, constant
            factor = sign if self.take("+", "-") == "+" else -sign

    def product(self) -> tuple[float, tuple | None]:
        """A number, a term, or number * term."""
        if self.at == len(self.tokens) or self.peek():
            self.fail("a number or METRIC(variant)")
        column, number, metric, variant, _ = self.tokens[self.at]
        self.at += 1
        if metric:
            return 1.0, (measure(metric, column), variant)
        if self.peek() != "*":
            return float(number), None
        self.take("*")
        weight, term = self.product()
        if term is None:
            self.fail("METRIC(variant) after *")
        return float(number) * weight, term


def measure(word: str, column: int) -> tuple[str, str]:
    """zs.peak -> (zs, peak)."""
    metric, _, moment = word.partition(".")
    if metric not in METRICS:
        raise ValueError(f"column {column}: unknown metric {metric!r}, accepted: {', '.join(METRICS)}")
    if moment and (moment not in MOMENTS or metric == "line"):
        accepted = "none for line" if metric == "line" else ", ".join(MOMENTS)
        raise ValueError(f"column {column}: unknown moment {moment!r}, accepted: {accepted}")
    return metric, moment or "end"


def factored(terms: list[tuple]) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Terms -> weights by variant times one pattern of measures, the same for every variant."""
    rows: dict[str, dict] = {}
    for weight, key, variant in terms:
        row = rows.setdefault(variant, {})
        row[key] = row.get(key, 0.0) + weight
    if not rows:
        raise ValueError("column 1: compares no scores, expected METRIC(variant)")
    pattern = next(iter(rows.values()))
    first = next(iter(pattern))
    weights = {variant: row.get(first, 0.0) / pattern[first] for variant, row in rows.items()}
    for variant, row in rows.items():
        expected = {key: weights[variant] * share for key, share in pattern.items()}
        if row.keys() != expected.keys() or any(abs(row[key] - expected[key]) > 1e-9 for key in row):
            problem = f"{variant} is measured by another combination than {next(iter(rows))}"
            raise ValueError(f"column 1: {problem}; write two inequalities")
    return weights, pattern


# --- deciding it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What the runs say of one inequality; the interval is None with a single seed."""

    comparison: Comparison
    effect: float  # the combination's mean over the seeds, without the margin
    interval: tuple[float, float] | None
    seeds: list[int]

    @property
    def slack(self) -> float:
        """How far the interval (one seed: the effect) is on the right side of the margin; negative: not whole."""
        low, high = self.interval or (self.effect, self.effect)
        margin = self.comparison.margin
        return {">": low - margin, "<": margin - high, "||": margin - max(-low, high)}[self.comparison.kind]

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return OPEN
        (low, high), margin = self.interval, self.comparison.margin
        wrong = {">": high < margin, "<": low > margin, "||": max(low, -high) > margin}[self.comparison.kind]
        return HOLDS if self.slack > 0 else FAILS if wrong else OPEN


def decide(comparison: Comparison, lives: Lives) -> Decision | None:
    """The effect over the seeds that all compared variants have, with its 95 % interval; None without any."""
    seeds = sorted(set.intersection(*(set(lives.get(name, {})) for name in comparison.mentioned)))
    if not seeds:
        return None
    by_line = any(metric == "line" for metric, _ in comparison.pattern)
    complete = [name for name in lives if set(seeds) <= set(lives[name]) and not (by_line and name == JOINT)]
    table = np.array([[measured(comparison, lives, name, seed) for seed in seeds] for name in complete])
    weights = np.array([comparison.weights.get(name, 0.0) for name in complete])
    effect = float((weights @ table).mean())
    if len(seeds) == 1:
        return Decision(comparison, effect, None, seeds)
    half = half_width(table, weights)
    return Decision(comparison, effect, (effect - half, effect + half), seeds)


def measured(comparison: Comparison, lives: Lives, name: str, seed: int) -> float:
    """The comparison's pattern of measures for one run."""
    life = lives[name][seed]
    return sum(
        share * (above_line(life, lives[JOINT][seed]) if metric == "line" else MOMENTS[moment](life[metric]))
        for (metric, moment), share in comparison.pattern.items()
    )


def above_line(life: Life, joint: Life) -> float:
    """Signed distance of the end of `life` from the line through the untouched model and the end of `joint`."""
    zs, ka = life["zs"][-1] - life["zs"][0], life["ka"][-1] - life["ka"][0]
    along_zs, along_ka = joint["zs"][-1] - joint["zs"][0], joint["ka"][-1] - joint["ka"][0]
    return float((zs * along_ka - ka * along_zs) / math.hypot(along_zs, along_ka))


def half_width(table: np.ndarray, weights: np.ndarray) -> float:
    """Half of the 95 % interval of Σ weight * (row mean); table: (V, S)."""
    V, S = table.shape
    seeds = table.mean(axis=0) - table.mean()
    residuals = table - table.mean(axis=1, keepdims=True) - seeds
    noise = (residuals**2).sum() / max((V - 1) * (S - 1), 1)  # MS_E; with one variant there are no residuals
    shared = V * (seeds**2).sum() / (S - 1)  # MS_S
    total = weights.sum()
    own = noise * max((weights**2).sum() - total**2 / V, 0.0) / S
    common = shared * total**2 / (V * S)
    return math.sqrt(own * student(max((V - 1) * (S - 1), 1)) ** 2 + common * student(S - 1) ** 2)


@cache
def student(freedom: int, level: float = 0.95) -> float:
    """The t such that a share `level` of Student's distribution lies between -t and t.

    With t = sqrt(freedom) tan(x) its density is cos(x)^(freedom - 1), up to a factor.
    """
    freedom = min(freedom, 100_000)  # beyond, the normal distribution to 5 digits
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(level * below[-1], below, x))


def verdict_of(decisions: list[Decision]) -> str:
    """A claim holds if all that it needs holds, and does not if any of it does not."""
    verdicts = {decision.verdict for decision in decisions}
    return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


def deciding(decisions: list[Decision]) -> Decision:
    """The inequality on which the verdict rests: of those that share it, the one furthest from holding."""
    verdict = verdict_of(decisions)
    return min((d for d in decisions if d.verdict == verdict), key=lambda d: d.slack)
