"""Synaptic intelligence against loops over scalars, on a model of three parameters."""

import pytest
import torch
from small_runs import assert_same, run_method
from torch import nn

from fomo.errors import FieldError
from fomo.methods import build_method

CURVATURE = torch.tensor([2.0, 0.5, 1.0])


class Quadratic(nn.Module):
    """loss = Σ curvature/2 (w - 1)²."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.3, -0.8, 1.5]))

    def loss(self):
        return (CURVATURE / 2 * (self.w - 1).square()).sum()


def train(model, method, steps, lr=0.1, kind=torch.optim.SGD):
    """One update as the loop takes it; `after_update` is left to the caller."""
    method.before_update(model)
    optimizer = kind(model.parameters(), lr=lr)
    for _ in range(steps):
        (model.loss() + method.penalty(model, None, None)).backward()
        optimizer.step()
        method.after_step(model, lr)
        optimizer.zero_grad(set_to_none=True)


def prepared(**fields):
    model, method = Quadratic(), build_method({"name": "si", **fields})
    method.prepare(model)
    return model, method


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_path_integral_is_the_change_of_the_loss(kind):
    """Up to the discretisation: -g Δ exceeds the exact fall by curvature/2 Δ² each step, so it halves with lr."""
    errors = []
    for lr, steps in ((0.02, 50), (0.01, 100)):
        model, method = prepared()
        before = CURVATURE / 2 * (model.w.detach() - 1).square()
        train(model, method, steps, lr, kind)
        fell = before - CURVATURE / 2 * (model.w.detach() - 1).square()  # by parameter
        torch.testing.assert_close(method.path["w"], fell, rtol=0.05, atol=2e-3)
        errors.append((method.path["w"] - fell).sum().item())
    assert 0 < errors[1] < 0.6 * errors[0]


def test_the_discretisation_error_is_the_one_of_a_quadratic():
    model, method = prepared()
    start, points = model.loss().item(), [model.w.detach().clone()]
    for _ in range(7):
        previous = method.path.get("w", torch.zeros(3))
        train(model, method, 1)
        method.path["w"] += previous  # `train` began a new update
        points.append(model.w.detach().clone())
    moves = torch.stack(points).diff(dim=0)
    excess = (CURVATURE / 2 * moves.square()).sum().item()
    assert method.path["w"].sum().item() == pytest.approx(start - model.loss().item() + excess, rel=1e-5)


def test_importance_is_what_a_loop_over_scalars_gives():
    model, method = prepared(damping=0.3, strength=2.0)
    expected = [0.0, 0.0, 0.0]
    for _ in range(3):
        train(model, method, 5)
        for k in range(3):
            path = max(method.path["w"][k].item(), 0.0)
            moved = model.w[k].item() - method.anchor["w"][k].item()
            expected[k] += path / (moved**2 + 0.3)
        method.after_update(model, [])
    assert method.importance["w"].tolist() == pytest.approx(expected, rel=1e-5)


def test_penalty_and_gradient_are_those_of_a_loop():
    model, method = prepared(strength=3.0)
    train(model, method, 5)
    method.after_update(model, [])
    method.before_update(model)
    with torch.no_grad():
        model.w += torch.tensor([0.1, -0.4, 0.2])
    penalty = method.penalty(model, None, None)
    penalty.backward()
    expected, slopes = 0.0, []
    for k in range(3):
        distance = model.w[k].item() - method.anchor["w"][k].item()
        expected += 3.0 * method.importance["w"][k].item() * distance**2
        slopes.append(2 * 3.0 * method.importance["w"][k].item() * distance)
    assert expected > 0
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    assert model.w.grad.tolist() == pytest.approx(slopes, rel=1e-5)


def test_a_way_that_raised_the_loss_earns_nothing():
    model, method = prepared()
    method.before_update(model)
    method.penalty(model, None, None)
    model.loss().backward()
    with torch.no_grad():
        model.w += model.w.grad  # uphill
    method.after_step(model, 1.0)
    assert (method.path["w"] < 0).all()
    method.after_update(model, [])
    assert method.importance["w"].tolist() == [0, 0, 0]


def test_the_path_begins_anew_with_each_update():
    model, method = prepared()
    train(model, method, 5)
    method.after_update(model, [])
    method.before_update(model)
    assert method.path["w"].tolist() == [0, 0, 0]
    assert torch.equal(method.anchor["w"], model.w)


def test_a_parameter_without_a_gradient_has_no_path():
    model, method = Quadratic(), build_method({"name": "si"})
    model.unused = nn.Parameter(torch.ones(2))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    method.prepare(model)
    train(model, method, 2)
    assert method.path["unused"].tolist() == [0, 0]
    assert "frozen" not in method.path


def test_under_a_merge_the_anchor_is_what_the_update_starts_from():
    model, method = Quadratic(), build_method({"name": "merge", "keep": 0.5, "tune": {"name": "si"}})
    method.prepare(model)
    start = model.w.detach().clone()
    train(model, method, 5)
    tuned = model.w.detach().clone()
    method.after_update(model, [])
    method.before_update(model)
    torch.testing.assert_close(method.inner.anchor["w"], (start + tuned) / 2)
    assert method.inner.importance["w"].sum() > 0


def test_mistakes_are_refused():
    for field, value in (("strength", -0.5), ("damping", 0)):
        with pytest.raises(FieldError, match=rf"method\.{field}"):
            build_method({"name": "si", field: value})


def test_without_strength_it_is_finetuning(small_scale, tmp_path):
    finetuned = run_method(small_scale, tmp_path / "finetune", "{name: finetune}")
    assert_same(finetuned, run_method(small_scale, tmp_path / "si", "{name: si, strength: 0}"))


@pytest.mark.parametrize("cut", [2, 6])  # what the path of the first update is worth shows in the second
def test_a_run_cut_within_an_update_ends_bit_identically(small_scale, tmp_path, cut):
    method = "{name: si, strength: 50}"
    whole = run_method(small_scale, tmp_path / "whole", method)
    assert_same(whole, run_method(small_scale, tmp_path / "cut", method, cut=cut))
