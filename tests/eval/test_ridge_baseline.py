"""The frozen baseline against the joint ridge solution and against least squares."""

import pytest
import torch
import torch.nn.functional as F

from fomo.eval.ridge_baseline import FrozenBaseline

N, D, C = 90, 12, 5


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=generator)
    centres = torch.randn(C, D, generator=generator)
    features = F.normalize(centres[labels] + 0.5 * torch.randn(N, D, generator=generator), dim=1)
    return features, labels


def learned(features, labels, parts, strength=0.7):
    baseline = FrozenBaseline(strength)
    for part in parts:
        baseline.learn("flags", features[part], labels[part])
    return baseline


def by_class(labels):
    """As concepts come in a stream: update by update, other classes; one class in two of them."""
    first, second = labels >= 3, labels < 2
    return [torch.nonzero(mask)[:, 0] for mask in (first, second, ~(first | second))]


def test_the_recursive_solution_is_the_joint_one(data):
    features, labels = data
    weights, seen = learned(features, labels, by_class(labels)).classifier("flags")
    X, Y = features, F.one_hot(labels).float()
    joint = torch.linalg.solve(X.T @ X + 0.7 * torch.eye(D), X.T @ Y)
    assert seen.tolist() == list(range(C))
    torch.testing.assert_close(weights.float(), joint, rtol=0, atol=1e-5)


def test_it_is_ridge_regression(data):
    """Least squares with the rows sqrt(λ) I added."""
    features, labels = (t.double() if t.is_floating_point() else t for t in data)
    weights, _ = learned(features, labels, [slice(None)], strength=2.0).classifier("flags")
    X = torch.cat([features, 2.0**0.5 * torch.eye(D, dtype=torch.float64)])
    Y = torch.cat([F.one_hot(labels).double(), torch.zeros(D, C, dtype=torch.float64)])
    torch.testing.assert_close(weights, torch.linalg.lstsq(X, Y).solution)


def test_only_classes_that_were_seen_are_predicted(data):
    features, labels = data
    late = torch.nonzero((labels == 1) | (labels == 4))[:, 0]
    baseline = learned(features, labels, [late])
    assert set(baseline.predict("flags", features).tolist()) == {1, 4}
    score = baseline.score("flags", features, labels)
    assert score.n == N and score.metric == "accuracy"
    assert score.score <= 100 * len(late) / N
    assert baseline.score("flags", features[late], labels[late]).score > 90


def test_the_score_grows_with_what_was_seen(data):
    features, labels = data
    baseline, scores = FrozenBaseline(), []
    scores.append(baseline.score("flags", features, labels).score)
    for part in by_class(labels):
        baseline.learn("flags", features[part], labels[part])
        scores.append(baseline.score("flags", features, labels).score)
    assert scores[0] == 0 and scores == sorted(scores) and scores[-1] > 90


def test_datasets_do_not_touch_each_other(data):
    features, labels = data
    alone, both = (learned(features, labels, [slice(None)]) for _ in range(2))
    both.learn("clocks", features.flip(0), labels)
    assert torch.equal(alone.classifier("flags")[0], both.classifier("flags")[0])


def test_learning_nothing_changes_nothing(data):
    features, labels = data
    baseline = learned(features, labels, [slice(0, 0)])
    assert baseline.score("flags", features, labels).score == 0
    baseline.learn("flags", features, labels)
    before = baseline.classifier("flags")[0]
    baseline.learn("flags", features[:0], labels[:0])
    assert torch.equal(before, baseline.classifier("flags")[0])


def test_a_strength_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="strength"):
        FrozenBaseline(0.0)
