"""A model over several runs: start from a folder of pictures, go on, look back, go back, go on again."""

import json
from pathlib import Path

import open_clip
import pytest
import yaml
from safetensors.torch import load_file
from small_runs import assert_same, invoke, lines, weights_of, without_reports

from fomo.datasets.sources.world import DOMAINS, render
from fomo.errors import UserError
from fomo.runs.lineage import child_folder, concept_scores, head_of


def succeed(*arguments: object) -> str:
    """-> what a command prints."""
    with without_reports():
        done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def draw(folder: Path, domain: str, concepts: slice, each: int = 12) -> Path:
    """A class folder of rendered pictures."""
    for concept in DOMAINS[domain].concepts[concepts]:
        (folder / concept).mkdir(parents=True)
        for index in range(each):
            render(domain, concept, index).save(folder / concept / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def place(small_scale, tmp_path_factory):
    """flags, then stars, then signs; each update a run folder."""
    place = tmp_path_factory.mktemp("place")
    for domain in ("flags", "stars", "signs"):
        draw(place / domain, domain, slice(0, 4))
    first = place / "runs/model"
    succeed("update", "--scale", small_scale, "--data", place / "flags", "--out", first)
    succeed("continue", first, "--data", place / "stars")
    succeed("continue", place / "runs/model-update2", "--data", place / "signs")
    return place


def test_a_folder_becomes_one_update_with_a_tenth_held_out(place):
    run = place / "runs/model"
    scored = lines(run / "metrics.jsonl")
    assert [line["update"] for line in scored] == [0, 1]
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["stream"]["updates"] == 1 and recipe["method"]["keep"] == 0.5
    assert recipe["data"] == str(run / "data.yaml")
    curve = {row["keep"]: row["ka"] for row in scored[-1]["keeps"]}
    assert list(curve) == sorted(curve) and min(curve) == 0
    assert curve[0.5] == pytest.approx(scored[-1]["ka"])  # what was deployed is on the curve


@pytest.mark.parametrize("form", ["folder", "data file"])
def test_what_cannot_be_read_is_skipped_on_request_and_so_it_stays(small_scale, tmp_path, form):
    """Said once: what resumes and what goes on need not say it again."""
    photos, run = draw(tmp_path / "photos", "flags", slice(0, 3)), tmp_path / "run"
    for bad in sorted(photos.rglob("*.png"))[::9]:
        bad.write_bytes(b"nothing")
    data = photos
    if form == "data file":
        data = tmp_path / "own.yaml"
        data.write_text(f"adaptation: {{photos: {{source: folder, train: {photos}, holdout: 0.2}}}}\n")
    command = ("update", "--scale", small_scale, "--data", data, "--out", run, "--set", "stream.updates=1")
    told = refused(*command)
    assert "pictures cannot be read, first: " in told and "--skip-bad" in told and "--bad LIST.txt" in told
    succeed(*command, "--skip-bad")
    whole = weights_of(run, 1)
    assert yaml.safe_load((run / "data.yaml").read_text())["skip_bad"] is True
    for kept in (run / "state").iterdir():  # as if killed before the first checkpoint
        kept.unlink()
    succeed(*command, "--resume")
    assert_same(weights_of(run, 1), whole)
    new = draw(tmp_path / "new", "stars", slice(0, 2))
    succeed("continue", run, "--data", new, "--out", tmp_path / "child")
    assert yaml.safe_load((tmp_path / "child/data.yaml").read_text())["skip_bad"] is True


def test_a_child_may_be_the_first_that_skips(place, tmp_path):
    new, parent = draw(tmp_path / "new", "stars", slice(4, 6)), place / "runs/model"
    for bad in sorted(new.rglob("*.png"))[::5]:
        bad.write_bytes(b"nothing")
    assert "cannot be read" in refused("continue", parent, "--data", new, "--out", tmp_path / "first")
    succeed("continue", parent, "--data", new, "--out", tmp_path / "second", "--skip-bad")
    assert yaml.safe_load((tmp_path / "second/data.yaml").read_text())["skip_bad"] is True


def test_a_child_goes_on_where_its_parent_ended(place):
    parent, child = place / "runs/model", place / "runs/model-update2"
    origin = yaml.safe_load((child / "parent.yaml").read_text())
    assert origin["run"] == str(parent) and origin["update"] == 1
    assert_same(weights_of(parent, 1), weights_of(child, 1))
    first, last = lines(child / "metrics.jsonl")
    assert (first["update"], last["update"]) == (1, 2)
    assert set(first["datasets"]) == {"flags", "stars"}
    assert last["samples"] > first["samples"] == lines(parent / "metrics.jsonl")[-1]["samples"]
    assert {line["update"] for line in lines(child / "train.jsonl")} == {2}


def test_the_grandchild_replays_everything_before_it(place):
    run = place / "runs/model-update3"
    stream = json.loads((run / "stream.json").read_text())
    assert [len(update) for update in stream["updates"]] == [4, 4, 4]
    assert set(stream["sources"]) == {"flags", "stars", "signs"}
    assert set(lines(run / "metrics.jsonl")[-1]["datasets"]) == {"flags", "stars", "signs"}


def test_the_log_has_every_update_once(place):
    _, *rows = succeed("log", place / "runs/model-update3").splitlines()
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    for row, taught in zip(rows, ("untouched", "flags (4)", "stars (4)", "signs (4)"), strict=True):
        assert taught in row


def test_diff_agrees_with_the_scores(place):
    run = place / "runs/model-update3"
    then, now = concept_scores(run, 1), concept_scores(run, 3)
    better = sum(now[key] > then[key] for key in then.keys() & now.keys())
    assert f"{better} got better" in succeed("diff", run, 1, 3).splitlines()[0]


def test_roll_back_and_go_on_makes_a_sibling_and_deletes_nothing(place):
    run, other = place / "runs/model-update3", place / "runs/other"
    before = {path for path in run.rglob("*") if path.is_file()}
    succeed("rollback", run, "--to", 2)
    assert before <= {path for path in run.rglob("*") if path.is_file()}
    deployed = load_file(run / "model/open_clip_model.safetensors")
    assert_same(deployed, weights_of(place / "runs/model-update2", 2))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{run}/model")
    assert_same(deployed, model.state_dict())
    succeed("continue", run, "--data", place / "signs", "--out", other)
    assert yaml.safe_load((other / "parent.yaml").read_text())["update"] == 2
    # The same data after the same update: the sibling is the run that was rolled back, bit for bit.
    assert_same(weights_of(other, 3), weights_of(run, 3))
    succeed("rollback", run, "--to", 3)
    assert head_of(run) == 3


def refused(*arguments: object) -> str:
    """-> the line of a mistake."""
    done = invoke(*arguments)
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    return done.stderr


def test_what_cannot_go_on_is_one_line(place, tmp_path):
    run, stars = place / "runs/model", ("--data", place / "stars")
    assert "no finished update" in refused("continue", tmp_path, *stars)
    assert "gone.yaml" in refused("continue", run, "--data", tmp_path / "gone.yaml")
    assert "kept: 0, 1" in refused("rollback", run, "--to", 7)
    assert "update 5" in refused("diff", run, 0, 5)
    assert str(run) in refused("continue", run, *stars, "--out", run)


def test_a_folder_with_other_things_in_it_is_left_alone(place, tmp_path):
    (tmp_path / "data.yaml").write_text("mine")
    assert "--out" in refused("update", "--data", place / "flags", "--out", tmp_path)
    assert (tmp_path / "data.yaml").read_text() == "mine"


def test_a_buffer_that_changed_is_named(place):
    picture, aside = next((place / "flags").rglob("3.png")), place / "aside.png"
    picture.rename(aside)
    arguments = ["--data", place / "signs", "--out", place / "runs/changed"]
    assert "adaptation.flags" in refused("continue", place / "runs/model", *arguments)
    aside.rename(picture)


def test_children_are_named_by_their_update_and_siblings_by_a_letter(tmp_path):
    run = tmp_path / "shop"
    run.mkdir()
    assert child_folder(run, 2) == tmp_path / "shop-update2"
    (tmp_path / "shop-update2").mkdir()
    assert child_folder(run, 2) == tmp_path / "shop-update2-b"
    assert child_folder(tmp_path / "shop-update2", 3) == tmp_path / "shop-update3"
    with pytest.raises(UserError, match="no finished update"):
        head_of(run)
