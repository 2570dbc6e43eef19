"""Merging over time against its closed forms, with hand-made tuned weights."""

import pytest
import torch
from torch import nn

from fomo.errors import FieldError
from fomo.methods import build_method

UPDATES = 6


class Toy(nn.Module):
    """Two parameters and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([[0.5]]))
        self.register_buffer("count", torch.tensor(0))


def live(spec, deltas):
    """Merge over time where update t adds deltas[t] -> (start, tuned, deployed) vectors of `a` by update."""
    model, method = Toy(), build_method({"name": "merge", **spec})
    method.prepare(model)
    starts, tuned, deployed = [], [], []
    for delta in deltas:
        method.before_update(model)
        starts.append(model.a.detach().clone())
        with torch.no_grad():
            model.a += delta
            model.count += 1
        tuned.append(model.a.detach().clone())
        method.after_update(model, [])
        deployed.append(model.a.detach().clone())
    return starts, tuned, deployed


@pytest.fixture
def deltas():
    return torch.randn(UPDATES, 3, generator=torch.Generator().manual_seed(0))


def test_ema_merge_is_the_unrolled_average(deltas):
    k, origin = 0.8, Toy().a.detach()
    starts, tuned, deployed = live({"keep": k}, deltas)
    for t in range(1, UPDATES + 1):
        expected = k**t * origin + sum((1 - k) * k ** (t - i) * tuned[i - 1] for i in range(1, t + 1))
        torch.testing.assert_close(deployed[t - 1], expected)
    torch.testing.assert_close(torch.stack(starts[1:]), torch.stack(deployed[:-1]), rtol=0, atol=0)


def test_zs_merge_always_trains_from_the_original(deltas):
    k, origin = 0.9, Toy().a.detach()
    starts, _, deployed = live({"keep": k, "init": "zeroshot"}, deltas)
    assert all(torch.equal(start, origin) for start in starts)
    old = origin
    for t in range(UPDATES):
        old = k * old + (1 - k) * (origin + deltas[t])
        torch.testing.assert_close(deployed[t], old)


def test_ft_merge_merges_with_the_original(deltas):
    k, origin = 0.7, Toy().a.detach()
    starts, tuned, deployed = live({"keep": k, "partner": "base"}, deltas)
    for t in range(UPDATES):
        torch.testing.assert_close(deployed[t], k * origin + (1 - k) * tuned[t])
        if t:
            assert torch.equal(starts[t], deployed[t - 1])


def test_deploying_what_was_tuned_is_plain_finetuning(deltas):
    _, _, deployed = live({"init": "finetuned", "deploy": "finetuned"}, deltas)
    torch.testing.assert_close(deployed[-1], Toy().a.detach() + deltas.sum(0))


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_the_ends_of_keep_are_exact(keep, deltas):
    _, tuned, deployed = live({"keep": keep}, deltas)
    assert torch.equal(deployed[-1], Toy().a.detach() if keep else tuned[-1])


def test_integer_buffers_are_the_newest(deltas):
    model, method = Toy(), build_method({"name": "merge", "keep": 0.5})
    method.prepare(model)
    method.before_update(model)
    model.count += 7
    method.after_update(model, [])
    assert model.count == 7 and model.count.dtype == torch.int64


def test_a_merge_that_would_diverge_is_refused_before_training():
    with pytest.raises(FieldError, match=r"scale must be at most 0\.5"):
        build_method({"name": "merge", "rule": "task_arithmetic", "scale": 0.6})
    build_method({"name": "merge", "rule": "task_arithmetic", "scale": 0.5})
    build_method({"name": "merge", "rule": "task_arithmetic", "scale": 1.0, "init": "zeroshot"})


def test_the_trap_grows_as_it_is_said_to():
    spec = {"rule": "task_arithmetic", "scale": 1.0, "allow_divergent": True}
    _, _, deployed = live(spec, torch.ones(4, 3))
    displacement = [float((d - Toy().a.detach())[0]) for d in deployed]
    assert displacement == pytest.approx([1, 3, 7, 15])


def test_state_restores_the_running_average(deltas):
    model, method = Toy(), build_method({"name": "merge", "keep": 0.5})
    method.prepare(model)
    for delta in deltas[:3]:
        method.before_update(model)
        with torch.no_grad():
            model.a += delta
        method.after_update(model, [])
    again, fresh = Toy(), build_method({"name": "merge", "keep": 0.5})
    fresh.prepare(again)
    fresh.load_state(method.state())
    fresh.before_update(again)
    assert torch.equal(again.a, model.a)
