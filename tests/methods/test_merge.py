"""Merging over time against its closed forms, with hand-made tuned weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fomo import weights
from fomo.errors import FieldError
from fomo.load_recipe import load
from fomo.methods import build_method
from fomo.update import run_recipe

UPDATES = 6


class Toy(nn.Module):
    """Two parameters and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        self.b = nn.Parameter(torch.tensor([[0.5]]))
        self.register_buffer("count", torch.tensor(0))


def live(spec, deltas, folder=None):
    """Merge over time where update t adds deltas[t] -> (start, tuned, deployed) vectors of `a` by update."""
    model, method = Toy(), build_method({"name": "merge", **spec})
    if folder:
        folder.mkdir(exist_ok=True)
        method.keep_in(folder)
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


def test_ft_merge_merges_with_the_original(deltas):
    k, origin = 0.7, Toy().a.detach()
    starts, tuned, deployed = live({"keep": k, "partner": "base"}, deltas)
    for t in range(UPDATES):
        torch.testing.assert_close(deployed[t], k * origin + (1 - k) * tuned[t])
        if t:
            assert torch.equal(starts[t], deployed[t - 1])


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_the_ends_of_keep_are_exact(keep, deltas):
    _, tuned, deployed = live({"keep": keep}, deltas)
    assert torch.equal(deployed[-1], Toy().a.detach() if keep else tuned[-1])


@pytest.mark.parametrize("init", ["zeroshot", "finetuned", "ema", "all"])
@pytest.mark.parametrize("deploy", ["finetuned", "ema", "all"])
def test_all_twelve_cells_start_and_deploy_what_they_say(init, deploy, deltas):
    origin, k = Toy().a.detach(), 0.6
    starts, tuned, deployed = live({"init": init, "deploy": deploy, "keep": k}, deltas)
    ema = mean = origin
    for t in range(UPDATES):
        expected = {"zeroshot": origin, "finetuned": tuned[t - 1] if t else origin, "ema": ema, "all": mean}
        torch.testing.assert_close(starts[t], expected[init])
        ema = k * ema + (1 - k) * tuned[t]
        mean = torch.stack(tuned[: t + 1]).mean(0)
        torch.testing.assert_close(deployed[t], {"finetuned": tuned[t], "ema": ema, "all": mean}[deploy])


@pytest.mark.parametrize("init", ["zeroshot", "finetuned", "ema"])
def test_an_ema_may_begin_with_the_first_expert(init, deltas):
    spec = {"init": init, "first_ema": "expert", "keep": 0.6}
    starts, tuned, deployed = live(spec, deltas)
    ema = tuned[0]
    torch.testing.assert_close(deployed[0], ema, rtol=0, atol=0)
    for t in range(1, UPDATES):
        origin = Toy().a.detach()
        torch.testing.assert_close(
            starts[t], {"zeroshot": origin, "finetuned": tuned[t - 1], "ema": ema}[init]
        )
        ema = 0.6 * ema + 0.4 * tuned[t]
        torch.testing.assert_close(deployed[t], ema)


@pytest.mark.parametrize("rule", ["interpolate", "ties", "magmax", "model_stock"])
@pytest.mark.parametrize("recency", ["equal", "linear", "reversed_square"])
def test_the_zero_shot_model_may_be_an_expert(rule, recency, deltas, tmp_path):
    spec = {"init": "zeroshot", "deploy": "all", "rule": rule, "recency": recency}
    _, tuned, deployed = live({**spec, "include_zero_shot": True}, deltas, tmp_path)
    origin = Toy().a.detach()
    weighted = {"weights": weights.recency(recency, UPDATES + 1)} if rule == "interpolate" else {}
    exact = weights.build_rule({"rule": rule, **weighted})
    models = [{"a": e} for e in (origin, *tuned)]
    torch.testing.assert_close(deployed[-1], dict(weights.merge(exact, models, {"a": origin}))["a"])


def test_stock_merge_moves_along_the_displacement_of_finetuning(small_scale, tmp_path):
    """Five updates: u_1 = e_1, then every tensor of u_t but the logit scale lies on the side that e_t moved to."""
    runs = {}
    for deploy in ("ema", "finetuned"):
        method = f"method={{name: merge, rule: model_stock, deploy: {deploy}}}"
        recipe = load(None, scale=str(small_scale), overrides=[method, "stream.updates=5", "budget.steps=3"])
        run_recipe(recipe, tmp_path / deploy, resume=False, device="cpu")
        runs[deploy] = [
            load_file(path) for path in sorted((tmp_path / deploy / "weights").glob("*.safetensors"))
        ]
    (origin, *merged), (_, *tuned) = runs["ema"], runs["finetuned"]
    torch.testing.assert_close(merged[0], tuned[0])
    for u, e in zip(merged, tuned, strict=True):
        for name in origin:
            if origin[name].ndim:
                moved, towards = ((m[name] - origin[name]).double().flatten() for m in (u, e))
                assert moved @ towards > 0.5 * moved.norm() * towards.norm() > 0, name


@pytest.mark.parametrize("rule", ["interpolate", "task_arithmetic", "magmax", "ties", "model_stock"])
@pytest.mark.parametrize("recency", ["equal", "linear", "reversed_square"])
def test_offline_merging_is_the_rule_on_all_experts(rule, recency, deltas, tmp_path):
    """Running forms and experts on disk give what the rule gives when all experts are at hand."""
    spec = {"init": "zeroshot", "deploy": "all", "rule": rule, "recency": recency}
    _, tuned, deployed = live(spec, deltas, tmp_path)
    origin = {"a": Toy().a.detach()}
    weighted = (
        {"weights": weights.recency(recency, UPDATES)} if rule in ("interpolate", "task_arithmetic") else {}
    )
    exact = weights.build_rule({"rule": rule, **weighted})
    expected = dict(weights.merge(exact, [{"a": e} for e in tuned], origin))["a"]
    torch.testing.assert_close(deployed[-1], expected)


def test_experts_are_kept_on_disk_only_where_the_rule_needs_them(deltas, tmp_path):
    live({"init": "zeroshot", "deploy": "all"}, deltas, tmp_path / "a")
    live({"init": "zeroshot", "deploy": "all", "rule": "ties"}, deltas, tmp_path / "b")
    assert not (tmp_path / "a/experts").exists()
    assert len(list((tmp_path / "b/experts").glob("*.safetensors"))) == UPDATES


def test_a_merge_that_would_diverge_is_refused_before_training():
    rule = {"name": "merge", "rule": "task_arithmetic"}
    with pytest.raises(FieldError, match=r"scale must be at most 0\.5"):
        build_method({**rule, "scale": 0.6})
    for stable in ({"scale": 0.5}, {"scale": 1.0, "init": "zeroshot"}, {"scale": 1, "allow_divergent": True}):
        build_method({**rule, **stable})
