"""What a claim needs: inequalities over scores, and what paired runs say of them.

    ka(finetune) - ka(lora-64) > 0.5                  points of knowledge accumulation after the last update
    zs.early(ema-merge) - zs.start(ema-merge) > 0     the first updates, against the untouched model
    |ka(cosine) - ka(rsqrt)| < 1.5                    no difference that matters
    line(ema-merge) > 0                               above the linear trade-off
    gm.spread(slerp, ties, magmax) < 1                standard deviation over variants

Metrics: ka, zs, gm, and line, the distance of the end from the straight line between the untouched model and
the study's variant `joint` in the KA-ZS plane (points, positive on the side where more is kept and learned).
Moments: end (the default), area (mean over what was scored after updates), first (after the first), early (mean
of the first EARLY scores, 2: at tiny after updates 1 and 4; the best of many would be raised by noise alone),
start, swing (mean step from one score to the next, either way); and spread, of the ends of several variants.

Margins are points of the paper. Its trade-off has another size than that of a run, so a margin becomes a share:

    margin = paper's margin * |joint - untouched| / |joint - untouched| in the paper,   by metric

with the mean over the seeds that are compared. The paper does not print where its joint run ends. PAPER_START
and PAPER_JOINT are the corners of its planes (KA 40 to 60, ZS from the untouched 70 down to 62), within which
it is drawn; the ends of finetuning, below the line, and of AR-rsqrt, above it, leave little room elsewhere.
Where the joint run is not on its side of the untouched model (for ZS: where it ends above), there is no
trade-off: an inequality by `line`, or with a margin on that axis, is not applicable.

Statistics. Runs of one seed share stream, base model and pictures. An inequality's scores are first combined
seed by seed; the S values have their mean, and by Student's t with S - 1 degrees of freedom a 95 % interval. It
is right for noisy, quiet and nearly equal variants alike and for one variant alone. Two variants of one recipe
are the same runs: their difference is 0 with the interval [0, 0]. A variance that is pooled over a study's
variants, or moderated towards the pooled one (Smyth 2004), makes narrower intervals that are wrong for the
variants which differ most from the others: with 3 seeds they cover 70 and 81 % for one of 3.6 times the
deviation (tests/guide/test_coverage.py).

Verdicts. What is said of an inequality a > m is, in this order,

    holds                               the interval lies above the margin m
    opposite                            a is below 0, or below m where m < 0 tolerates a loss
    right direction, below the margin   the interval lies above 0, but not above m > 0
    undecided                           neither; always with a single seed

and a < m turned round. |a| < m holds if the interval lies within the margin, is opposite if a is outside it,
and undecided otherwise. "opposite" is tested one-sidedly at 2.5 % for all inequalities of a claim together
(Holm 1979), so that a claim with many needs is not contradicted by chance; "holds" needs no such care, since
all of them must.
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
EARLY = 2  # scores
MOMENTS: dict[str, Callable[[np.ndarray], float]] = {  # of the scores after updates 0 .. T
    "end": lambda scores: scores[-1],
    "area": lambda scores: scores[1:].mean(),
    "first": lambda scores: scores[1],
    "early": lambda scores: scores[1 : 1 + EARLY].mean(),
    "start": lambda scores: scores[0],
    "swing": lambda scores: abs(np.diff(scores)).mean(),
}
SPREAD = "spread"
JOINT = "joint"  # the variant at the other end of the trade-off line
# Untouched: KA of Table 5; ZS of ViT-B-32 (67.9, the README) and 2 that ViT-B-16 is better by in Table 5.
PAPER_START, PAPER_JOINT = {"ka": 40.0, "zs": 70.0}, {"ka": 60.0, "zs": 62.0}
for corner in (PAPER_START, PAPER_JOINT):
    corner["gm"] = math.sqrt(corner["ka"] * corner["zs"])
HOLDS, WEAK, OPEN, OPPOSITE = "holds", "right direction, below the margin", "undecided", "opposite"
INAPPLICABLE = "not applicable"
LEVEL = 0.95  # of intervals

Scores = Mapping[str, np.ndarray]  # of one run: a name in SCORED -> after updates 0 .. T
ScoresBySeed = Mapping[int, Scores]
Terms = dict[
    tuple[str, str, str] | None, float
]  # (variant, metric, moment) -> its weight; None: the constant


# --- reading an inequality -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Σ weight * measure > margin, or < margin, or |Σ ...| < margin."""

    text: str
    terms: Terms
    margin: float  # points of the paper
    kind: str  # ">", "<" or "||"

    @property
    def mentioned(self) -> list[str]:
        """The variants that it takes."""
        needs_joint = self.margin != 0 or any(metric == "line" for _, metric, _ in self.terms)
        compared = [variant for variants, _, _ in self.terms for variant in variants]
        return list(dict.fromkeys([*compared, *([JOINT] * needs_joint)]))


VARIANT = re.compile(r"([(,]\s*)([\w.@-]+)(?=\s*[,)])")
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
    terms = {key: weight for key, weight in added(left, right, -1).items() if weight}
    margin = -terms.pop(None, 0.0)
    if not terms:
        raise mistake(node, "a comparison of scores")
    metrics = {metric for _, metric, _ in terms}
    if (margin and metrics == {"line"}) or (len(metrics) > 1 and (margin or "line" in metrics)):
        raise mistake(node, "one metric where there is a margin, and line by itself and without one")
    kind = "||" if absolute else "<" if isinstance(sign, ast.Lt) else ">"
    return Comparison(text, terms, margin, kind)


def mistake(node: ast.expr, expected: str) -> ValueError:
    return ValueError(f"column {node.col_offset + 1}: expected {expected}")


def terms_of(node: ast.expr, text: str) -> Terms:
    """What is added up in an expression; `text` is the inequality with the variants' names."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return {None: float(number)}
        case ast.Call(func=word, args=[ast.Name(), *_] as names, keywords=[]):
            variants = tuple(text[name.col_offset : name.end_col_offset] for name in names)
            metric, moment = measure(ast.unparse(word), word.col_offset + 1)
            if (len(variants) > 1) != (moment == SPREAD):
                raise mistake(node, "several variants for a spread, else one")
            return {(variants, metric, moment): 1.0}
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
    if moment and (moment not in (*MOMENTS, SPREAD) or metric == "line"):
        accepted = "none for line" if metric == "line" else ", ".join((*MOMENTS, SPREAD))
        raise ValueError(f"column {column}: unknown moment {moment!r}, accepted: {accepted}")
    return metric, moment or "end"


# --- deciding it -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What the runs say of one inequality."""

    comparison: Comparison
    values: np.ndarray  # what is compared, without the margin, by seed: (S,)
    margin: float | None  # in points of these runs; None: not applicable

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def effect(self) -> float:
        return float(self.values.mean())

    @property
    def error(self) -> float:
        return float(standard_error(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """None with a single seed."""
        if self.n == 1:
            return None
        half = float(half_width(self.values))
        return self.effect - half, self.effect + half

    @property
    def slack(self) -> float:
        """How far the interval (one seed: the effect) is on the right side of the margin; negative: not whole."""
        (low, high), margin = self.interval or (self.effect, self.effect), self.margin or 0.0
        return {">": low - margin, "<": margin - high, "||": margin - max(-low, high)}[self.comparison.kind]

    @property
    def p_opposite(self) -> float:
        """How probable such an effect, or a worse one, is at most where the inequality is not the opposite."""
        if self.n == 1 or self.margin is None:
            return 1.0
        if self.comparison.kind == "||":
            beyond = (abs(self.effect) - self.margin, abs(self.effect) + self.margin)
            return sum(tail(in_units(distance, self.error), self.n - 1) for distance in beyond)
        above = self.comparison.kind == ">"
        beyond = min(self.margin, 0) - self.effect if above else self.effect - max(self.margin, 0)
        return tail(in_units(beyond, self.error), self.n - 1)

    def verdict(self, opposite: bool) -> str:
        """`opposite`: whether p_opposite is small enough, among those of the claim."""
        if self.margin is None:
            return INAPPLICABLE
        if self.interval is None:
            return OPEN
        if self.slack > 0:
            return HOLDS
        if opposite:
            return OPPOSITE
        (low, high), kind = self.interval, self.comparison.kind
        right = (kind == ">" and self.margin > 0 and low > 0) or (
            kind == "<" and self.margin < 0 and high < 0
        )
        return WEAK if right else OPEN


def judge(decisions: list[Decision]) -> list[str]:
    """Of the inequalities of one claim; of those with the smallest p some are the opposite (Holm 1979)."""
    opposite: set[int] = set()
    for i in sorted(range(len(decisions)), key=lambda i: decisions[i].p_opposite):
        if decisions[i].p_opposite > (1 - LEVEL) / 2 / (len(decisions) - len(opposite)):
            break
        opposite.add(i)
    return [decision.verdict(i in opposite) for i, decision in enumerate(decisions)]


def decide(comparison: Comparison, scores: Mapping[str, ScoresBySeed]) -> Decision | None:
    """Over the seeds that all compared variants have; None without any."""
    seeds = sorted(set.intersection(*(set(scores.get(name, {})) for name in comparison.mentioned)))
    if not seeds:
        return None
    joint = {seed: scores[JOINT][seed] for seed in seeds if JOINT in comparison.mentioned}
    values = [
        sum(
            weight
            * measured([scores[variant][seed] for variant in variants], metric, moment, joint.get(seed))
            for (variants, metric, moment), weight in comparison.terms.items()
        )
        for seed in seeds
    ]
    return Decision(comparison, np.array(values), margin_of(comparison, list(joint.values())))


def measured(runs: list[Scores], metric: str, moment: str, joint: Scores | None) -> float:
    if metric == "line":
        return above_line(runs[0], joint)
    if moment == SPREAD:
        return float(np.std([run[metric][-1] for run in runs], ddof=1))
    return float(MOMENTS[moment](runs[0][metric]))


def above_line(run: Scores, joint: Scores) -> float:
    """Signed distance of the end of `run` from the line through the untouched model and the end of `joint`."""
    zs, ka = run["zs"][-1] - run["zs"][0], run["ka"][-1] - run["ka"][0]
    along_zs, along_ka = joint["zs"][-1] - joint["zs"][0], joint["ka"][-1] - joint["ka"][0]
    return float((zs * along_ka - ka * along_zs) / math.hypot(along_zs, along_ka))


def margin_of(comparison: Comparison, joint: list[Scores]) -> float | None:
    """The margin in points of these runs, by the rule above; None where it has no meaning."""
    if not joint:
        return 0.0
    ((_, metric, _), *_) = comparison.terms
    axis = "zs" if metric == "line" else metric
    span = float(np.mean([run[axis][-1] - run[axis][0] for run in joint]))
    share = span / (PAPER_JOINT[axis] - PAPER_START[axis])
    return comparison.margin * share if share > 0 else None


def half_width(values: np.ndarray) -> np.ndarray:
    """Half of the interval of the mean over the last axis."""
    return quantile(values.shape[-1] - 1) * standard_error(values)


def standard_error(values: np.ndarray) -> np.ndarray:
    return values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1])


# --- Student's t -----------------------------------------------------------------------------------------


@cache
def student(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """-> angles x and the share of the distribution between -t and t = sqrt(freedom) tan(x).

    Over x its density is cos(x)^(freedom - 1), up to a factor.
    """
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return x, below / below[-1]


def quantile(freedom: int) -> float:
    """The t such that a share LEVEL lies between -t and t."""
    x, below = student(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(LEVEL, below, x))


def tail(t: float, freedom: int) -> float:
    """The share above t."""
    x, below = student(freedom)
    within = float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), x, below))
    return (1 - within) / 2 if t > 0 else (1 + within) / 2


def in_units(distance: float, error: float) -> float:
    """distance / error; runs that agree to the last bit have no error."""
    return distance / error if error else math.copysign(math.inf, distance) if distance else -math.inf
