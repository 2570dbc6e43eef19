"""GaLore against torch.linalg.svd and torch.optim.AdamW."""

import io

import pytest
import torch
from small_runs import assert_same, run_method
from torch import nn

from fomo.errors import FieldError
from fomo.methods import build_method
from fomo.methods.galore import leading
from fomo.recipe import Optimizer

SETTINGS = Optimizer(lr=0.1, weight_decay=0.2)


def gradients(shape, count, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(parameters, **fields):
    return build_method({"name": "galore", **fields}).optimizer(parameters, SETTINGS)


def walk(optimizer, parameter, grads):
    """-> the weights after each step."""
    after = []
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        after.append(parameter.detach().clone())
    return after


@pytest.mark.parametrize(
    ("side", "shape", "right"),
    [
        ("std", (7, 5), True),
        ("std", (6, 6), True),
        ("std", (5, 7), False),
        ("reverse_std", (7, 5), False),
        ("reverse_std", (5, 7), True),
        ("right", (5, 7), True),
        ("left", (7, 5), False),
    ],
)
def test_a_step_is_the_explicit_projection(side, shape, right):
    weight, (grad,) = nn.Parameter(gradients(shape, 1, seed=1)[0]), gradients(shape, 1)
    U, _, Vh = torch.linalg.svd(grad)
    if right:
        P = Vh[:2].T
        R = grad @ P
        change = R / (R.abs() + SETTINGS.eps) @ P.T  # AdamW's first step is the sign of R
    else:
        P = U[:, :2]
        R = P.T @ grad
        change = P @ (R / (R.abs() + SETTINGS.eps))
    expected = weight.detach() * (1 - 0.1 * 0.2) - 0.1 * 3.0 * change
    (after,) = walk(optimizer_of([weight], rank=2, scale=3.0, side=side), weight, [grad])
    torch.testing.assert_close(after, expected)


def test_between_renewals_it_is_adamw_on_the_projected_gradient():
    weight, grads = nn.Parameter(gradients((7, 5), 1, seed=1)[0]), gradients((7, 5), 9)
    start = weight.detach().clone()
    low = nn.Parameter(torch.zeros(7, 2))  # moves as the weight does in the plane of P
    settings = {"lr": 0.1, "weight_decay": 0.0}
    theirs = torch.optim.AdamW([low], **settings)
    ours = build_method({"name": "galore", "rank": 2, "gap": 4, "scale": 2.0}).optimizer(
        [weight], Optimizer(**settings)
    )
    expected = start
    for step, (grad, after) in enumerate(zip(grads, walk(ours, weight, grads), strict=True)):
        if step % 4 == 0:
            P = leading(grad, 2)
        before = low.detach().clone()
        low.grad = grad @ P
        theirs.step()
        expected = expected + 2.0 * (low.detach() - before) @ P.T
        torch.testing.assert_close(after, expected)


def test_leading_vectors_are_those_of_the_svd_with_a_fixed_sign():
    (matrix,) = gradients((9, 6), 1)
    vectors = leading(matrix, 3)
    torch.testing.assert_close(vectors.abs(), torch.linalg.svd(matrix).Vh[:3].T.abs())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3))
    torch.testing.assert_close(leading(-matrix, 3), vectors)
    assert vectors.untyped_storage().size() == vectors.numel() * 4  # not a view that keeps all of Vh


def test_full_rank_is_adamw():
    """To 1e-6 after ten steps of 0.1: torch.optim.AdamW divides in another order."""
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (5, 7), (4,), (2, 3, 4))]
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    ours = optimizer_of(parameters, rank=5, scale=2.0)
    theirs = torch.optim.AdamW(others, lr=0.1, weight_decay=0.2)
    for _ in range(10):
        for p, q in zip(parameters, others, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(parameters, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_moments_are_low_rank():
    tall, wide = nn.Parameter(torch.randn(30, 8)), nn.Parameter(torch.randn(8, 30))
    optimizer = optimizer_of([tall, wide], rank=3)
    walk(optimizer, tall, gradients((30, 8), 1))
    walk(optimizer, wide, gradients((8, 30), 1))
    for parameter in (tall, wide):
        shapes = {key: tuple(t.shape) for key, t in optimizer.state[parameter].items() if key != "step"}
        assert shapes == {"exp_avg": (30, 3), "exp_avg_sq": (30, 3), "basis": (8, 3)}


def test_state_loads_with_weights_only_and_goes_on_bit_identically():
    weight, grads = nn.Parameter(torch.randn(7, 5)), gradients((7, 5), 8)
    optimizer = optimizer_of([weight], rank=2, gap=3)
    walk(optimizer, weight, grads[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = nn.Parameter(weight.detach().clone())
    file.seek(0)
    resumed = optimizer_of([again], rank=2, gap=3)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for a, b in zip(walk(optimizer, weight, grads[4:]), walk(resumed, again, grads[4:]), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_that_is_not_finite_reaches_the_weights():
    """The loop then says at which step; SVD would have raised something less clear."""
    weight = nn.Parameter(torch.randn(7, 5))
    (after,) = walk(optimizer_of([weight], rank=2), weight, [torch.full((7, 5), torch.nan)])
    assert not after.isfinite().any()


def test_mistakes_are_refused():
    model = nn.Linear(6, 4)
    with pytest.raises(FieldError, match=r"method\.rank: 5 is above the shorter side .* accepted: 1 to 4"):
        build_method({"name": "galore", "rank": 5}).prepare(model)
    build_method({"name": "galore", "rank": 4}).prepare(model)
    for field, value in (("rank", 0), ("gap", 0), ("scale", -1), ("side", "both")):
        with pytest.raises(FieldError, match=rf"method\.{field}"):
            build_method({"name": "galore", field: value})


def test_a_run_cut_within_an_update_ends_bit_identically(small_scale, tmp_path):
    method = "{name: galore, rank: 4, gap: 3}"
    whole = run_method(small_scale, tmp_path / "whole", method)
    assert_same(whole, run_method(small_scale, tmp_path / "cut", method, cut=6))
