"""The loop and the command line, as a user meets them."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fomo.clip import load as load_model
from fomo.datasets.pools import batches_of, open_material
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.update import run_recipe

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    cli = runpy.run_path(str(ROOT / "fomo.py"))["cli"]
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_a_life_leaves_what_the_contract_says(small_scale, tmp_path):
    out = tmp_path / "run"
    done = invoke("update", "--recipe", ROOT / "recipes/merge.yaml", "--scale", small_scale, "--out", out)
    assert done.exit_code == 0, done.output
    assert "KA " in done.stdout and "ZS " in done.stdout and str(out / "report.html") in done.stdout
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [0, 1, 2, 3]
    assert [line["samples"] for line in lines] == [0, 48, 96, 144]
    assert len(lines[0]["frozen"]) == 4 and lines[0]["frozen"][0] == 0 and max(lines[0]["frozen"]) > 20
    for line in lines:
        assert set(line["datasets"]) == {"symbols", "flags", "shapes-inverted"}
        assert line["ka"] == pytest.approx((line["datasets"]["symbols"] + line["datasets"]["flags"]) / 2)
        assert line["zs"] == line["datasets"]["shapes-inverted"]
        assert line["gm"] == pytest.approx((line["ka"] * line["zs"]) ** 0.5)
    for name in ("recipe.yaml", "report.html", "plane.png", "train.jsonl"):
        assert (out / name).stat().st_size
    kept = sorted(path.name.split("-")[0] for path in (out / "state").glob("*.pt"))
    assert kept == ["000003", "000004", "update_000", "update_001", "update_002", "update_003"]
    last = load_file(out / "weights/update_003.safetensors")
    deployed = load_model(None, str(out / "model")).model.state_dict()
    assert all(torch.equal(last[name], deployed[name]) for name in last)
    again = load(out / "recipe.yaml")
    assert again.method["keep"] == 0.5 and again.steps == 4


def test_the_first_weights_are_the_untouched_model(small_scale, tmp_path):
    out = tmp_path / "run"
    assert invoke("update", "--scale", small_scale, "--out", out).exit_code == 0
    again = tmp_path / "again"
    done = invoke("update", "--scale", small_scale, "--model", out / "model", "--out", again)
    assert done.exit_code == 0, done.output
    start = load_file(again / "weights/update_000.safetensors")
    end = load_file(out / "weights/update_003.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in end)


def test_eval_prints_one_json_document(small_scale):
    done = invoke("eval", "--scale", small_scale, "--json")
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)
    assert {"ka", "zs", "gm", "datasets"} <= set(scores)
    assert {"metric", "score", "n", "stderr"} <= set(scores["datasets"]["flags"])


def test_pools_of_an_update_hold_its_concepts_and_the_buffer_all_before(small_scale):
    recipe = load(None, scale=str(small_scale))
    from fomo.pretrain import starting_model

    material = open_material(recipe, starting_model(recipe.model, torch.device("cpu")))
    assert sorted(len(concepts) for concepts in material.stream) == [6, 7, 7]
    everything = [c for concepts in material.stream for c in concepts]
    assert len(set(everything)) == 20
    second = {name: pool for name, pool, _ in batches_of(material, recipe, 1, 4).draws}
    assert len(second["update"]) == 6 * len(material.stream[1])
    assert len(second["buffer"]) == 6 * len(material.stream[0])
    assert not set(second["update"].numbers) & set(second["buffer"].numbers)
    first = {name: count for name, _, count in batches_of(material, recipe, 0, 4).draws}
    assert first == {"pretraining": 5, "update": 7}


MISTAKES = {
    "misspelt key": (["--set", "optimiser.lr=1"], "did you mean optimizer?"),
    "missing recipe": (["--recipe", "gone.yaml"], "gone.yaml: no such file"),
    "missing data": (["--data", "gone.yaml"], "gone.yaml: no such file"),
    "lr: fast": (["--set", "optimizer.lr=fast"], "expected a number, got 'fast'"),
    "shares of 1.2": (["--set", "mixture.update=0.54"], "must sum to 1, got 1.2"),
    "unknown method": (["--set", "method.name=forget"], "unknown 'forget', accepted: finetune, merge"),
    "unwritable": (["--out", "/proc/nope/run"], "cannot be written"),
    "unknown model": (["--model", "ViT-B-23/openai"], "nearest: "),
    "too many updates": (["--set", "stream.updates=21"], "21 updates need as many concepts, the data has 20"),
    "device": (["--device", "mps"], "not available here"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, small_scale, tmp_path):
    arguments, expected = MISTAKES[name]
    base = ["update", "--recipe", ROOT / "recipes/merge.yaml"]
    base += ["--scale", small_scale, "--out", tmp_path / "run"]
    done = invoke(*base, *arguments)
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert expected in lines[-1] and lines[-1].startswith("fomo: ")
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("run/*"))


def test_an_existing_run_needs_resume(small_scale, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    done = invoke("update", "--scale", small_scale, "--out", tmp_path / "run")
    assert done.exit_code == 2 and "--resume" in done.stderr


@pytest.mark.slow
def test_real_pictures_and_a_model_that_open_clip_saved(real_data, tmp_path):
    """A ViT-B-32 with random weights, as a plain checkpoint file, takes two steps on the real pictures."""
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), tmp_path / "vit.pt")
    small = ["stream.updates=1", "budget.steps=2", "optimizer.batch_size=8", "evaluation.subset=0.01"]
    data = tmp_path / "some.yaml"
    data.write_text(
        "adaptation:\n  bccd: {source: webdataset, train: '${FOMO_TEST_DATA}/bccd/train.tar', "
        "test: '${FOMO_TEST_DATA}/bccd/test.tar'}\n"
    )
    done = invoke(
        "update", "--recipe", ROOT / "recipes/merge.yaml", "--model", tmp_path / "vit.pt", "--data", data,
        "--out", tmp_path / "run", *(part for s in small for part in ("--set", s)),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "no pretraining pool" in done.stderr
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/run/model")
    last = load_file(tmp_path / "run/weights/update_001.safetensors")
    assert torch.equal(model.visual.proj, last["visual.proj"])


@pytest.mark.slow
def test_the_tiny_scale_learns_what_it_is_taught(tmp_path):
    """Half a life after a shortened pretraining: the real tiny model and world, about two minutes."""
    command = [
        sys.executable,
        "fomo.py",
        "update",
        "--recipe",
        "recipes/merge.yaml",
        "--out",
        str(tmp_path / "run"),
    ]
    command += ["--set", "model.pretraining.samples=80_000", "--set", "stream.updates=5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *_, last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert last["ka"] - first["ka"] > 15
    assert last["peak_memory"] < 2 << 30


def test_an_infinite_schedule_deploys_a_branch_and_goes_on_from_the_trunk(small_scale, tmp_path, monkeypatch):
    """Without warm-up and with half an update of cooldown, the trunk of 4 steps is 2 steps at a constant rate."""
    from fomo.budget.mafs import work_of
    from fomo.methods import Method
    from fomo.runs.folder import read_checkpoint

    common = ["stream.updates=2", "evaluation.frozen=false"]
    wsd = "schedule={name: wsd, meta: infinite, warmup: 0, cooldown: 0.5}"
    recipe = load(None, scale=str(small_scale), overrides=[*common, "budget.steps=4", wsd])
    work_of(recipe)  # counted now: counting lives through updates, too
    starts = []
    original = Method.before_update
    monkeypatch.setattr(
        Method,
        "before_update",
        lambda self, model: starts.append(self.export(model)) or original(self, model),
    )
    run_recipe(recipe, tmp_path / "infinite", resume=False, device="cpu")
    begun = list(starts)
    constant = "schedule={name: constant, warmup: 0}"
    recipe = load(None, scale=str(small_scale), overrides=[*common, "budget.steps=2", constant])
    run_recipe(recipe, tmp_path / "constant", resume=False, device="cpu")
    trunk = load_file(tmp_path / "constant/weights/update_001.safetensors")
    branch = load_file(tmp_path / "infinite/weights/update_001.safetensors")
    assert all(torch.equal(begun[1][name], trunk[name]) for name in trunk)
    assert any(not torch.equal(branch[name], trunk[name]) for name in trunk)
    (kept,) = (tmp_path / "infinite/state").glob("update_001-*.pt")
    assert all(torch.equal(read_checkpoint(kept)["trunk"][name], trunk[name]) for name in trunk)


def test_a_budget_in_gflops_buys_steps_and_says_what_it_needs(small_scale, tmp_path):
    """At the tests' scale the whole is counted: what one update of finetuning costs buys it again."""
    from fomo.budget.mafs import work_of

    work = work_of(load(None, scale=str(small_scale)))
    total = 3 * 5 * work.gflops_per_step
    recipe = load(None, scale=str(small_scale), overrides=[f"budget.gflops={total}"])
    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [0, 5, 10, 15]
    assert lines[-1]["mafs"] == pytest.approx(total) and lines[0]["allowed"]["mafs"] == pytest.approx(
        total / 3
    )
    poor = load(None, scale=str(small_scale), overrides=["budget.gflops=1e-3"])
    with pytest.raises(
        UserError, match=r"budget\.gflops: 0.001 is too little for one step in each of 3 updates"
    ):
        run_recipe(poor, tmp_path / "poor", resume=False, device="cpu")
