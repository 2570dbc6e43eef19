"""What a merge makes of running statistics, and models whose features are no numbers."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fomo.clip import new, save
from fomo.methods import build_method
from fomo.weights import RULES, build_rule, is_statistic, merge

ROOT = Path(__file__).parents[1]
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": None, "width": 8, "layers": [1, 1, 1, 1]},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MEAN, VAR, COUNT = "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"


def model(seed: int, mean: float, var: float, count: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    statistics = {MEAN: torch.full((4,), mean), VAR: torch.full((4,), var), COUNT: torch.tensor(count)}
    return {"weight": torch.randn(4, 4, generator=generator), **statistics}


BASE, OLD, NEW = model(0, 0.0, 1.0, 5), model(1, 1.0, 0.5, 6), model(2, 3.0, 0.1, 7)


def merged(spec: dict, models=(OLD, NEW), base=BASE) -> tuple[float, float]:
    """-> the mean and the variance."""
    made = dict(merge(build_rule(spec), list(models), base))
    assert made[COUNT] == models[-1][COUNT]
    return made[MEAN][0].item(), made[VAR][0].item()


@pytest.mark.parametrize(
    ("spec", "share", "weights"),
    [
        ({"rule": "interpolate", "keep": 0.25}, 1.0, (0.25, 0.75)),
        ({"rule": "slerp", "keep": 0.25}, 1.0, (0.25, 0.75)),
        ({"rule": "task_arithmetic"}, 1.0, (0.5, 0.5)),
        ({"rule": "task_arithmetic", "scale": 0.0}, 0.0, (0.5, 0.5)),
        ({"rule": "task_arithmetic", "scale": 0.2}, 0.4, (0.5, 0.5)),
        ({"rule": "task_arithmetic", "scale": 2.5, "weights": [0.9, 0.1]}, 1.0, (0.9, 0.1)),
        ({"rule": "task_arithmetic", "scale": -1.0}, 0.0, (0.5, 0.5)),
        ({"rule": "dare"}, 0.5, (0.5, 0.5)),
        ({"rule": "dare", "scale": 0.3, "then": "ties"}, 0.3, (0.5, 0.5)),
        ({"rule": "ties", "scale": 0.7}, 0.7, (0.5, 0.5)),
        ({"rule": "ties", "scope": "tensor", "density": 0.01}, 1.0, (0.5, 0.5)),
        ({"rule": "breadcrumbs", "scale": 3.0}, 1.0, (0.5, 0.5)),
        ({"rule": "magmax"}, 1.0, (0.5, 0.5)),
        ({"rule": "model_stock"}, 1.0, (0.5, 0.5)),
        ({"rule": "opcm"}, 1.0, (0.5, 0.5)),
        ({"rule": "task_arithmetic", "scale": 0.5, "lines": {"alpha": 0.5, "beta": 0.5}}, 0.5, (0.5, 0.5)),
    ],
    ids=str,
)
def test_statistics_are_interpolated_between_the_base_and_the_mean_of_the_models(spec, share, weights):
    old, new = weights
    mean, var = old * 1.0 + new * 3.0, old * 0.5 + new * 0.1
    expected = (share * mean, 1 + share * (var - 1))
    assert merged(spec) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_statistics_have_no_part_in_what_a_rule_makes_of_weights(name):
    """Neither in the entries that it counts, nor in its norms."""
    plain = [{k: v for k, v in m.items() if not is_statistic(k)} for m in (OLD, NEW, BASE)]
    expected = dict(merge(build_rule({"rule": name}), plain[:2], plain[2]))
    far = {**NEW, VAR: torch.full((4,), 1e6), MEAN: torch.full((4,), -1e6)}
    assert dict(merge(build_rule({"rule": name}), [OLD, far], BASE))["weight"].equal(expected["weight"])


@pytest.mark.parametrize("name", RULES)
def test_a_model_merged_with_itself_keeps_its_statistics(name):
    assert merged({"rule": name}, (NEW, NEW), NEW) == pytest.approx((3.0, 0.1), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variances_stay_positive_in_half_precision(dtype):
    """Ones that are smaller than what is between two numbers near the others."""
    tiny = {**NEW, VAR: torch.full((4,), 1e-7)}
    models = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in m.items()} for m in (BASE, OLD, tiny)
    ]
    for rule in ("dare", "task_arithmetic", "ties"):
        made = dict(merge(build_rule({"rule": rule, "scale": 3.0}), models[1:], models[0]))[VAR]
        assert made.dtype == dtype and (made > 0).all()


@pytest.mark.parametrize("name", sorted(RULES.keys() - {"interpolate"}))
def test_a_causal_mask_in_the_files_stays_what_it_is(name):
    mask = torch.full((4, 4), -torch.inf).triu(1)
    made = dict(merge(build_rule({"rule": name}), [{**OLD, "attn_mask": mask}, {**NEW, "attn_mask": mask}],
                      {**BASE, "attn_mask": mask}))  # fmt: skip
    assert made["attn_mask"].equal(mask) and made["weight"].isfinite().all()


@pytest.mark.parametrize("rule", ["interpolate", "task_arithmetic", "magmax"])
def test_a_merge_of_all_experts_has_the_statistics_of_all(rule, tmp_path):
    """Whether the rule has a running form or not: three updates, by hand."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.bn = torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)

    model = Module()
    method = build_method({"name": "merge", "init": "zeroshot", "deploy": "all", "rule": rule})
    method.keep_in(tmp_path)
    (tmp_path / "experts").mkdir()
    method.prepare(model)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = []
    for variance in (0.5, 0.2, 0.1):
        method.before_update(model)
        model.bn.running_var.fill_(variance)
        experts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        method.after_update(model, [])
    expected = dict(merge(build_rule({"rule": rule}), experts, original))
    torch.testing.assert_close(model.bn.running_var, expected["bn.running_var"])
    torch.testing.assert_close(model.bn.running_var, torch.full((4,), 0.8 / 3))


# --- features that are not finite ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, small_scale) -> Path:
    """A ResNet, the same with one NaN, with a negative variance and with weights that overflow."""
    folder = tmp_path_factory.mktemp("models")
    clip = new(CONFIG, 0)
    sound = {name: tensor.clone() for name, tensor in clip.model.state_dict().items()}
    changes = {
        "sound": lambda state: None,
        "nan": lambda state: state["visual.layer1.0.conv1.weight"].view(-1)[3].fill_(torch.nan),
        "variance": lambda state: state["visual.bn2.running_var"][2].fill_(-0.5),
        "overflow": lambda state: [state[f"visual.layer{i}.0.bn3.weight"].fill_(1e20) for i in (1, 2, 3)],
        "text": lambda state: state["ln_final.bias"][1].fill_(torch.inf),
    }
    for name, change in changes.items():
        state = {key: tensor.clone() for key, tensor in sound.items()}
        change(state)
        (folder / name).mkdir()
        clip.model.load_state_dict(state)
        save(clip, folder / name)
    (folder / "data.yaml").write_text((small_scale.parent / "data.yaml").read_text())
    return folder


WRONG = {
    "nan": "image features are not finite: its tensor visual.layer1.0.conv1.weight is not",
    "variance": "image features are not finite: its tensor visual.bn2.running_var has negative variances",
    "overflow": "image features are not finite: all its tensors are, so they overflow",
    "text": "text features are not finite: its tensor ln_final.bias is not",
}


def fomo(*arguments: object):
    done = CliRunner().invoke(runpy.run_path(str(ROOT / "fomo.py"))["cli"], [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def last_line(done) -> str:
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", WRONG)
def test_eval_says_which_tensor_makes_features_that_are_not_finite(place, name):
    done = fomo("eval", "--model", place / name, "--data", place / "data.yaml", "--json")
    assert done.exit_code == 1 and not done.stdout
    assert last_line(done).startswith("fomo: ") and WRONG[name] in last_line(done)


def test_a_sound_model_of_the_same_architecture_has_scores(place):
    done = fomo("eval", "--model", place / "sound", "--data", place / "data.yaml", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["ka"] is not None


def test_an_update_of_a_model_that_is_not_finite_deploys_nothing(place, tmp_path, small_scale):
    out = tmp_path / "run"
    done = fomo("update", "--scale", small_scale, "--model", place / "nan", "--data", place / "data.yaml",
                "--set", "budget.steps=2", "--out", out)  # fmt: skip
    assert done.exit_code == 1 and WRONG["nan"] in last_line(done)
    assert not list(out.glob("weights/*")) and not (out / "model").exists()


def test_a_sweep_stops_at_a_model_that_is_not_finite(place, tmp_path):
    out = tmp_path / "curve.png"
    models = (place / "sound", place / "variance")
    done = fomo("merge", "--rule", "interpolate", *models, "--sweep", "keep=1,0", "-o", out,
                "--data", place / "data.yaml")  # fmt: skip
    assert done.exit_code == 1 and WRONG["variance"] in last_line(done) and not out.exists()


@pytest.mark.parametrize("rule", ["dare", "task_arithmetic"])
def test_merging_by_hand_leaves_a_batch_norm_usable(place, tmp_path, rule):
    """Variances that halved; these rules would take them below zero."""
    base, tuned = place / "sound/open_clip_model.safetensors", tmp_path / "tuned.safetensors"
    out = tmp_path / "merged.safetensors"
    weights = load_file(base)
    halved = {name: tensor / 2 for name, tensor in weights.items() if name.endswith("running_var")}
    save_file(weights | halved, tuned)
    done = fomo("merge", "--rule", rule, "--set", "scale=2.5", "--base", base, tuned, tuned, "-o", out)
    assert done.exit_code == 0, done.stderr
    made = load_file(out)
    assert halved and all((made[name] == 0.5).all() for name in halved)
