"""A model's life over several runs: start from a folder of pictures, go on, look back, go back, go on again."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from fomo.datasets.sources.world import DOMAINS, render
from fomo.errors import UserError
from fomo.runs.lineage import child_folder, concept_scores, head_of

ROOT = Path(__file__).parents[2]


def invoke(*arguments):
    cli = runpy.run_path(str(ROOT / "fomo.py"))["cli"]
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def draw(folder: Path, domain: str, concepts: slice, each: int = 12) -> Path:
    """A class folder of rendered pictures."""
    for concept in DOMAINS[domain].concepts[concepts]:
        (folder / concept).mkdir(parents=True)
        for index in range(each):
            render(domain, concept, index).save(folder / concept / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def life(small_scale, tmp_path_factory):
    """flags, then stars, then signs; each update a run folder."""
    place = tmp_path_factory.mktemp("life")
    for name, domain in (("flags", "flags"), ("stars", "stars"), ("signs", "signs")):
        draw(place / name, domain, slice(0, 4))
    first = place / "runs/model"
    done = invoke("update", "--scale", small_scale, "--data", place / "flags", "--out", first)
    assert done.exit_code == 0, done.output
    for run, data in ((first, "stars"), (place / "runs/model-update2", "signs")):
        done = invoke("continue", run, "--data", place / data)
        assert done.exit_code == 0, done.output
    return place


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_folder_becomes_one_update_with_a_tenth_held_out(life):
    run = life / "runs/model"
    assert [line["update"] for line in lines(run)] == [0, 1]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["stream"]["updates"] == 1 and recipe["method"]["keep"] == 0.5
    assert recipe["data"] == str(run / "data.yaml")
    kept = [row["keep"] for row in lines(run)[-1]["keeps"]]
    assert kept == sorted(kept) and kept[0] == 0
    half = next(row for row in lines(run)[-1]["keeps"] if row["keep"] == 0.5)
    assert half["ka"] == pytest.approx(lines(run)[-1]["ka"])  # what was deployed is on the curve


def test_a_child_goes_on_where_its_parent_ended(life):
    parent, child = life / "runs/model", life / "runs/model-update2"
    origin = yaml.safe_load((child / "parent.yaml").read_text())
    assert origin["run"] == str(parent) and origin["update"] == 1
    before, after = (load_file(run / "weights/update_001.safetensors") for run in (parent, child))
    assert all(torch.equal(before[name], after[name]) for name in before)
    scored = lines(child)
    assert [line["update"] for line in scored] == [1, 2]
    assert set(scored[0]["datasets"]) == {"flags", "stars"}
    assert scored[1]["samples"] > scored[0]["samples"] == lines(parent)[-1]["samples"]
    train = [json.loads(line) for line in (child / "train.jsonl").read_text().splitlines()]
    assert {line["update"] for line in train} == {2}


def test_the_grandchild_replays_everything_before_it(life):
    run = life / "runs/model-update3"
    told = json.loads((run / "stream.json").read_text())
    assert [len(update) for update in told["updates"]] == [4, 4, 4]
    assert set(told["sources"]) == {"flags", "stars", "signs"}
    assert set(lines(run)[-1]["datasets"]) == {"flags", "stars", "signs"}


def test_the_log_tells_every_update_once(life):
    done = invoke("log", life / "runs/model-update3")
    assert done.exit_code == 0, done.output
    _, *rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    for row, taught in zip(rows, ("untouched", "flags (4)", "stars (4)", "signs (4)"), strict=True):
        assert taught in row


def test_diff_names_concepts_and_agrees_with_the_scores(life):
    run = life / "runs/model-update3"
    done = invoke("diff", run, 1, 3)
    assert done.exit_code == 0, done.output
    then, now = concept_scores(run, 1), concept_scores(run, 3)
    better = sum(now[key] > then[key] for key in then.keys() & now.keys())
    assert f"{better} got better" in done.stdout.splitlines()[0]


def test_roll_back_and_go_on_makes_a_sibling_and_deletes_nothing(life, small_scale):
    run = life / "runs/model-update3"
    before = {path for path in run.rglob("*") if path.is_file()}
    done = invoke("rollback", run, "--to", 2)
    assert done.exit_code == 0, done.output
    assert before <= {path for path in run.rglob("*") if path.is_file()}
    deployed = load_file(run / "model/open_clip_model.safetensors")
    second = load_file(life / "runs/model-update2/weights/update_002.safetensors")
    assert all(torch.equal(deployed[name], second[name]) for name in second)
    done = invoke("continue", run, "--data", life / "signs", "--out", life / "runs/other")
    assert done.exit_code == 0, done.output
    assert yaml.safe_load((life / "runs/other/parent.yaml").read_text())["update"] == 2
    # The same data after the same update: the sibling is the run that was rolled back, bit for bit.
    a, b = (
        load_file(life / f"runs/{name}/weights/update_003.safetensors") for name in ("other", "model-update3")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert invoke("rollback", run, "--to", 3).exit_code == 0 and head_of(run) == 3


def test_open_clip_opens_the_deployed_model_in_a_fresh_process(life):
    code = (
        "import open_clip, sys; model, _, p = open_clip.create_model_and_transforms('local-dir:' + sys.argv[1]);"
        "print(sum(x.numel() for x in model.parameters()))"
    )
    command = [sys.executable, "-c", code, str(life / "runs/model-update2/model")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and int(done.stdout) > 500_000, done.stderr


def test_what_cannot_go_on_is_one_line(life, tmp_path):
    run = life / "runs/model"
    for arguments, expected in (
        (("continue", tmp_path, "--data", life / "stars"), "no finished update"),
        (("continue", run, "--data", tmp_path / "gone.yaml"), "gone.yaml: no such file"),
        (("rollback", run, "--to", 7), "update 7 is not kept, kept: 0, 1"),
        (("diff", run, 0, 5), "update 5 was not scored"),
        (("continue", run, "--data", life / "stars", "--out", run), "exists already"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2 and expected in done.stderr, done.output
        assert "Traceback" not in done.output


def test_a_folder_with_other_things_in_it_is_left_alone(life, tmp_path):
    (tmp_path / "data.yaml").write_text("mine")
    done = invoke("update", "--data", life / "flags", "--out", tmp_path)
    assert done.exit_code == 2 and "--out" in done.stderr
    assert (tmp_path / "data.yaml").read_text() == "mine"


def test_a_buffer_that_changed_is_named(life):
    picture = next((life / "flags").rglob("3.png"))
    content = picture.read_bytes()
    picture.unlink()
    try:
        done = invoke(
            "continue", life / "runs/model", "--data", life / "signs", "--out", life / "runs/changed"
        )
        assert done.exit_code == 2 and "adaptation.flags" in done.stderr and "then" in done.stderr
    finally:
        picture.write_bytes(content)


def test_children_are_named_by_their_update_and_siblings_by_a_letter(tmp_path):
    run = tmp_path / "shop"
    run.mkdir()
    assert child_folder(run, 2) == tmp_path / "shop-update2"
    (tmp_path / "shop-update2").mkdir()
    assert child_folder(run, 2) == tmp_path / "shop-update2-b"
    assert child_folder(tmp_path / "shop-update2", 3) == tmp_path / "shop-update3"
    with pytest.raises(UserError, match="no finished update"):
        head_of(run)
