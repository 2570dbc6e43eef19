"""Learning rates against independent sources, in float64 on the CPU; a few seconds, mostly to import torch.

The paper's formulas (arXiv 2408.14471, section 6.1), written out once more
with none of the code's helpers; torch's own schedulers; the multiplier table they give. Then ragged updates
and, by hypothesis, the bounds that every curve keeps.

    python -m pytest tests/test_schedules.py
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomo.errors import FieldError
from fomo.schedules import PAIRS, Schedule, learning_rate, update_peak
from fomo.schema import build

A = 1e-5  # the paper's peak
M = 1e-8  # its floor
N, T = 1420, 20
W = C = 142
NAMES = PAIRS["none"]
PAIR_LIST = [(name, meta) for meta, names in PAIRS.items() for name in names]


def curve(schedule, t, steps=N, peak=A, branch=True):
    """The learning rates of update t, (steps,)."""
    return np.array([learning_rate(schedule, peak, t, n, steps, branch=branch) for n in range(steps)])


def paper(name, meta, t, N=N, W=W, C=C):
    """The closed forms for update t, (N,)."""
    steps = [paper_step(name, meta, t, n, N, W, C) for n in range(N)]
    return np.array(steps)


def paper_step(name, meta, t, n, N, W, C):
    p = A
    if (name, meta) == ("rsqrt", "autoregressive"):
        p = M + (A - M) * math.sqrt((t + 1) * W / (t * N + W))
    elif name == "rsqrt" and meta in ("matched", "continued"):
        p = M + (A - M) * math.sqrt(W / (t * (N - C) - (t - 1) * W))
    elif name == "cosine" and meta in ("autoregressive", "continued") and t > 0:
        p = M + (A - M) / 2 * (1 + math.cos(math.pi * (t * (N - W) + 1) / ((t + 1) * (N - W))))
    if n < W:
        return p * (n + 1) / W
    if (name, meta) == ("cosine", "continued"):
        long_N = (t + 1) * N
        long_W = -(-long_N // 10)  # ceil of a tenth, in integers
        return M + (A - M) / 2 * (1 + math.cos(math.pi * (t * N + n - long_W + 1) / (long_N - long_W)))
    if (name, meta) == ("rsqrt", "continued"):
        value = M + (A - M) * math.sqrt(W / (n + t * (N - C - W)))
    elif name == "rsqrt":
        value = M + (p - M) * math.sqrt(W / n)
    c = n - (N - C)
    return {
        "cosine": lambda: M + (p - M) / 2 * (1 + math.cos(math.pi * (n - W + 1) / (N - W))),
        "rsqrt": lambda: value if c < 0 else value * (C - 1 - c) / C,
        "linear": lambda: M + (A - M) * (N - 1 - n) / (N - W),
        "constant": lambda: A,
        "wsd": lambda: A if c < 0 else M + (A - M) * (C - 1 - c) / C,
    }[name]()


@pytest.mark.parametrize(("steps", "warm_up", "cooldown"), [(N, W, C), (7, 1, 1)])
@pytest.mark.parametrize(("name", "meta"), [pair for pair in PAIR_LIST if pair[1] != "infinite"])
def test_every_step_of_twenty_updates_equals_the_papers_formula(name, meta, steps, warm_up, cooldown):
    for t in range(T):
        expected = paper(name, meta, t, steps, warm_up, cooldown)
        np.testing.assert_allclose(curve(Schedule(name, meta), t, steps), expected, rtol=1e-12, atol=1e-20)


@pytest.mark.parametrize(
    ("name", "meta", "multipliers"),
    [
        ("cosine", "autoregressive", [1, 0.500, 0.250, 0.147, 0.096, 0.025, 0.012, 0.007]),
        ("cosine", "continued", [1, 0.500, 0.250, 0.147, 0.096, 0.025, 0.012, 0.007]),
        ("rsqrt", "autoregressive", [1, 0.427, 0.379, 0.360, 0.350, 0.332, 0.327, 0.324]),
        ("rsqrt", "matched", [1, 0.334, 0.243, 0.201, 0.175, 0.118, 0.095, 0.082]),
        ("rsqrt", "continued", [1, 0.334, 0.243, 0.201, 0.175, 0.118, 0.095, 0.082]),
    ],
)
def test_peaks_are_the_multipliers_of_the_papers_table(name, meta, multipliers):
    schedule = Schedule(name, meta)
    for task, multiplier in zip([1, 2, 3, 4, 5, 10, 15, 20], multipliers, strict=True):
        assert round(update_peak(schedule, A, task - 1, N) / A, 3) == multiplier
        assert curve(schedule, task - 1).max() == pytest.approx(
            update_peak(schedule, A, task - 1, N), rel=1e-12
        )


def torchs(scheduler_class, steps, **options):
    """The rates that a scheduler of torch sets, from before its first step, (steps,)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=A)
    scheduler = scheduler_class(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(rates)


def test_warm_up_and_decay_are_torchs():
    close = {"rtol": 1e-9, "atol": 1e-18}
    lr_scheduler = torch.optim.lr_scheduler
    warm_up = torchs(lr_scheduler.LinearLR, W, start_factor=1 / W, total_iters=W - 1)
    np.testing.assert_allclose(curve(Schedule("constant"), 0)[:W], warm_up, **close)
    cosine = torchs(lr_scheduler.CosineAnnealingLR, N - W + 1, T_max=N - W, eta_min=M)
    np.testing.assert_allclose(curve(Schedule("cosine"), 0)[W:], cosine[1:], **close)
    line = torchs(lr_scheduler.LinearLR, N - W + 1, start_factor=1, end_factor=M / A, total_iters=N - W)
    np.testing.assert_allclose(curve(Schedule("linear"), 0)[W:], line[1:], **close)


@pytest.mark.parametrize(("name", "meta"), PAIR_LIST)
def test_the_first_update_does_not_depend_on_the_meta_schedule(name, meta):
    if meta != "infinite" or name == "wsd":
        np.testing.assert_array_equal(curve(Schedule(name, meta), 0), curve(Schedule(name), 0))


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [2, 7, 10, 1420])
def test_the_last_step_is_exactly_the_floor(name, steps):
    assert learning_rate(Schedule(name), A, 3, steps - 1, steps) == 0.001 * A


def test_the_last_warm_up_step_is_exactly_the_peak_and_rsqrt_ends_at_zero():
    for name in NAMES:
        assert learning_rate(Schedule(name), A, 0, W - 1, N) == A
    assert learning_rate(Schedule("rsqrt"), A, 0, N - 1, N) == 0


@pytest.mark.parametrize("t", [1, 4, 19])
@pytest.mark.parametrize("name", ["cosine", "rsqrt"])
def test_continued_curves_do_not_jump_where_the_warm_up_ends(name, t):
    """The released CD-rsqrt does: it warms up to sqrt(W/(2t(N-C-W))), a factor of 0.75 at t = 1."""
    rates = curve(Schedule(name, "continued"), t)
    assert rates[W] == pytest.approx(rates[W - 1], rel=1e-9)


def test_continued_rsqrt_is_one_long_curve_without_its_warm_ups_and_cooldowns():
    """Between warm-up and cooldown, the updates are consecutive pieces of one update's decay."""
    pieces = [curve(Schedule("rsqrt", "continued"), t)[W : N - C] for t in range(5)]
    s = np.arange(W, W + 5 * (N - C - W))
    np.testing.assert_allclose(np.concatenate(pieces), M + (A - M) * np.sqrt(W / s), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "constant"),
    [("wsd", A), ("cosine", (A + M) / 2), ("rsqrt", M + (A - M) * math.sqrt(142 / 1278))],
)
def test_infinite_warms_up_once_stays_constant_and_anneals_every_branch(name, constant):
    schedule = Schedule(name, "infinite")
    first, *later = [curve(schedule, t) for t in range(4)]
    trunks = [curve(schedule, t, branch=False) for t in range(4)]

    n = np.arange(W, N - C)
    cooling = {
        "wsd": np.full(len(n), A),
        "cosine": constant + (A - constant) / 2 * (1 + np.cos(np.pi * (n - W + 1) / (N - C - W))),
        "rsqrt": M + (A - M) * np.sqrt(W / n),
    }[name]
    np.testing.assert_allclose(first[:W], A * np.arange(1, W + 1) / W, rtol=1e-12)
    np.testing.assert_allclose(first[W : N - C], cooling, rtol=1e-12)
    np.testing.assert_allclose(trunks[0][N - C :], constant, rtol=1e-12)
    np.testing.assert_allclose(trunks[1:], constant, rtol=1e-12)

    branch = M + (constant - M) * (C - 1 - np.arange(C)) / C
    for rates in [first, *later]:
        np.testing.assert_allclose(rates[N - C :], branch, rtol=1e-12)
        assert rates[-1] == M
    for rates, trunk in zip([first, *later], trunks, strict=True):
        np.testing.assert_array_equal(rates[: N - C], trunk[: N - C])


def test_the_trunk_ends_where_the_branch_begins():
    assert Schedule("wsd", "infinite").trunk_steps(N) == N - C
    assert Schedule("wsd").trunk_steps(N) == N
    assert Schedule("wsd", "infinite").trunk_steps(1) == 1


@pytest.mark.parametrize(("name", "meta"), PAIR_LIST)
def test_an_update_of_one_step_takes_it_at_the_peak(name, meta):
    for t in range(3):
        constant = {"cosine": (A + M) / 2}.get(name, A) if meta == "infinite" and t > 0 else A
        assert learning_rate(Schedule(name, meta), A, t, 0, 1) == pytest.approx(constant, rel=1e-12)


def test_without_warm_up_a_cosine_is_the_formula_with_w_zero_and_rsqrt_starts_at_the_peak():
    cosine = curve(Schedule("cosine", warmup=0), 0)
    np.testing.assert_allclose(cosine, paper("cosine", "none", 0, W=0), rtol=1e-12)
    rsqrt = curve(Schedule("rsqrt", warmup=0), 0)
    np.testing.assert_allclose(rsqrt, paper("rsqrt", "none", 0, W=1), rtol=1e-12, atol=1e-20)
    assert rsqrt[0] == A
    np.testing.assert_array_equal(curve(Schedule("constant", warmup=0), 5, steps=7), A)


def test_without_cooldown_rsqrt_and_wsd_do_not_anneal():
    for meta in ("none", "autoregressive", "continued", "matched"):
        rates = curve(Schedule("rsqrt", meta, cooldown=0), 4)
        np.testing.assert_allclose(rates, paper("rsqrt", meta, 4, C=0), rtol=1e-12)
    assert curve(Schedule("wsd", cooldown=0), 0)[-1] == A


def test_shares_become_steps_by_the_ceiling_of_the_exact_product():
    assert Schedule(warmup=0.1, cooldown=0.05).phases(1420) == (142, 71)
    assert Schedule(warmup=0.1, cooldown=0.25).phases(7) == (1, 2)
    assert Schedule(warmup=0.07).phases(100)[0] == 7  # 0.07 * 100 is 7.000000000000001
    assert Schedule("wsd", warmup=0.5, cooldown=0.5).phases(7) == (4, 3)  # the warm-up goes first


shares = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0, 1))


@settings(deadline=None)
@given(
    pair=st.sampled_from(PAIR_LIST),
    warmup=shares,
    cooldown=shares,
    floor=shares,
    peak=st.floats(1e-9, 1e3),
    t=st.integers(0, 100),
    steps=st.one_of(st.integers(1, 12), st.integers(1, 100)),
    branch=st.booleans(),
)
def test_rates_are_finite_and_between_zero_and_the_peak_and_warm_ups_rise(
    pair, warmup, cooldown, floor, peak, t, steps, branch
):
    name, meta = pair
    schedule = Schedule(name, meta, warmup, min(cooldown, 1 - warmup), floor)
    rates = curve(schedule, t, steps, peak, branch)
    W, _ = schedule.phases(steps)
    assert np.all(np.isfinite(rates))
    assert np.all((rates >= 0) & (rates <= peak * (1 + 1e-12)))
    if meta != "infinite":
        assert np.all(np.diff(rates[:W]) > 0) or update_peak(schedule, peak, t, steps) == 0
        assert W == 0 or rates[W - 1] == update_peak(schedule, peak, t, steps)
    if meta in ("none", "autoregressive", "matched"):
        assert np.all(np.diff(rates[max(W - 1, 0) :]) <= peak * 1e-12)  # only down after the peak


@pytest.mark.parametrize(("name", "meta"), [(n, m) for n in NAMES for m in PAIRS if (n, m) not in PAIR_LIST])
def test_pairs_that_do_not_exist_are_refused_with_the_accepted_ones(name, meta):
    with pytest.raises(FieldError, match=f"{meta} with {', '.join(PAIRS[meta])}") as error:
        build(Schedule, {"name": name, "meta": meta})
    assert error.value.field == "schedule.meta"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("name", {"name": "cosin"}),
        ("meta", {"meta": "forever"}),
        ("warmup", {"warmup": 1.5}),
        ("floor", {"floor": -0.1}),
        ("cooldown", {"cooldown": math.nan}),
        ("cooldown", {"name": "wsd", "warmup": 0.6, "cooldown": 0.5}),
    ],
)
def test_impossible_fields_are_refused_by_name(field, fields):
    with pytest.raises(FieldError) as error:
        build(Schedule, fields, "schedule")
    assert error.value.field == f"schedule.{field}"


def test_a_cosine_may_have_any_warm_up_since_it_has_no_cooldown():
    assert learning_rate(Schedule("cosine", warmup=1.0), A, 2, 6, 7) == A


@pytest.mark.parametrize(("update", "step", "steps"), [(0, 7, 7), (0, -1, 7), (-1, 0, 7), (0, 0, 0)])
def test_a_step_outside_the_update_is_an_error_not_a_rate(update, step, steps):
    with pytest.raises(ValueError, match="no step"):
        learning_rate(Schedule(), A, update, step, steps)
