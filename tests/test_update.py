"""The loop and the command line, as a user meets them; what a budget buys."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_runs import (
    CPU,
    ROOT,
    after_steps,
    assert_same,
    invoke,
    lines,
    recipe_of,
    run,
    run_until,
    terminate,
    weights_of,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

from fomo.budget.mafs import work_of
from fomo.clip import load as load_model
from fomo.datasets import datafile
from fomo.datasets.pools import open_pools
from fomo.errors import Interrupted, UserError
from fomo.eval.scorer import Scorer
from fomo.load_recipe import load
from fomo.methods import Method
from fomo.pretrain import starting_model
from fomo.runs.logs import evaluations

MERGE = ["update", "--recipe", ROOT / "recipes/merge.yaml"]


@pytest.fixture(scope="module")
def updated(small_scale, tmp_path_factory):
    """The folder of a run, and what the command printed."""
    out = tmp_path_factory.mktemp("updated") / "run"
    done = invoke(*MERGE, "--scale", small_scale, "--out", out)
    assert done.exit_code == 0, done.output
    return out, done.stdout


def test_a_run_leaves_what_the_contract_says(updated):
    out, printed = updated
    assert "KA " in printed and "ZS " in printed and str(out / "report.html") in printed
    scored = lines(out / "metrics.jsonl")
    assert [line["update"] for line in scored] == [0, 1, 2, 3]
    assert [line["samples"] for line in scored] == [0, 48, 96, 144]
    frozen = scored[0]["frozen"]
    assert len(frozen) == 4 and frozen[0] == 0 and max(frozen) > 20
    for line in scored:
        assert set(line["datasets"]) == {"symbols", "flags", "shapes-inverted"}
        assert line["ka"] == pytest.approx((line["datasets"]["symbols"] + line["datasets"]["flags"]) / 2)
        assert line["zs"] == line["datasets"]["shapes-inverted"]
        assert line["gm"] == pytest.approx((line["ka"] * line["zs"]) ** 0.5)
    for name in ("recipe.yaml", "report.html", "plane.png", "train.jsonl"):
        assert (out / name).stat().st_size
    states = sorted(path.name.split("-")[0] for path in (out / "state").glob("*.pt"))
    assert states == ["000003", "000004", "update_000", "update_001", "update_002", "update_003"]
    assert_same(load_model(None, str(out / "model")).model.state_dict(), weights_of(out, 3))
    again = load(out / "recipe.yaml")
    assert again.method["keep"] == 0.5 and again.steps == 4


def test_first_and_last_it_is_kept_what_open_clip_takes_each_test_picture_for(updated):
    out, printed = updated
    kept = lines(out / "predictions.jsonl")
    assert [line["update"] for line in kept] == [0, 3] and set(kept[0]["datasets"]) == {"symbols", "flags"}
    name = f"local-dir:{out / 'model'}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    for dataset, found in kept[-1]["datasets"].items():
        source = datafile.read(out / "data.yaml").adaptation[dataset].open("test")
        assert found["pictures"] == [source.id_of(i) for i in range(len(source))]
        assert found["labels"] == source.labels.tolist()
        (prompt,) = source.prompts
        texts = open_clip.get_tokenizer(name)([prompt.replace("{}", title) for title in source.classes])
        with torch.no_grad():
            images = model.encode_image(torch.stack([transform(source.image(i)) for i in range(len(source))]))
            similarity = F.normalize(images, dim=-1) @ F.normalize(model.encode_text(texts), dim=-1).T
        chosen = similarity.gather(1, torch.tensor(found["predicted"])[:, None])[:, 0]
        # hardly trained, it has near ties
        torch.testing.assert_close(chosen, similarity.amax(-1), rtol=0, atol=1e-5)
    constants = json.loads((out / "run.json").read_text())
    assert constants["tested"] == {name: [4] * len(names) for name, names in constants["classes"].items()}
    assert f"model: {out / 'model'}\nreport: {out / 'report.html'}" in printed


@pytest.mark.parametrize("cut", [1, 6])
def test_an_interrupted_run_keeps_the_same_predictions(cut, updated, small_scale, tmp_path):
    recipe = load(ROOT / "recipes/merge.yaml", scale=str(small_scale))
    with pytest.raises(Interrupted):
        run_until(recipe, tmp_path, cut, terminate)
    with open(tmp_path / "predictions.jsonl", "a") as file:
        file.write('{"update": 3}\n')  # of an evaluation that was killed after it
    run(recipe, tmp_path, resume=True)
    assert lines(tmp_path / "predictions.jsonl") == lines(updated[0] / "predictions.jsonl")


def test_the_first_weights_are_the_untouched_model(updated, small_scale, tmp_path):
    model, small = updated[0] / "model", ["--set", "stream.updates=1", "--set", "budget.steps=1"]
    done = invoke("update", "--scale", small_scale, "--model", model, "--out", tmp_path / "run", *small)
    assert done.exit_code == 0, done.output
    assert_same(weights_of(tmp_path / "run", 0), weights_of(updated[0], 3))


def test_what_ka_is_is_said_once_before_anything_is_scored(small_scale, tmp_path):
    words = ["KA: accuracy on symbols, flags; the mean of 2 sets", "ZS: accuracy on shapes-inverted"]
    small = ["--set", "stream.updates=1", "--set", "budget.steps=1"]
    done = invoke("update", "--scale", small_scale, "--out", tmp_path / "run", *small)
    said = [line for line in done.stderr.splitlines() if line in words]
    assert said == words
    assert invoke("eval", "--scale", small_scale).stdout.splitlines()[:2] == words


def test_eval_prints_one_json_document(small_scale):
    done = invoke("eval", "--scale", small_scale, "--json")
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)
    assert {"ka", "zs", "gm", "datasets"} <= set(scores)
    assert {"metric", "score", "n", "stderr"} <= set(scores["datasets"]["flags"])


def test_pools_of_an_update_hold_its_concepts_and_the_buffer_all_before(small_scale):
    recipe = recipe_of(small_scale)
    pools = open_pools(recipe, starting_model(recipe.model, CPU))
    assert sorted(len(concepts) for concepts in pools.stream) == [6, 7, 7]
    assert len({c for concepts in pools.stream for c in concepts}) == 20
    second = {name: pool for name, pool, _ in pools.batches(recipe, 1, 4).draws}
    assert len(second["update"]) == 6 * len(pools.stream[1])
    assert len(second["buffer"]) == 6 * len(pools.stream[0])
    assert not set(second["update"].numbers) & set(second["buffer"].numbers)
    first = {name: count for name, _, count in pools.batches(recipe, 0, 4).draws}
    assert first == {"pretraining": 5, "update": 7}


MISTAKES = {
    "misspelt key": (["--set", "optimiser.lr=1"], "optimizer"),
    "missing recipe": (["--recipe", "gone.yaml"], "gone.yaml"),
    "missing data": (["--data", "gone.yaml"], "gone.yaml"),
    "lr: fast": (["--set", "optimizer.lr=fast"], "optimizer.lr"),
    "shares of 1.2": (["--set", "mixture.update=0.54"], "1.2"),
    "unknown method": (["--set", "method.name=forget"], "accepted: finetune, merge"),
    "unwritable": (["--out", "/proc/nope/run"], "--out /proc/nope/run"),
    "unknown model": (["--model", "ViT-B-23/openai"], "ViT-B-32"),
    "too many updates": (["--set", "stream.updates=21"], "20"),
    "device": (["--device", "mps"], "--device mps"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(name, small_scale, tmp_path):
    arguments, expected = MISTAKES[name]
    done = invoke(*MERGE, "--scale", small_scale, "--out", tmp_path / "run", *arguments)
    assert done.exit_code == 2, done.output
    *_, last = [line for line in done.stderr.splitlines() if line.strip()]
    assert expected in last and last.startswith("fomo: ") and "Traceback" not in done.output
    assert not list(tmp_path.glob("run/*"))


def test_an_existing_run_needs_resume(updated, small_scale, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for folder, told in ((updated[0], "--resume"), (tmp_path, "is no run")):
        done = invoke(*MERGE, "--scale", small_scale, "--out", folder)
        assert done.exit_code == 2 and told in done.stderr


@pytest.mark.slow
def test_real_pictures_and_a_model_that_open_clip_saved(real_data, tmp_path):
    """A ViT-S-32 with random weights, as a plain checkpoint file, takes two steps on the real pictures."""
    import open_clip

    torch.manual_seed(0)
    torch.save(open_clip.create_model("ViT-S-32-alt").state_dict(), tmp_path / "vit.pt")
    small = ["stream.updates=1", "budget.steps=2", "optimizer.batch_size=8", "evaluation.frozen=false"]
    data = tmp_path / "some.yaml"
    data.write_text(
        "adaptation:\n  bccd: {source: webdataset, train: '${FOMO_TEST_DATA}/bccd/train.tar', "
        "test: '${FOMO_TEST_DATA}/bccd/test.tar'}\n"
    )
    settings = [word for setting in small for word in ("--set", setting)]
    where = ["--model", tmp_path / "vit.pt", "--data", data, "--out", tmp_path / "run"]
    done = invoke(*MERGE, *where, *settings)
    assert done.exit_code == 0, done.output
    assert "no pretraining pool" in done.stderr
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/run/model")
    assert torch.equal(model.visual.proj, weights_of(tmp_path / "run", 1)["visual.proj"])


def test_an_infinite_schedule_deploys_a_branch_and_goes_on_from_the_trunk(small_scale, tmp_path, monkeypatch):
    """Without warm-up and with half an update of cooldown, the trunk of 4 steps is 2 steps at a constant rate."""
    starts, original = [], Method.before_update

    def noted(method, model):
        starts.append(method.export(model))
        original(method, model)

    monkeypatch.setattr(Method, "before_update", noted)
    for folder, steps, schedule in (
        ("infinite", 4, "{name: wsd, meta: infinite, warmup: 0, cooldown: 0.5}"),
        ("constant", 2, "{name: constant, warmup: 0}"),
    ):
        settings = ["stream.updates=2", f"budget.steps={steps}", f"schedule={schedule}"]
        run(recipe_of(small_scale, *settings), tmp_path / folder)
    branch, trunk = (weights_of(tmp_path / folder, 1) for folder in ("infinite", "constant"))
    assert_same(starts[1], trunk)
    assert any(not branch[name].equal(trunk[name]) for name in trunk)


# --- budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3.6, 4.3])
def test_gflops_are_spent_to_within_half_a_step_per_update(small_scale, tmp_path, steps):
    method = "method={name: merge}"
    work = work_of(recipe_of(small_scale, method))
    total = 3 * (steps * work.gflops_per_step + work.gflops_per_update) * work.multiplier
    *_, last = run(recipe_of(small_scale, method, f"budget={{gflops: {total}}}"), tmp_path / "run")
    allowed = json.loads((tmp_path / "run/run.json").read_text())["allowed"]
    assert allowed["mafs"] == pytest.approx(total / 3)
    assert last["steps"] == 3 * 4 == 3 * (1 + lines(tmp_path / "run/train.jsonl")[-1]["step"])
    assert last["mafs"] == pytest.approx(total + 3 * (4 - steps) * work.mafs_per_step)
    assert last["mafs"] <= total + 3 * 0.5 * work.mafs_per_step


def test_gflops_that_buy_no_step_are_refused(small_scale, tmp_path):
    with pytest.raises(UserError, match=r"budget\.gflops: 0.001"):
        run(recipe_of(small_scale, "budget.gflops=1e-3"), tmp_path / "run")


@contextmanager
def clock(first: float, then: float, change: int = 0) -> Iterator[None]:
    """Time passes only in evaluations, 3 s each, and in steps: `first` seconds, `then` others after a `change`."""
    now, steps, score = 1000.0, 0, Scorer.score

    def scored(scorer, **how):
        nonlocal now
        now += 3.0
        return score(scorer, **how)

    def stepped(*_):
        nonlocal now, steps
        steps += 1
        now += first if steps <= change else then

    hook = register_optimizer_step_post_hook(stepped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now)
        patch.setattr(Scorer, "score", scored)
        yield
    hook.remove()


@pytest.fixture
def hours(small_scale):
    """Two updates of 23 s each, from a base model that is there."""
    recipe = recipe_of(small_scale, f"budget={{hours: {23 / 3600}}}", "stream.updates=2")
    starting_model(recipe.model, CPU)
    work_of(recipe)  # counting takes optimizer steps, too
    return recipe


def spent(scored: list[dict]) -> list[float]:
    """Seconds of each update."""
    return [b["seconds"] - a["seconds"] for a, b in pairwise(scored)]


def test_hours_become_steps_that_fit_in_them(hours, tmp_path):
    with clock(first=1.0, then=1.0):
        scored = run(hours, tmp_path / "run")
    # A first evaluation of 3 s, then 6 steps timed once; 0.95 of what 3 s for the next evaluation leave of 23.
    assert scored[-1]["steps"] == 2 * int(0.95 * (23 - 3 - 6))
    assert scored[0]["seconds"] == 3 and max(spent(scored)) <= 23
    assert load_model(None, str(tmp_path / "run/model")) and scored[-1]["update"] == 2


def test_an_update_that_slows_down_ends_at_most_one_step_late(hours, tmp_path):
    with clock(first=1.0, then=2.5, change=6):  # after the steps that are timed
        scored = run(hours, tmp_path / "run")
    assert [line["update"] for line in scored] == [0, 1, 2]
    assert all(23 < seconds <= 23 + 2.5 for seconds in spent(scored))
    assert weights_of(tmp_path / "run", 2) and (tmp_path / "run/model").exists()


def test_the_steps_of_an_hours_budget_survive_an_interruption(hours, tmp_path):
    with clock(first=1.0, then=1.0), pytest.raises(Interrupted):
        run_until(hours, tmp_path / "run", 6 + 5, terminate)
    with (
        clock(first=0.1, then=0.1),
        after_steps(2 * 13 - 5 + 1, terminate),
    ):  # this machine alone would be given 130
        assert run(hours, tmp_path / "run", resume=True)[-1]["steps"] == 2 * 13


# --- the bound of the temperature -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "method", "learn", "bound"),
    [
        (0.05, {"name": "finetune"}, None, 100.0),  # exp(logit_scale) 20: the recipe's bound
        (1 / 112, {"name": "finetune"}, None, 112.0),  # as a released SigLIP: it keeps its start
        (1 / 112, {"name": "lora", "rank": 2}, None, None),  # nothing trains it
        (1 / 112, {"name": "locked", "tower": "text"}, None, None),
        (1 / 112, {"name": "finetune"}, False, None),
        (1 / 112, {"name": "lora", "rank": 2}, True, 112.0),
    ],
)
def test_the_bound_is_for_a_scale_that_is_trained_and_not_below_its_start(
    start, method, learn, bound, small_scale, tmp_path
):
    overrides = [f"method={json.dumps(method)}", f"temperature={json.dumps({'init': start, 'learn': learn})}"]
    recipe = recipe_of(small_scale, *overrides)
    run(recipe, tmp_path / "run")
    scales = [weights_of(tmp_path / "run", n)["logit_scale"].exp().item() for n in range(4)]
    assert scales[0] == pytest.approx(1 / start, rel=1e-6)
    if bound is None:
        assert scales == [scales[0]] * 4
    else:
        assert all(scale <= bound * (1 + 1e-6) for scale in scales) and scales[3] != scales[0]


# --- evaluations within an update -------------------------------------------------------------------------


def test_evaluations_within_an_update_change_nothing_but_their_lines(small_scale, tmp_path):
    logs = {}
    for within in (0, 2):
        overrides = [f"evaluation.within={within}", "budget.steps=6"]
        recipe = recipe_of(small_scale, *overrides)
        logs[within] = run(recipe, tmp_path / str(within))
    places = [(line["update"], line.get("step")) for line in logs[2]]
    assert places == [
        (0, None),
        (0, 2),
        (0, 4),
        (1, None),
        (1, 2),
        (1, 4),
        (2, None),
        (2, 2),
        (2, 4),
        (3, None),
    ]
    assert [line["steps"] for line in logs[2]] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]
    ends = [line for line in logs[2] if "step" not in line]
    assert [line["datasets"] for line in ends] == [line["datasets"] for line in logs[0]]
    assert evaluations(tmp_path / "2") == ends
    for n in range(4):
        assert_same(weights_of(tmp_path / "0", n), weights_of(tmp_path / "2", n))


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_an_interrupted_run_has_every_evaluation_within_once(cut, small_scale, tmp_path):
    overrides = ["evaluation.within=2", "budget.steps=6"]
    recipe = recipe_of(small_scale, *overrides)
    whole = run(recipe, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_until(recipe, tmp_path / "cut", cut, terminate)
    resumed = run(recipe, tmp_path / "cut", resume=True)
    scores = [
        [(line["update"], line.get("step"), line["datasets"]) for line in log] for log in (whole, resumed)
    ]
    assert scores[0] == scores[1]
