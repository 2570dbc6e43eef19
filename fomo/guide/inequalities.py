"""What a claim needs: inequalities over scores, and the verdict that paired runs give.

    ka(finetune) - ka(lora-64) > 0.5                  points of knowledge accumulation at the end of the run
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

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np

SCORED = ("ka", "zs", "gm")  # by every run
METRICS = (*SCORED, "line")
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

Scores = Mapping[str, np.ndarray]  # of one run: a name in SCORED -> after updates 0 .. T
ScoresBySeed = Mapping[int, Scores]


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


Terms = dict[
    tuple[str, str, str] | None, float
]  # (variant, metric, moment) -> its weight; None: the constant
VARIANT = re.compile(r"([a-z]\s*\(\s*)([\w.@-]+)(?=\s*\))")
ABSOLUTE = re.compile(r"^\|([^|]*)\|(?=\s*[<>])")


def parse(text: str) -> Comparison:
    """Read an inequality; a ValueError names the column of what cannot be read.

    Python's own parser does it. What is not Python is replaced by as many characters, so that columns stay: a
    variant's name, which may hold dashes, by underscores, and bars by brackets.
    """
    text = text.strip()
    source = VARIANT.sub(lambda match: match[1] + "_" * len(match[2]), text)
    source, absolute = ABSOLUTE.subn(r"(\1)", source)
    try:
        node = ast.parse(source, mode="eval").body
    except SyntaxError as error:
        raise ValueError(
            f"column {error.offset or len(text) + 1}: expected a number or METRIC(variant)"
        ) from None
    match node:
        case ast.Compare(ops=[ast.Lt() | ast.Gt() as sign], comparators=[bound]):
            left, right = terms_of(node.left, text), terms_of(bound, text)
        case ast.Compare(ops=[ast.Lt() | ast.Gt(), _, *_], comparators=[_, second, *_]):
            raise mistake(second, "the end after one comparison")
        case _:
            raise mistake(node, "one < or >")
    if absolute and (None in left or right.keys() != {None} or isinstance(sign, ast.Gt)):
        raise mistake(node, "|METRIC(variant) ...| < number")
    total = added(left, right, -1)
    margin = -total.pop(None, 0.0)
    kind = "||" if absolute else "<" if isinstance(sign, ast.Lt) else ">"
    return Comparison(text, *factored(total), margin, kind)


def mistake(node: ast.expr, expected: str) -> ValueError:
    return ValueError(f"column {node.col_offset + 1}: expected {expected}")


def terms_of(node: ast.expr, text: str) -> Terms:
    """What is added up in an expression; `text` is the inequality with the variants' names."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return {None: float(number)}
        case ast.Call(func=word, args=[ast.Name() as name], keywords=[]):
            variant = text[name.col_offset : name.end_col_offset]
            return {(variant, *measure(ast.unparse(word), word.col_offset + 1)): 1.0}
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return added({}, terms_of(inner, text), -1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            return added(terms_of(left, text), terms_of(right, text), -1 if isinstance(op, ast.Sub) else 1)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            factor = terms_of(left, text)
            if factor.keys() == {None}:
                return added({}, terms_of(right, text), factor[None])
    raise mistake(node, "a number, METRIC(variant) or number * METRIC(variant)")


def added(terms: Terms, more: Terms, factor: float) -> Terms:
    """terms + factor * more"""
    total = dict(terms)
    for key, weight in more.items():
        total[key] = total.get(key, 0.0) + factor * weight
    return total


def measure(word: str, column: int) -> tuple[str, str]:
    """zs.peak -> (zs, peak)."""
    metric, _, moment = word.partition(".")
    if metric not in METRICS:
        raise ValueError(f"column {column}: unknown metric {metric!r}, accepted: {', '.join(METRICS)}")
    if moment and (moment not in MOMENTS or metric == "line"):
        accepted = "none for line" if metric == "line" else ", ".join(MOMENTS)
        raise ValueError(f"column {column}: unknown moment {moment!r}, accepted: {accepted}")
    return metric, moment or "end"


def factored(terms: Terms) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Terms -> weights by variant times one pattern of measures, the same for every variant."""
    rows: dict[str, dict] = {}
    for (variant, metric, moment), weight in terms.items():
        if weight:
            rows.setdefault(variant, {})[metric, moment] = weight
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


def decide(comparison: Comparison, scores: Mapping[str, ScoresBySeed]) -> Decision | None:
    """The effect over the seeds that all compared variants have, with its 95 % interval; None without any."""
    seeds = sorted(set.intersection(*(set(scores.get(name, {})) for name in comparison.mentioned)))
    if not seeds:
        return None
    by_line = any(metric == "line" for metric, _ in comparison.pattern)
    complete = [
        name for name in scores if set(seeds) <= set(scores[name]) and not (by_line and name == JOINT)
    ]
    table = np.array([[measured(comparison, scores, name, seed) for seed in seeds] for name in complete])
    weights = np.array([comparison.weights.get(name, 0.0) for name in complete])
    effect = float((weights @ table).mean())
    if len(seeds) == 1:
        return Decision(comparison, effect, None, seeds)
    half = half_width(table, weights)
    return Decision(comparison, effect, (effect - half, effect + half), seeds)


def measured(comparison: Comparison, scores: Mapping[str, ScoresBySeed], name: str, seed: int) -> float:
    """The comparison's pattern of measures for one run."""
    run = scores[name][seed]
    return sum(
        share * (above_line(run, scores[JOINT][seed]) if metric == "line" else MOMENTS[moment](run[metric]))
        for (metric, moment), share in comparison.pattern.items()
    )


def above_line(run: Scores, joint: Scores) -> float:
    """Signed distance of the end of `run` from the line through the untouched model and the end of `joint`."""
    zs, ka = run["zs"][-1] - run["zs"][0], run["ka"][-1] - run["ka"][0]
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
    between = noise * max((weights**2).sum() - total**2 / V, 0.0) / S
    common = shared * total**2 / (V * S)
    return math.sqrt(between * student(max((V - 1) * (S - 1), 1)) ** 2 + common * student(S - 1) ** 2)


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
