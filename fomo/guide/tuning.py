"""Which of several peak learning rates a method gets, by a rule written down before any trial.

1. A trial's score is GM at the end, a mean over seeds; all trials of a method have the same seeds, at least two.
2. A peak that ends below the untouched model's GM loses to any that does not.
3. Of what is left, the smallest peak that is no worse than the best by more than the noise: the standard error of
   the difference of two trials (the one-standard-error rule of Breiman et al. 1984, CART).

recipes/studies/tune.yaml has the trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    peak: float
    noise: float  # standard error of the difference of two trials, in points
    tied: tuple[float, ...]  # peaks no worse than the best by more than the noise, ascending
    at_end: bool  # the smallest or the largest peak of the ladder: it should be longer
    harmful: bool  # every peak ends below the untouched model


def choose_peak(gm: Mapping[float, Sequence[float]], untouched: Sequence[float]) -> Choice:
    """gm: peak -> GM at the end of each seed's run; untouched: GM of each seed's untouched model."""
    peaks = sorted(gm)
    scores = np.array([gm[peak] for peak in peaks], float)  # (P, S)
    trials, seeds = scores.shape
    if seeds < 2 or trials < 2:
        raise ValueError(f"{trials} trials of {seeds} seeds have no noise to compare them by")
    noise = noise_of(scores)
    means = scores.mean(axis=1)
    fit = means >= np.mean(untouched)
    harmful = not fit.any()
    best = means[fit | harmful].max()
    tied = [p for p, mean, ok in zip(peaks, means, fit | harmful, strict=True) if ok and best - mean <= noise]
    return Choice(tied[0], noise, tuple(tied), tied[0] in (peaks[0], peaks[-1]), harmful)


def noise_of(scores: np.ndarray) -> float:
    """Of (P, S) scores, the standard error of the difference of two rows' means. What a seed adds to all rows
    cancels in it, so the residuals are those of an additive model of rows and seeds."""
    trials, seeds = scores.shape
    expected = scores.mean(axis=1, keepdims=True) + scores.mean(axis=0, keepdims=True) - scores.mean()
    variance = ((scores - expected) ** 2).sum() / ((trials - 1) * (seeds - 1))
    return float(np.sqrt(2 * variance / seeds))
