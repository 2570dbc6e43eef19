"""The merge rules against independent sources: peft.utils.merge_utils, closed forms, brute force.

CPU, no downloads:  python -m pytest tests/test_weights.py
"""

import gc
import math
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils

from fomo.errors import UserError
from fomo.weights import Largest, Lines, Ties, build_rule, flat_magnitudes, merge, recency

pytestmark = pytest.mark.filterwarnings("ignore:The density 1.0")  # peft, when it keeps all

SHAPES = {"a.weight": (17, 23), "b.bias": (31,), "c.conv": (4, 3, 5, 5), "d.logit_scale": ()}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# One specification of each rule, with settings that leave work to all of its parts.
SPECS = {
    "interpolate": {"rule": "interpolate", "keep": 0.9},
    "slerp": {"rule": "slerp", "keep": 0.9},
    "task_arithmetic": {"rule": "task_arithmetic", "scale": 0.4},
    "ties": {"rule": "ties", "density": 0.3, "scale": 0.7},
    "dare": {"rule": "dare", "density": 0.6, "scale": 0.4, "seed": 3},
    "breadcrumbs": {"rule": "breadcrumbs", "density": 0.5, "outliers": 0.1},
    "magmax": {"rule": "magmax", "scale": 0.8},
    "model_stock": {"rule": "model_stock"},
    "opcm": {"rule": "opcm"},
}
NARY = [name for name in SPECS if name not in ("interpolate", "slerp")]


def random_model(seed, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def experts_of(base, n, size=0.1):
    """n models near `base`."""
    noise = [random_model(100 + i, {k: t.shape for k, t in base.items()}) for i in range(n)]
    return [{k: (t + size * tau[k]).to(t.dtype) for k, t in base.items()} for tau in noise]


def merged(spec, models, base=None):
    return dict(merge(build_rule(spec), models, base))


def bits_of(tensor):
    """The tensor's bytes: tells −0.0 from 0.0 and NaN payloads apart."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype and got[name].shape == expected[name].shape
        assert bits_of(got[name]) == bits_of(expected[name]), name


def assert_close(got, expected, atol=1e-6):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name].to(got[name].dtype), rtol=1e-6, atol=atol, msg=name
        )


def flat(model):
    return torch.cat([model[name].flatten() for name in sorted(model)])


def displacement(model, base):
    return flat(model) - flat(base)


@pytest.fixture
def base():
    return random_model(0)


@pytest.fixture
def experts(base):
    return experts_of(base, 5)


# Each rule against its independent source


def test_interpolate_is_the_weighted_mean(experts):
    weights = [0.1, 0.2, 0.3, 0.15, 0.25]
    got = merged({"rule": "interpolate", "weights": weights}, experts)
    assert_close(got, {n: sum(w * e[n] for w, e in zip(weights, experts, strict=True)) for n in got})
    got = merged({"rule": "interpolate"}, experts)
    assert_close(got, {n: torch.stack([e[n] for e in experts]).mean(0) for n in got})
    got = merged({"rule": "interpolate", "weights": [0.25, 0.75], "keep": 0.9}, experts[:2])  # weights win
    assert_close(got, {n: 0.25 * experts[0][n] + 0.75 * experts[1][n] for n in got})
    got = merged({"rule": "interpolate", "keep": 0.9}, experts[:2])
    assert_close(got, {n: 0.9 * experts[0][n] + 0.1 * experts[1][n] for n in got})


def mergekit_slerp(t, v0, v1):
    """mergekit's formula in float64; t is the share of v1."""
    v0, v1 = v0.double(), v1.double()
    unit0, unit1 = (v / v.norm() if v.norm() > 1e-8 else v for v in (v0, v1))
    dot = (unit0 * unit1).sum()
    if dot.abs() > 0.9995:
        return (1 - t) * v0 + t * v1
    theta = torch.arccos(dot)
    return torch.sin(theta - theta * t) / torch.sin(theta) * v0 + torch.sin(theta * t) / torch.sin(theta) * v1


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("size", [3.0, 0.3, 0.001])  # right angle, acute, below the linear limit
def test_slerp_equals_mergekit(base, keep, size):
    (new,) = experts_of(base, 1, size)
    base["b.bias"].zero_()
    got = merged({"rule": "slerp", "keep": keep}, [base, new])
    assert_close(got, {n: mergekit_slerp(1 - keep, base[n], new[n]) for n in got})


def test_slerp_turns_by_the_share_of_new_and_keeps_the_norm():
    old, new = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    got = merged({"rule": "slerp", "keep": 2 / 3}, [{"w": old}, {"w": new}])["w"]
    torch.testing.assert_close(got, 2 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))


@pytest.mark.parametrize("weights", [None, [0.1, 0.2, 0.3, 0.15, 0.25]])
def test_task_arithmetic_equals_peft(base, experts, weights):
    got = merged({"rule": "task_arithmetic", "scale": 0.3, "weights": weights}, experts, base)
    factors = 0.3 * 5 * torch.tensor(weights or [0.2] * 5)
    taus = {n: [e[n] - base[n] for e in experts] for n in base}
    assert_close(got, {n: base[n] + merge_utils.task_arithmetic(taus[n], factors) for n in base})


@pytest.mark.parametrize("density", [0.003, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_ties_equals_peft(base, experts, density, n):
    experts = experts[:n]
    spec = {"rule": "ties", "density": density, "scale": 0.7}

    got = merged({**spec, "scope": "tensor"}, experts, base)
    taus = {name: [e[name] - base[name] for e in experts] for name in base}
    expected = {name: merge_utils.ties(taus[name], 0.7 * torch.ones(n), density) for name in base}
    assert_close(got, {name: base[name] + expected[name] for name in base})

    got = merged(spec, experts, base)
    expected = merge_utils.ties([displacement(e, base) for e in experts], 0.7 * torch.ones(n), density)
    torch.testing.assert_close(displacement(got, base), expected, rtol=1e-6, atol=1e-6)


def test_ties_of_two_models_by_hand():
    """Both agree: mean. They differ: the larger. A sum of zero: the positive one. One is trimmed: the other."""
    old, new = torch.tensor([2.0, 3.0, -2.0, 0.1, 2.0]), torch.tensor([4.0, -2.0, 2.0, 2.0, 0.1])
    base = {"w": torch.zeros(5)}
    got = merged({"rule": "ties", "density": 0.8}, [{"w": old}, {"w": new}], base)["w"]
    assert got.tolist() == [3.0, 3.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("then", ["task_arithmetic", "ties"])
def test_dare_equals_peft_given_the_masks(base, experts, then, monkeypatch):
    rule = build_rule({"rule": "dare", "density": 0.4, "scale": 0.5, "seed": 7, "then": then})
    peft = {"task_arithmetic": merge_utils.dare_linear, "ties": merge_utils.dare_ties}[then]
    got = dict(merge(rule, experts, base))
    for name in base:
        ones = torch.ones_like(base[name])
        masks = iter([(rule.each(ones.clone(), name, i, None) > 0).float() for i in range(5)])
        monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda input, masks=masks: next(masks))
        expected = base[name] + peft([e[name] - base[name] for e in experts], 0.5 * torch.ones(5), 0.4)
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)


def mergekit_magnitude_outliers(tau, density, gamma):
    """mergekit's sparsify.magnitude_outliers by sorting, but with density 1 and n_top 0 as they should be."""
    n = tau.numel()
    target, top = int(density * n), int(gamma * n)
    bottom = n - target - top
    if bottom < 0:
        top, bottom = top + bottom, 0
    mask = torch.zeros(n)
    mask[tau.abs().flatten().sort().indices[bottom : n - top]] = 1
    return tau * mask.view(tau.shape)


@pytest.mark.parametrize("density,outliers", [(0.2, 0.01), (0.5, 0.1), (0.95, 0.3), (1.0, 0.5), (0.3, 0.0)])
def test_breadcrumbs_is_mergekits_mask_and_pefts_election(base, experts, density, outliers):
    spec = {"rule": "breadcrumbs", "density": density, "outliers": outliers, "scale": 0.9}
    got = merged(spec, experts, base)
    for name in base:
        taus = [mergekit_magnitude_outliers(e[name] - base[name], density, outliers) for e in experts]
        expected = base[name] + merge_utils.ties(taus, 0.9 * torch.ones(5), density=1.0)
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-6)


RELEASED = {  # 30 % stays, of breadcrumbs without the largest 1 %
    "ties": {"rule": "ties", "density": 0.3},
    "dare": {"rule": "dare", "density": 0.3, "then": "ties", "scale": 1.0},
    "breadcrumbs": {"rule": "breadcrumbs", "density": 0.29, "outliers": 0.01, "scope": "model"},
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_settings_by_sorting_the_whole_model(name, base, experts):
    """The flattened model, trimmed by sorting (or by the drawn masks), with peft's election of signs."""
    rule = build_rule(RELEASED[name])
    got = displacement(dict(merge(rule, experts, base)), base)
    taus = [displacement(e, base) for e in experts]
    if name == "dare":
        masks = [[rule.each(t * 0 + 1, n, i, None) > 0 for n, t in sorted(base.items())] for i in range(5)]
        trimmed = [t * torch.cat([m.flatten() for m in ms]) / 0.3 for t, ms in zip(taus, masks, strict=True)]
    else:
        n, trimmed = len(taus[0]), []
        stop = n - int(0.01 * n) if name == "breadcrumbs" else n
        for tau in taus:
            mask = torch.zeros(n)
            mask[tau.abs().sort().indices[stop - int(rule.density * n) : stop]] = 1
            trimmed.append(tau * mask)
    expected = merge_utils.ties(trimmed, torch.ones(5), density=1.0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_magmax_by_brute_force_and_the_newer_wins_a_tie(base, experts):
    got = merged({"rule": "magmax", "scale": 0.8}, experts, base)
    taus = torch.stack([displacement(e, base) for e in experts]).T.tolist()
    expected = [0.8 * max(column, key=abs) for column in taus]
    torch.testing.assert_close(displacement(got, base), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    zero, old, new = ({"w": torch.tensor([0.0, x, 1.0])} for x in (0.0, 2.0, -2.0))
    assert merged({"rule": "magmax"}, [old, new], zero)["w"].tolist() == [0.0, -2.0, 1.0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_model_stock_in_closed_form(base, experts, n):
    shared = random_model(9)  # a common direction, so that the cosine is away from 0
    experts = [{k: t + 0.1 * shared[k] for k, t in e.items()} for e in experts[:n]]
    got = merged({"rule": "model_stock"}, experts, base)
    for name in base:
        taus = [(e[name].double() - base[name].double()).flatten() for e in experts]
        pairs = [(a, b) for i, a in enumerate(taus) for b in taus[:i]]
        c = sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / len(pairs)
        if n == 2 and name == "a.weight":
            assert 0.1 < c < 0.9
        t = n * c / (1 + (n - 1) * c)
        mean = sum(e[name].double() for e in experts) / n
        torch.testing.assert_close(got[name].double(), t * mean + (1 - t) * base[name], rtol=1e-5, atol=1e-5)


def test_model_stock_where_the_formula_has_no_value(base):
    one = {n: t + 1 for n, t in base.items()}
    assert_close(merged({"rule": "model_stock"}, [one], base), one)  # nothing to compare with
    opposite = {n: t - 2 for n, t in base.items()}  # cosine −1, the pole; scalars meet it often
    assert_close(merged({"rule": "model_stock"}, [one, opposite], base), base)


@pytest.mark.parametrize("n", [2, 3])
def test_a_model_that_did_not_move_does_not_count_in_model_stock(base, experts, n):
    moved = experts[: n - 1]
    expected = merged({"rule": "model_stock"}, moved, base)
    for place in range(n):
        got = merged({"rule": "model_stock"}, [*moved[:place], base, *moved[place:]], base)
        assert_close(got, expected)


def test_the_cosine_of_model_stock_is_taken_in_float64():
    """A cosine of 1e-8, which is noise of any sign in float32."""
    n = 100_000
    torch.manual_seed(0)
    a, b = torch.randn(2, n)
    b -= (a.double() @ b.double() / a.double().square().sum()).float() * a
    b[0] += 1e-3 / a[0]
    models = [{"w": a}, {"w": b}]
    c = float(a.double() @ b.double() / a.double().norm() / b.double().norm())
    got = merged({"rule": "model_stock"}, models, {"w": torch.zeros(n)})["w"].double()
    expected = c / (1 + c) * (a.double() + b.double())
    assert 0 < c < 1e-7 and (got - expected).norm() < 1e-3 * expected.norm()


# Degenerate inputs, in closed form


def stays_in_place(name, tau):
    """What of one task vector the rule keeps, by sorting: `tau` whole, or its largest entries."""
    share = {"ties": 0.3, "breadcrumbs": 0.5}.get(name)
    if share is None:
        return tau
    k, top = int(share * tau.numel()), int(0.1 * tau.numel()) if name == "breadcrumbs" else 0
    order = tau.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(tau.numel())
    mask[order[top : top + k]] = 1
    return tau * mask.view(tau.shape)


SCALES = {"task_arithmetic": 0.4, "ties": 0.7, "magmax": 0.8}
# What becomes of τ in: one model that moved by it; that and one that did not move; two that moved by it.
DEGENERATE = {
    "task_arithmetic": (1, 1, 2),
    "ties": (1, 1, 1),
    "breadcrumbs": (1, 1, 1),
    "magmax": (1, 1, 1),
    "model_stock": (1, 1, 1),
    "opcm": (1, 0.5, 1),  # the norm is the mean of all models, one that did not move among them
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("case", ["one model", "one did not move", "two are equal"])
def test_one_model_a_zero_task_vector_and_two_equal_models(name, case):
    base = {"w": torch.randn(20, 15, generator=torch.Generator().manual_seed(1))}
    (expert,) = experts_of(base, 1)
    lists = {"one model": [expert], "one did not move": [base, expert], "two are equal": [expert, expert]}
    got = merged(SPECS[name], lists[case], base)["w"]
    factor = DEGENERATE[name][list(lists).index(case)] * SCALES.get(name, 1.0)
    expected = base["w"] + factor * stays_in_place(name, expert["w"] - base["w"])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_dare_interpolate_and_slerp_where_nothing_moved_or_both_are_equal(base, experts):
    expert = experts[0]
    dare = build_rule(SPECS["dare"])
    factors = displacement(dict(merge(dare, [base, expert], base)), base) / displacement(expert, base)
    assert all(f == pytest.approx(0, abs=1e-2) or f == pytest.approx(0.4 / 0.6, abs=1e-2) for f in factors)
    for name in ("interpolate", "slerp"):
        assert_close(merged(SPECS[name], [expert, expert]), expert)
    assert_close(merged({"rule": "interpolate"}, [expert]), expert)
    zero = {n: torch.zeros_like(t) for n, t in base.items()}
    assert all(torch.isfinite(t).all() for t in merged(SPECS["slerp"], [zero, expert]).values())
    assert_close(merged(SPECS["slerp"], [zero, zero]), zero)


def test_opcm_keeps_the_mean_norm_and_adds_what_is_orthogonal(base, experts):
    for n in (1, 2, 5):
        got = merged({"rule": "opcm", "alpha": 0.5}, experts[:n], base)
        norm = torch.stack([displacement(e, base).norm() for e in experts[:n]]).mean()
        torch.testing.assert_close(displacement(got, base).norm(), norm, rtol=1e-5, atol=1e-6)

    rule, held = build_rule({"rule": "opcm", "alpha": 0.5}), torch.randn(20, 12) @ torch.randn(12, 9)
    tau = torch.randn(20, 9)
    added = rule.project(tau, held)
    u, s, vt = torch.linalg.svd(held, full_matrices=False)
    r = next(i for i in range(1, 10) if s[:i].sum() >= 0.5 * s.sum())  # the fewest that hold half
    assert (u[:, :r].T @ added).abs().max() < 1e-5 and (added @ vt[:r].T).abs().max() < 1e-5
    assert abs((added * held).sum() / held.norm() / added.norm()) < 1e-6
    assert (u[:, r:].T @ added).norm() > 1 and 0 < r < 9  # and something is left
    assert torch.equal(rule.project(tau, torch.zeros_like(tau)), tau)


def test_opcm_equals_the_papers_recursion():
    """Δ_t = (λ_{t−1} Δ_{t−1} + P(τ_t)) / λ_t, with λ_t such that |Δ_t| is the mean norm so far, step by step."""
    rule, taus = build_rule({"rule": "opcm"}), [torch.randn(8, 6, dtype=torch.float64) for _ in range(4)]
    delta, lam = taus[0], 1.0
    for t in range(1, 4):
        total = lam * delta + rule.project(taus[t], delta)
        lam = total.norm() / torch.stack([tau.norm() for tau in taus[: t + 1]]).mean()
        delta = total / lam
    zero = {"w": torch.zeros(8, 6, dtype=torch.float64)}
    assert_close(merged({"rule": "opcm"}, [{"w": tau} for tau in taus], zero), {"w": delta})


# LiNeS


NAMES = [
    "visual.conv1.weight",
    *(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(4)),
    *(f"transformer.resblocks.{i}.ln_1.bias" for i in range(11)),
    "visual.trunk.blocks.0.attn.q.weight",
    "logit_scale",
    "text.proj.0.weight",
]


def test_lines_scales_by_depth_within_each_tower():
    factors = Lines(alpha=0.2, beta=0.6).factors(NAMES)
    visual = [factors[f"visual.transformer.resblocks.{i}.mlp.c_fc.weight"] for i in range(4)]
    assert visual == pytest.approx([0.2, 0.4, 0.6, 0.8])
    text = [factors[f"transformer.resblocks.{i}.ln_1.bias"] for i in range(11)]
    assert text == pytest.approx([0.2 + 0.06 * i for i in range(11)])
    outside = [
        "visual.conv1.weight",
        "logit_scale",
        "text.proj.0.weight",
        "visual.trunk.blocks.0.attn.q.weight",
    ]
    assert [factors[name] for name in outside] == [0.2] * 4  # a tower of one block has no depth


@pytest.mark.parametrize("name", list(SPECS))
def test_lines_scales_the_task_vector_of_any_rule(name):
    shapes = dict.fromkeys(NAMES, (6, 5))
    base = random_model(0, shapes)
    models = experts_of(base, 2)
    plain = merged(SPECS[name], models, base)
    got = merged({**SPECS[name], "lines": {"alpha": 0.2, "beta": 0.6}}, models, base)
    s = Lines(alpha=0.2, beta=0.6).factors(NAMES)
    assert_close(got, {n: base[n] + s[n] * (plain[n] - base[n]) for n in NAMES})
    neutral = merged({**SPECS[name], "lines": {"alpha": 1.0, "beta": 0.0}}, models, base)
    assert_same_bits(neutral, plain)


# What holds for all rules


numbers = st.lists(st.floats(width=32, allow_nan=False), min_size=6, max_size=6)
ODD = [-0.0, 0.0, math.inf, -math.inf, 1e-45, -3.4e38]


@pytest.mark.parametrize("rule", ["interpolate", "slerp"])
@given(old=numbers, new=numbers, dtype=st.sampled_from(FLOATS))
@example(old=ODD, new=ODD[::-1], dtype=torch.float32)
@example(old=ODD[::-1], new=[1.0] * 6, dtype=torch.bfloat16)
@settings(max_examples=100, deadline=None)
def test_keep_1_returns_old_and_keep_0_new_bit_for_bit(rule, old, new, dtype):
    models = [{"w": torch.tensor(values, dtype=dtype)} for values in (old, new)]
    assert_same_bits(merged({"rule": rule, "keep": 1.0}, models), models[0])
    assert_same_bits(merged({"rule": rule, "keep": 0.0}, models), models[1])


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("dtype", FLOATS)
def test_integers_come_from_the_newest_and_floats_keep_their_dtype(name, dtype):
    base = random_model(0, dtype=dtype)
    models = [base, *experts_of(base, 1)]
    for i, model in enumerate([*models, base := dict(base)]):
        model |= {
            "n_seen": torch.tensor(10 + i),
            "mask": torch.tensor([i == 1, True]),
            "empty": torch.zeros(0, 3),
        }
    got = merged(SPECS[name], models, base)
    assert got["n_seen"] == 11 and got["mask"].tolist() == [True, True] and got["empty"].shape == (0, 3)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in models[1].items()}
    # float32 arithmetic: the same as on float32 copies, rounded once at the end
    wide = [{n: t.float() if t.is_floating_point() else t for n, t in m.items()} for m in (*models, base)]
    expected = merged(SPECS[name], wide[:2], wide[2])
    if dtype != torch.float64:
        assert_same_bits(got, {n: t.to(got[n].dtype) for n, t in expected.items()})


@pytest.mark.parametrize("name", list(SPECS))
def test_inputs_stay_untouched_and_unshared(name, base):
    models = experts_of(base, 2)
    models[0]["a.weight"] = models[0]["a.weight"].T.contiguous().T  # not contiguous
    models[1]["b.bias"].requires_grad_()
    for model in (*models, base):
        model["n_seen"] = torch.tensor([1, 2])
    before = [{n: t.detach().clone() for n, t in m.items()} for m in (*models, base)]
    got = merged(SPECS[name], models, base)
    for model, copy in zip((*models, base), before, strict=True):
        assert all(torch.equal(model[n], copy[n]) for n in copy)
        shared = {t.untyped_storage().data_ptr() for t in model.values()}
        assert not any(t.untyped_storage().data_ptr() in shared or t.requires_grad for t in got.values())
    plain = merged(SPECS[name], before[:2], before[2])
    assert_same_bits(got, plain)


@pytest.mark.parametrize(
    "name", ["interpolate", "task_arithmetic", "ties", "breadcrumbs", "magmax", "model_stock"]
)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_the_order_of_experts_does_not_matter_to_symmetric_rules(name, data):
    """On multiples of 1/8 sums are exact, so the elected signs are too; magmax needs magnitudes that differ."""
    n = data.draw(st.integers(2, 5))
    eighths = st.lists(st.integers(-40, 40), min_size=12, max_size=12)
    taus = [torch.tensor(data.draw(eighths)) / 8 for _ in range(n)]
    if name == "magmax":
        taus = [tau + (i + 1) / 1024 * tau.sign() for i, tau in enumerate(taus)]
    models = [{"w": tau.view(3, 4)} for tau in taus]
    base = {"w": torch.zeros(3, 4)}
    spec = {"rule": name} if name in ("interpolate", "model_stock") else {**SPECS[name]}
    order = data.draw(st.permutations(range(n)))
    shuffled = merged(spec, [models[i] for i in order], base)
    assert_close(shuffled, merged(spec, models, base), atol=1e-5)


@pytest.mark.parametrize("name", NARY)
def test_experts_equal_to_the_base_change_nothing(name, base):
    assert_close(merged(SPECS[name], [base] * 3, base), base)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare", "breadcrumbs", "magmax"])
def test_scale_0_is_the_base(name, base, experts):
    assert_close(merged({**SPECS[name], "scale": 0}, experts, base), base)


# Trimming


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_exactly_the_k_largest_are_chosen_and_ties_in_order(data):
    """Few distinct magnitudes, so that the threshold is nearly always tied; against a stable sort."""
    values = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 0.125, -0.125, 3.0, -3.0, 3.0000002, 1e30, math.inf])
    sizes = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=4))
    tensors = [torch.tensor(data.draw(st.lists(values, min_size=s, max_size=s))) for s in sizes]
    n = sum(sizes)
    k = data.draw(st.integers(0, n))
    magnitudes = torch.cat(tensors).abs().tolist()
    chosen = set(sorted(range(n), key=lambda i: -magnitudes[i])[:k])  # sorted() is stable: first come first
    largest = Largest(k, flat_magnitudes(tensors))
    assert [bool(x) for tensor in tensors for x in largest.mask(tensor)] == [i in chosen for i in range(n)]


def test_nan_counts_as_the_largest():
    tensor = torch.tensor([1.0, math.nan, 3.0])
    assert Largest(2, tensor.abs()).mask(tensor).tolist() == [False, True, True]


def test_scope_model_ranks_over_the_whole_model_and_scope_tensor_within_each():
    base = {"big": torch.zeros(10), "small": torch.zeros(10)}
    model = {"big": torch.arange(11.0, 21.0), "small": torch.arange(1.0, 11.0)}
    got = merged({"rule": "ties", "density": 0.5}, [model], base)
    assert (int(got["big"].count_nonzero()), int(got["small"].count_nonzero())) == (10, 0)
    got = merged({"rule": "ties", "density": 0.5, "scope": "tensor"}, [model], base)
    assert got["big"].tolist() == [0.0] * 5 + [16.0, 17.0, 18.0, 19.0, 20.0]
    assert int(got["small"].count_nonzero()) == 5
    one = {"big": model["big"]}
    same = [
        merged({"rule": "ties", "density": 0.3, "scope": s}, [one], {"big": base["big"]})
        for s in ("model", "tensor")
    ]
    assert_same_bits(*same)


def test_ties_ignores_the_order_of_names(base, experts):
    """fp16 deltas tie often; which of them survive must not depend on how a file orders its tensors."""
    half = [{n: (t * 8).round() / 8 for n, t in m.items()} for m in (*experts, base)]
    backwards = [dict(reversed(m.items())) for m in half]
    assert_same_bits(
        merged(SPECS["ties"], half[:-1], half[-1]), merged(SPECS["ties"], backwards[:-1], backwards[-1])
    )


# DARE's draws


def test_dare_on_average_drops_nothing(base, experts):
    spec, n = {"rule": "dare", "density": 0.3, "scale": 0.5}, 400
    mean = sum(displacement(merged({**spec, "seed": seed}, experts, base), base) for seed in range(n)) / n
    undropped = 0.5 * sum(displacement(e, base) for e in experts)
    # variance of one draw: Σ (scale τ)² (1 − p) / p
    deviation = (sum((0.5 * displacement(e, base)) ** 2 for e in experts) * 0.7 / 0.3 / n).sqrt()
    z = (mean - undropped) / deviation
    assert abs(z.mean()) < 4 / math.sqrt(len(z)) and 0.9 < z.std() < 1.1 and z.abs().max() < 5


def test_dare_depends_on_seed_name_and_position_only(base, experts):
    spec = {"rule": "dare", "density": 0.5, "scale": 1.0}
    rule, ones = build_rule(spec), torch.ones(1000)
    draw = lambda *key, r=rule: r.each(ones.clone(), *key, None)  # noqa: E731
    assert torch.equal(draw("w", 0), draw("w", 0))
    for other in (draw("v", 0), draw("w", 1), draw("w", 0, r=replace(rule, seed=1))):
        assert 0.3 < (draw("w", 0) == other).float().mean() < 0.7
    assert 0.4 < (draw("w", 0) == 0).float().mean() < 0.6
    part = {"a.weight"}
    alone = merged(spec, [{n: e[n] for n in part} for e in experts], {n: base[n] for n in part})
    assert_same_bits(alone, {n: merged(spec, experts, base)[n] for n in part})


# Merging over time


def test_ema_unrolls_to_the_weighted_sum_of_all_experts(base):
    """u_t = k^t θ_0 + Σ (1 − k) k^(t − i) e_i, over 20 updates, in one go with weights and one by one."""
    k, experts = 0.85, experts_of(base, 20, size=1.0)
    u = base
    for e in experts:
        u = merged({"rule": "interpolate", "keep": k}, [u, e])
    weights = [k**20, *((1 - k) * k ** (20 - i) for i in range(1, 21))]
    assert_close(
        u, {n: sum(w * m[n] for w, m in zip(weights, [base, *experts], strict=True)) for n in u}, 1e-5
    )
    assert_close(u, merged({"rule": "interpolate", "weights": weights}, [base, *experts]), 1e-5)


def test_the_trap_task_arithmetic_of_scale_1_doubles_the_displacement_at_each_update():
    """Each update moves the weights by 1; scale 0.5 is the mean of old and new."""
    for scale, expected in (
        (1.0, [1, 3, 7, 15, 31]),
        (0.5, [0.5, 1, 1.5, 2, 2.5]),
        (0.1, [0.1, 0.12, 0.124]),
    ):
        base = u = {"w": torch.zeros(1)}
        for displacement in expected:
            u = merged({"rule": "task_arithmetic", "scale": scale}, [u, {"w": u["w"] + 1}], base)
            assert u["w"].item() == pytest.approx(displacement)


@pytest.mark.parametrize(
    "spec,growth",
    [
        ({"rule": "interpolate", "keep": 0.3}, 1.0),
        ({"rule": "slerp", "keep": 0.3}, 1.0),
        ({"rule": "model_stock"}, 1.0),
        ({"rule": "task_arithmetic", "scale": 1.0}, 2.0),
        ({"rule": "task_arithmetic", "scale": 0.7, "lines": {"alpha": 0.8, "beta": -0.2}}, 1.12),
        ({"rule": "ties", "density": 1.0, "scale": 1.2}, 1.2),
        ({"rule": "breadcrumbs", "density": 1.0, "scale": 1.2}, 1.2),
        ({"rule": "magmax", "scale": 1.2}, 1.2),
        ({"rule": "dare", "density": 0.2, "scale": 0.25}, 0.25 * math.sqrt(12)),
        ({"rule": "dare", "density": 0.5, "scale": 1.0, "then": "ties"}, math.sqrt(3)),
    ],
)
def test_growth_is_the_measured_factor_of_a_displacement_that_both_models_share(spec, growth):
    assert build_rule(spec).growth == pytest.approx(growth)
    first, second = ({"w": torch.full((400, 500), x)} for x in (0.0, 1.0))
    got = merged(spec, [second, second], first)["w"].square().mean().sqrt()
    assert got == pytest.approx(growth, rel=0.02)


@pytest.mark.parametrize(
    "kind, raw",
    {
        "equal": [1, 1, 1, 1],
        "linear": [1, 2, 3, 4],
        "sqrt": [1, 2**0.5, 3**0.5, 2],
        "square": [1, 4, 9, 16],
        "cube": [1, 8, 27, 64],
        "pow5": [1, 32, 243, 1024],
        "pow10": [1, 1024, 59049, 1048576],
        "exp2": [2, 4, 8, 16],
        "log": [math.log(2), math.log(3), math.log(4), math.log(5)],
    }.items(),
)
def test_recency_weights(kind, raw):
    assert recency(kind, 4) == pytest.approx([w / sum(raw) for w in raw])
    assert recency(f"reversed_{kind}", 4) == recency(kind, 4)[::-1]
    assert recency(kind, 1) == [1.0]
    build_rule({"rule": "interpolate", "weights": recency(kind, 2000)})


def test_running_forms_need_no_stored_experts(base, experts):
    """What methods/merge.py may use for `all`: a fold of two-model merges equals the merge of all experts."""
    raw = [1.0, 2.0, 3.0, 4.0, 5.0]
    mean, total, largest = experts[0], experts[0], experts[0]
    for t in range(1, 5):
        keep = sum(raw[:t]) / sum(raw[: t + 1])
        mean = merged({"rule": "interpolate", "keep": keep}, [mean, experts[t]])
        total = merged({"rule": "task_arithmetic", "scale": 1.0}, [total, experts[t]], base)
        largest = merged({"rule": "magmax"}, [largest, experts[t]], base)
    assert_close(mean, merged({"rule": "interpolate", "weights": recency("linear", 5)}, experts))
    arithmetic = {"rule": "task_arithmetic", "scale": 0.3}
    assert_close(merged(arithmetic, [total], base), merged(arithmetic, experts, base))
    assert_close(
        merged({"rule": "magmax", "scale": 0.8}, [largest], base), merged(SPECS["magmax"], experts, base)
    )


# Real CLIP weights, lazy files


@pytest.fixture(scope="module")
def clips():
    """A tiny open_clip CLIP with random weights, and three perturbed copies."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
        text_cfg={"layers": 3, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 8},
    )
    base = {n: t.clone() for n, t in model.state_dict().items()}
    return model, base, experts_of(base, 3, size=0.01)


@pytest.mark.parametrize("name", list(SPECS))
def test_rules_on_clip_weights_give_a_clip_that_runs(clips, name):
    model, base, experts = clips
    got = merged(SPECS[name], experts if name in NARY else experts[:2], base)
    model.load_state_dict(got, strict=True)
    out = model(torch.randn(2, 3, 32, 32), torch.randint(50, (2, 8)))
    assert all(torch.isfinite(t).all() for t in out)


class Counted(Mapping):
    """A lazy mapping: a fresh copy at each fetch; counts fetches, and tensors still alive over all of them."""

    alive, most, fetches = 0, 0, Counter()

    def __init__(self, label, tensors):
        self.label, self.tensors = label, tensors

    def __getitem__(self, name):
        tensor = self.tensors[name].clone()
        Counted.fetches[self.label, name] += 1
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(tensor, self.released)
        return tensor

    @staticmethod
    def released():
        Counted.alive -= 1

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


# passes over an expert, and over the base (once for each expert while ranking): compare, rank, merge
PASSES = dict.fromkeys(NARY, (2, 2)) | {
    "interpolate": (2, 0),
    "ties": (1 + 1 + 1, 1 + 8 + 1),
    "opcm": (2, 3),
}


@pytest.mark.parametrize("name", [*NARY, "interpolate"])
def test_lazy_models_are_read_tensor_by_tensor(clips, name):
    _, base, _ = clips
    experts = experts_of(base, 8)
    spec = {"rule": "interpolate"} if name == "interpolate" else SPECS[name]
    expected = merged(spec, experts, base)
    gc.collect()
    Counted.alive, Counted.most, Counted.fetches = 0, 0, Counter()
    lazy = [Counted(i, e) for i, e in enumerate(experts)]
    for tensor_name, tensor in merge(build_rule(spec), lazy, Counted("base", base)):
        assert torch.equal(tensor, expected[tensor_name])
    assert Counted.most <= 4 and Counted.alive <= 1
    per_expert, per_base = PASSES[name]
    assert {n for (label, _), n in Counted.fetches.items() if label != "base"} == {per_expert}
    assert {n for (label, _), n in Counted.fetches.items() if label == "base"} == ({per_base} - {0})


# Mistakes


@pytest.mark.parametrize(
    "spec, field",
    [
        ({"rule": "tie"}, "rule"),
        ({}, "rule"),
        ({"rule": "ties", "densty": 0.2}, "densty"),
        ({"rule": "slerp", "scale": 1}, "scale"),
        ({"rule": "slerp", "keep": 1.5}, "keep"),
        ({"rule": "interpolate", "keep": -0.1}, "keep"),
        ({"rule": "interpolate", "keep": "much"}, "keep"),
        ({"rule": "interpolate", "weights": [0.5, 0.6]}, "weights"),
        ({"rule": "interpolate", "weights": []}, "weights"),
        ({"rule": "task_arithmetic", "weights": [-1, 2]}, "weights"),
        ({"rule": "ties", "density": 0}, "density"),
        ({"rule": "dare", "density": 1.1}, "density"),
        ({"rule": "breadcrumbs", "outliers": 2}, "outliers"),
        ({"rule": "magmax", "scale": math.inf}, "scale"),
        ({"rule": "ties", "scale": math.nan}, "scale"),
        ({"rule": "ties", "scope": "layer"}, "scope"),
        ({"rule": "dare", "then": "slerp"}, "then"),
        ({"rule": "dare", "seed": 0.5}, "seed"),
        ({"rule": "opcm", "alpha": 2}, "alpha"),
        ({"rule": "ties", "lines": {"gamma": 1}}, "lines.gamma"),
    ],
    ids=str,
)
def test_wrong_fields_are_refused_by_name(spec, field):
    for where, name in (("method", f"method.{field}"), ("", field)):
        with pytest.raises(UserError) as error:
            build_rule(spec, where)
        assert str(error.value).startswith(f"{name}: ") and "\n" not in str(error.value)


def test_numbers_may_be_text():
    assert build_rule({"rule": "ties", "density": "1e-3"}) == Ties(density=1e-3)


def without(model, *names):
    return {n: t for n, t in model.items() if n not in names}


@pytest.mark.parametrize(
    "spec, change, message",
    [
        ({"rule": "slerp"}, lambda m, b: ([*m, m[0]], None), "slerp merges two models"),
        ({"rule": "ties"}, lambda m, b: ([], b), "ties merges at least one model"),
        ({"rule": "ties"}, lambda m, b: (m, None), "ties .*base"),
        ({"rule": "slerp", "lines": {}}, lambda m, b: (m, None), "slerp .*base"),
        ({"rule": "interpolate", "keep": 0.5}, lambda m, b: ([*m, m[0]], None), "keep: "),
        ({"rule": "interpolate", "weights": [1]}, lambda m, b: (m, None), "weights: .*2 models"),
        (
            {"rule": "interpolate"},
            lambda m, b: ([without(m[0], "a.weight"), m[1] | {"x": torch.ones(1)}], None),
            "models differ in 2 tensor names: a.weight only in model 2, x only in model 2",
        ),
        ({"rule": "ties"}, lambda m, b: (m, b | {"y": torch.ones(1)}), "models .*: y only in base"),
        (
            {"rule": "ties"},
            lambda m, b: (m, b | {"b.bias": torch.ones(7)}),
            r"models differ in tensor b.bias: \(7,\) torch.float32 in base, \(31,\) torch.float32 in model 2",
        ),
        (
            {"rule": "interpolate"},
            lambda m, b: ([m[0] | {"b.bias": m[0]["b.bias"].int()}, m[1]], None),
            "models differ in tensor b.bias: .*int32 in model 1, .*float32 in model 2",
        ),
    ],
)
def test_models_that_cannot_be_merged_are_refused_before_any_work(base, spec, change, message):
    models, base = change(experts_of(base, 2), base)
    with pytest.raises(UserError, match=f"^{message}"):
        merge(build_rule(spec), models, base)  # not even iterated
