"""Learning rate as a pure function of (update, step): `name` within an update, `meta` over all of them.

Roth et al. 2024, https://arxiv.org/abs/2408.14471, section 6.1; for `infinite` Singh et al. 2025,
https://arxiv.org/abs/2503.02844. Symbols, in code and formulas alike:

    N  steps per update    n  step within the update, from 0    a  peak of the first update
    W  warm-up steps       t  update, from 0                    p  peak of update t
    C  cooldown steps                                           m  floor

| meta           | name                | what update t does                                                  |
|----------------|---------------------|---------------------------------------------------------------------|
| none           | all five            | the same curve again, from the peak a                               |
| autoregressive | cosine, rsqrt       | the same curve from a lower peak (AR-cosine, AR-rsqrt)              |
| continued      | cosine, rsqrt       | warms up onto one long curve and follows it (CD-cosine, CD-rsqrt)   |
| matched        | rsqrt               | peak as continued, then the curve of one update (peaks match)       |
| infinite       | cosine, rsqrt, wsd  | one warm-up in all, then a constant; deployed from a branch        |

The first update is the same under the first four. Discretised as released: the last warm-up step is at the
peak, the last step of a cosine at the floor. The number of updates is never needed.
"""

import math
import typing
from dataclasses import dataclass

from fomo.errors import FieldError
from fomo.schema import Share

Name = typing.Literal["cosine", "rsqrt", "linear", "constant", "wsd"]
PAIRS = {
    "none": typing.get_args(Name),
    "autoregressive": ("cosine", "rsqrt"),
    "continued": ("cosine", "rsqrt"),
    "matched": ("rsqrt",),
    "infinite": ("cosine", "rsqrt", "wsd"),
}


@dataclass(frozen=True)
class Schedule:
    name: Name = "cosine"
    meta: typing.Literal["none", "autoregressive", "continued", "matched", "infinite"] = "none"
    warmup: Share = 0.1  # of the update's steps
    cooldown: Share = 0.1  # of the update's steps; of rsqrt, wsd and infinite
    floor: Share = 0.001  # of the peak

    def __post_init__(self):
        if self.name not in PAIRS[self.meta]:
            pairs = "; ".join(f"{meta} with {', '.join(names)}" for meta, names in PAIRS.items())
            found = f"{self.meta!r} does not exist for name {self.name!r}"
            raise FieldError("schedule.meta", f"{found}, accepted: {pairs}")
        cools = self.name in ("rsqrt", "wsd") or self.meta == "infinite"
        if cools and self.warmup + self.cooldown > 1 + 1e-9:
            found = f"{self.cooldown:g} after a warmup of {self.warmup:g}"
            raise FieldError("schedule.cooldown", f"got {found}, accepted: shares that sum to at most 1")

    def phases(self, N: int) -> tuple[int, int]:
        """W = ceil(warmup N) and C = ceil(cooldown N), the latter as far as the warm-up leaves room."""
        W = ceil_share(self.warmup, N)
        if self.name == "rsqrt":
            W = max(W, 1)  # sqrt(W/n) needs a time scale; one step of warm-up is at the peak already
        return W, min(ceil_share(self.cooldown, N), N - W)

    def trunk_steps(self, N: int) -> int:
        """The next update starts from the weights after this many steps: all N, but for `infinite` N - C."""
        return N - self.phases(N)[1] if self.meta == "infinite" else N


def learning_rate(
    schedule: Schedule, peak: float, update: int, step: int, steps: int, *, branch: bool = True
) -> float:
    """Learning rate of `step` (from 0) of `update` (from 0), for `steps` per update.

    `branch` matters to meta `infinite` only: the last C steps of an update are a branch, annealed to the
    floor and deployed; the next update goes on from the weights at `schedule.trunk_steps(steps)`, before the
    annealing. An update thus costs N steps, branch included. `branch=False` is a trunk that runs on instead.
    """
    t, n, N, a, m = update, step, steps, peak, schedule.floor * peak
    if t < 0 or not 0 <= n < N:
        raise ValueError(f"no step {n} of {N} in update {t}")
    W, C = schedule.phases(N)
    if schedule.meta == "infinite":
        trunk = infinite_trunk(schedule, a, t, n, N)
        return anneal(trunk, n, N, C, m) if branch else trunk
    p = update_peak(schedule, a, t, N)
    continued = schedule.meta == "continued"
    if n < W:
        return warm_up(n, W, p)
    if schedule.name == "cosine" and continued:
        return cosine(t * N + n, (t + 1) * N, ceil_share(schedule.warmup, (t + 1) * N), a, m)
    if schedule.name == "cosine":
        return cosine(n, N, W, p, m)
    if schedule.name == "rsqrt":
        value = rsqrt(n + t * (N - C - W), W, a, m) if continued else rsqrt(n, W, p, m)
        return anneal(value, n, N, C, 0.0)
    if schedule.name == "linear":
        return linear(n, N, W, a, m)
    return anneal(a, n, N, C, m) if schedule.name == "wsd" else a


def update_peak(schedule: Schedule, a: float, t: int, N: int) -> float:
    """p, the peak that update t warms up to (for `infinite`, which warms up once, the first update's)."""
    m = schedule.floor * a
    W, C = schedule.phases(N)
    if t == 0 or schedule.meta in ("none", "infinite"):
        return a
    if schedule.name == "cosine":
        return cosine_peak(t, N, W, a, m)
    if schedule.meta == "autoregressive":
        return autoregressive_rsqrt_peak(t, N, W, a, m)
    return matched_peak(t, N, W, C, a, m)


# Curves within one update, p standing for the peak they start from.


def warm_up(n: int, W: int, p: float) -> float:
    """p (n+1)/W: from p/W, not from zero or the floor, up to p at the last step."""
    return p * ((n + 1) / W)


def cosine(n: int, N: int, W: int, p: float, m: float) -> float:
    """Eq. 1: m + (p-m)/2 (1 + cos(π (n-W+1)/(N-W))); the released +1, not printed, ends it exactly at m."""
    return m + (p - m) / 2 * (1 + math.cos(math.pi * ((n - W + 1) / (N - W))))


def rsqrt(n: int, W: int, p: float, m: float) -> float:
    """Eq. 2: m + (p-m) sqrt(W/n). As released, with n from the start of the update and a floor."""
    return m + (p - m) * math.sqrt(W / n)


def linear(n: int, N: int, W: int, p: float, m: float) -> float:
    """m + (p-m) (1 - (n-W+1)/(N-W)): a straight line in place of the cosine. Not in the paper."""
    return m + (p - m) * (1 - (n - W + 1) / (N - W))


def anneal(value: float, n: int, N: int, C: int, m: float) -> float:
    """m + (value-m) (C-1-c)/C in the last C steps, c = n-(N-C); before them `value`.

    The cooldown of rsqrt has m = 0 and a `value` that keeps decaying (eq. 2, as released): it ends at 0.
    The decay of wsd and the branch of infinite end at the floor.
    """
    return value if n < N - C else m + (value - m) * ((N - 1 - n) / C)


# Peaks of later updates (t >= 1). An update that is all warm-up (N = W) leaves the peak at a in each of them.


def cosine_peak(t: int, N: int, W: int, a: float, m: float) -> float:
    """AR-cosine and CD-cosine, eq. 3: m + (a-m)/2 (1 + cos(π (t(N-W)+1)/((t+1)(N-W)))).

    The value of a cosine over all updates so far where this update's warm-up ends. The first update has the
    peak a, as released; eq. 3 with t = 0 would put it one step of the cosine lower.
    """
    if N == W:
        return a
    return m + (a - m) / 2 * (1 + math.cos(math.pi * (t * (N - W) + 1) / ((t + 1) * (N - W))))


def autoregressive_rsqrt_peak(t: int, N: int, W: int, a: float, m: float) -> float:
    """AR-rsqrt: m + (a-m) sqrt((t+1)W/(tN+W)), an rsqrt over all updates so far with a warm-up to match."""
    return m + (a - m) * math.sqrt((t + 1) * W / (t * N + W))


def matched_peak(t: int, N: int, W: int, C: int, a: float, m: float) -> float:
    """Peaks-match and CD-rsqrt: m + (a-m) sqrt(W/(t(N-C)-(t-1)W)), one long rsqrt where this warm-up ends.

    The released CD-rsqrt counts the earlier updates twice and warms up to m + (a-m) sqrt(W/(2t(N-C-W))),
    below the curve that it then jumps onto.
    """
    return m + (a - m) * math.sqrt(W / (t * (N - C) - (t - 1) * W))


def infinite_trunk(schedule: Schedule, a: float, t: int, n: int, N: int) -> float:
    """Warm up once, cool from a to a constant k until step N-C of the first update, then k for all updates.

    cosine: k = (a+m)/2, along a cosine; rsqrt: k = m + (a-m) sqrt(W/(N-C)), along itself; wsd: k = a, so that
    its first update is plain wsd. In the paper k is a parameter.
    """
    m = schedule.floor * a
    W, _ = schedule.phases(N)
    end = schedule.trunk_steps(N)
    cooling = t == 0 and n < end
    if t == 0 and n < W:
        return warm_up(n, W, a)
    if schedule.name == "cosine":
        k = (a + m) / 2
        return cosine(n, end, W, a, k) if cooling else k
    if schedule.name == "rsqrt":
        return rsqrt(n if cooling else end, W, a, m)
    return a


def ceil_share(share: float, steps: int) -> int:
    """ceil(share * steps) without rounding noise: 0.07 of 100 steps is 7, though 0.07 * 100 > 7 in floats."""
    return math.ceil(share * steps - 1e-9)


@dataclass(frozen=True)
class RateCurve:
    """A schedule over all updates: what `python fomo.py schedule` and the report draw."""

    label: str
    schedule: Schedule
    peak: float
    updates: int  # T
    steps: int  # N

    def rates(self, update: int, *, branch: bool = True) -> list[float]:
        """The learning rates of one update (from 0), N of them."""
        return [
            learning_rate(self.schedule, self.peak, update, n, self.steps, branch=branch)
            for n in range(self.steps)
        ]
