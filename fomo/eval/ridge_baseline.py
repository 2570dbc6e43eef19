"""The frozen baseline: ridge regression on θ_0's image features. Is finetuning worth it at all?

For each dataset, with features X (N, D) of the untouched model and its labels one-hot, Y (N, C):

    W = argmin |X W - Y|² + λ |W|² = (G + λ I)⁻¹ M              G = X^T X, M = X^T Y

G and M are sums over samples. So the solution can be carried from update to update, in any order and without any
picture kept, and is the one of all samples at once. Nothing is forgotten and nothing transfers: a dataset or class
has a score only once its samples were seen. In the manner of RanPAC (McDonnell et al. 2023, arXiv 2307.02251),
without its random projection; classification only.

    baseline = FrozenBaseline()
    baseline.learn("flags", features, labels)            # any number of times
    baseline.score("flags", test_features, test_labels)  # -> eval.Score
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fomo.datasets.eval_sets import TestSet
from fomo.datasets.samples import Samples
from fomo.errors import FieldError
from fomo.eval.zero_shot import Score, proportion

NONE = -1  # the prediction where no class has been seen


@dataclass
class Sums:
    """What is kept of a dataset; float64 on the CPU, the same on every device."""

    gram: Tensor  # (D, D) G
    moment: Tensor  # (C, D) M^T: sum of the features of each class; C grows with the labels
    count: Tensor  # (C,) samples of each class


@dataclass
class FrozenBaseline:
    strength: float = 0.1  # λ, for features of length 1; from 0.01 to 1 it hardly matters
    datasets: dict[str, Sums] = field(default_factory=dict, init=False)

    def __post_init__(self):
        if self.strength <= 0:
            raise FieldError("frozen.strength", f"must be positive, got {self.strength:g}")

    def learn(self, dataset: str, features: Tensor, labels: Tensor) -> None:
        """features (N, D) of θ_0, labels (N,) of one dataset: one update's share of it, or any other."""
        features, labels = features.detach().double().cpu(), labels.cpu()
        if not len(labels):
            return
        width, classes = features.shape[1], int(labels.max()) + 1
        sums = self.datasets.setdefault(dataset, empty(width))
        grown = max(classes - len(sums.count), 0)
        sums.moment, sums.count = F.pad(sums.moment, (0, 0, 0, grown)), F.pad(sums.count, (0, grown))
        sums.gram += features.T @ features
        sums.moment.index_add_(0, labels, features)
        sums.count += torch.bincount(labels, minlength=len(sums.count))

    def classifier(self, dataset: str) -> tuple[Tensor, Tensor]:
        """-> (W (D, S), labels (S,)) for the S classes of the dataset that have been seen."""
        sums = self.datasets[dataset]
        seen = torch.nonzero(sums.count)[:, 0]
        ridge = sums.gram + self.strength * torch.eye(len(sums.gram), dtype=torch.float64)
        return torch.cholesky_solve(sums.moment[seen].T, torch.linalg.cholesky(ridge)), seen

    def predict(self, dataset: str, features: Tensor) -> Tensor:
        """features (N, D) -> labels (N,), always of a class that has been seen."""
        if dataset not in self.datasets:
            return torch.full((len(features),), NONE)
        weights, seen = self.classifier(dataset)
        return seen[(features.double().cpu() @ weights).argmax(1)]

    def score(self, dataset: str, features: Tensor, labels: Tensor) -> Score:
        """Accuracy on test samples of all the dataset's classes, those not seen yet included."""
        return proportion("accuracy", self.predict(dataset, features) == labels.cpu())


def trajectory(
    updates: Iterable[Iterable[tuple[str, Samples, np.ndarray]]], tests: list[TestSet], features: Callable
) -> list[float]:
    """The baseline's KA, percent, before the first update and after each.

    updates: for each, the name, pictures and sample numbers of every dataset in it. tests: the adaptation sets,
    classification. features(samples, numbers) -> (N, D) of the untouched model; each picture is passed once.
    """
    baseline = FrozenBaseline()
    known = [
        (t.name, features(t.samples, t.usable), torch.from_numpy(t.samples.labels[t.usable])) for t in tests
    ]
    means = [0.0]
    for update in updates:
        for name, samples, numbers in update:
            baseline.learn(name, features(samples, numbers), torch.from_numpy(samples.labels[numbers]))
        means.append(sum(baseline.score(*test).score for test in known) / len(known))
    return means


def empty(width: int) -> Sums:
    gram, moment = (torch.zeros(rows, width, dtype=torch.float64) for rows in (width, 0))
    return Sums(gram, moment, torch.zeros(0, dtype=torch.int64))
