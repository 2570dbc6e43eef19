"""A model over several runs: start from a folder of pictures, go on, look back, go back, go on again."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import (
    ROOT,
    after_steps,
    assert_same,
    invoke,
    lines,
    terminate,
    weights_of,
    without_reports,
)

from fomo.datasets.sources.world import DOMAINS, render
from fomo.errors import UserError
from fomo.runs.lineage import child_folder, concept_scores, head_of, weights_hash


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


def blocks(text: str) -> dict[str, list[str]]:
    """Of `log`: its rows by the heading above them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("KA over "):
            found[line] = []
        else:
            found[list(found)[-1]].append(line)
    return found


def test_the_log_has_a_block_for_each_set_of_test_sets(place):
    runs = [place / "runs" / name for name in ("model", "model-update2", "model-update3")]
    found = blocks(succeed("log", runs[2]))
    names = ("flags", "flags, stars", "flags, stars, signs")
    assert list(found) == [f"KA over {sets}; ZS over no set" for sets in names]
    same = "the same model, on these sets"
    expected = [("untouched", "flags (4)"), (same, "stars (4)"), (same, "signs (4)")]
    for run, rows, whats in zip(runs, found.values(), expected, strict=True):
        for row, line, what in zip(rows, lines(run / "metrics.jsonl"), whats, strict=True):
            update, ka, zs, _, weights = row.split()[:5]
            assert update == str(line["update"]) and ka == f"{line['ka']:.1f}" and zs == "n/a"
            assert weights == weights_hash(run, line["update"]) and f"{run.name}: " in row and what in row


def test_a_test_set_that_changed_under_its_name_is_another(place, tmp_path):
    run = tmp_path / "model-update2"
    shutil.copytree(place / "runs/model-update2", run)
    constants = json.loads((run / "run.json").read_text())
    constants["contents"]["flags"] = "another"
    (run / "run.json").write_text(json.dumps(constants))
    assert list(blocks(succeed("log", run)))[1].endswith("; ZS over no set (not as above: flags)")
    del constants["contents"], constants["classes"]  # an older run: what it does not say is no difference
    (run / "run.json").write_text(json.dumps(constants))
    assert list(blocks(succeed("log", run)))[1] == "KA over flags, stars; ZS over no set"


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
    assert f"{tmp_path}: is no run" in refused("continue", tmp_path, *stars)
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
    with pytest.raises(UserError, match="is no run"):
        head_of(run)


# --- what did not work out -------------------------------------------------------------------------------


@pytest.fixture
def first(place, tmp_path):
    """A finished run without children, in a folder that a shell has to have quoted."""
    run = tmp_path / "it's mine" / "model"
    shutil.copytree(place / "runs/model", run)
    return run


def broken(folder: Path) -> Path:
    """Class folders of files that are no pictures."""
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for index in range(12):
            (folder / name / f"{index}.png").write_bytes(b"\x89PNG no picture")
    return folder


def raising(error: BaseException):
    def instead(*_, **__):
        raise error

    return instead


@pytest.mark.parametrize(
    "place_of_error, error",
    [
        (None, None),  # the pictures
        ("fomo.update.Trainer.constants", UserError("method.rank: refused")),
        ("fomo.update.pick_device", UserError("--device: none there")),
        ("fomo.update.Trainer.score", torch.OutOfMemoryError("out of memory")),
        ("fomo.runs.folder.Run.begin", OSError(28, "No space left on device", "x")),
        ("fomo.update.load", KeyboardInterrupt()),
    ],
)
def test_a_child_that_failed_before_it_was_scored_leaves_nothing(
    place, first, tmp_path, monkeypatch, place_of_error, error
):
    before = set(first.parent.rglob("*"))
    data = place / "stars" if error else broken(tmp_path / "broken")
    with monkeypatch.context() as patch:
        if error:
            patch.setattr(place_of_error, raising(error))
        assert invoke("continue", first, "--data", data).exit_code
    assert set(first.parent.rglob("*")) - before <= {first / "lock"}
    succeed("continue", first, "--data", place / "stars")
    assert (first.parent / "model-update2/parent.yaml").exists()
    assert not list(first.parent.glob("*-b"))


@pytest.mark.parametrize("named", [False, True])
def test_a_child_that_failed_before_it_was_trained_has_no_claim_to_its_name(place, first, monkeypatch, named):
    child = first.parent / "model-update2"
    command = ["continue", first, "--data", place / "stars", *(["--out", child] if named else [])]
    with monkeypatch.context() as patch:
        patch.setattr("fomo.update.train", raising(torch.OutOfMemoryError("out of memory")))
        assert invoke(*command).exit_code == 1
    assert len(lines(child / "metrics.jsonl")) == 1  # it was scored, and can be gone on with
    done = invoke(*command)
    assert done.exit_code == 0 and "nothing had been trained there, it begins anew" in done.stderr
    assert [line["update"] for line in lines(child / "metrics.jsonl")] == [1, 2]
    assert not list(first.parent.glob("*-b"))
    assert "this run exists" in refused("continue", first, "--data", place / "stars", "--out", child)


def test_a_child_that_another_process_works_on_keeps_its_name(first):
    child = child_folder(first, 2)
    (child / "state").mkdir(parents=True)
    (child / "parent.yaml").touch()
    assert child_folder(first, 2).name == "model-update2-b"  # no lock yet: it is being made
    (child / "lock").touch()  # as a killed process leaves it
    assert child_folder(first, 2) == child
    code = "import sys; from pathlib import Path; from fomo.runs.folder import lock; "
    code += "held = lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code, child / "lock"], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        assert child_folder(first, 2).name == "model-update2-b"
        other.communicate()
    assert child_folder(first, 2) == child


def way_on(told: str) -> list[str]:
    """The arguments of the command that a message ends with."""
    command = told.strip().splitlines()[-1].partition("go on with: ")[2]
    python, program, *arguments = shlex.split(command)
    assert (python, program) == ("python", "fomo.py")
    return arguments


def test_an_interrupted_child_stays_and_the_command_it_prints_goes_on(place, first):
    command = ["continue", first, "--data", place / "stars"]
    with after_steps(3, terminate):
        stopped = invoke(*command)
    assert stopped.exit_code == 143
    succeed(*command, "--out", first.parent / "sibling")
    assert child_folder(first, 2).name == "model-update2-b"
    succeed(*way_on(stopped.stderr))
    assert_same(weights_of(first.parent / "model-update2", 2), weights_of(first.parent / "sibling", 2))


def test_the_printed_command_is_what_a_shell_understands(place, first):
    with after_steps(3, terminate):
        stopped = invoke("continue", first, "--data", place / "stars")
    command = stopped.stderr.strip().partition("go on with: ")[2]
    assert command.startswith("python fomo.py update --recipe ")
    python = command.replace("python", shlex.quote(sys.executable), 1)
    done = subprocess.run(python, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "KA" in done.stdout, done.stderr
    assert "stars (4)" in succeed("log", first.parent / "model-update2")


@pytest.mark.parametrize(
    "how",
    [
        ["--set", "stream.updates=1"],
        ["--set", "data=data.yaml", "--set", "method={name: merge}"],
        ["--data", "flags"],
        ["--data", "flags", "--model", "runs/model/model", "--seed", 3],
    ],
)
def test_every_way_to_begin_is_gone_on_with_by_the_command_that_is_printed(
    place, small_scale, tmp_path, monkeypatch, how
):
    shutil.copy(small_scale.parent / "data.yaml", place / "data.yaml")
    monkeypatch.chdir(place)
    command = ["update", "--scale", small_scale, *how, "--out", tmp_path / "my run"]
    succeed("pretrain", "--scale", small_scale)  # else its steps are those that are counted
    with after_steps(3, terminate):
        stopped = invoke(*command)
    assert stopped.exit_code == 143, stopped.output
    told = [stopped.stderr, refused(*command), refused(*command, "--resume", "--set", "optimizer.lr=1")]
    told += [refused("continue", tmp_path / "my run", "--data", place / "stars")]
    told += [refused("log", tmp_path / "my run")]
    (words,) = {tuple(way_on(line)) for line in told}
    succeed(*words)
    assert head_of(tmp_path / "my run") == lines(tmp_path / "my run/metrics.jsonl")[-1]["update"]


# --- the way back over several runs ----------------------------------------------------------------------


@pytest.fixture
def family(place, tmp_path):
    """Copies of the three runs that know each other as parents."""
    for name in ("model", "model-update2", "model-update3"):
        shutil.copytree(place / "runs" / name, tmp_path / name)
        if (tmp_path / name / "parent.yaml").exists():
            origin = yaml.safe_load((tmp_path / name / "parent.yaml").read_text())
            origin["run"] = str(tmp_path / Path(origin["run"]).name)
            (tmp_path / name / "parent.yaml").write_text(yaml.safe_dump(origin))
    return [tmp_path / name for name in ("model", "model-update2", "model-update3")]


@pytest.mark.parametrize("update, owner", [(0, 0), (1, 0), (2, 1)])
def test_a_grandchild_rolls_back_to_updates_of_its_parents(place, family, update, owner):
    run = family[2]
    assert f"update {update} is deployed" in succeed("rollback", run, "--to", update)
    assert_same(load_file(run / "model/open_clip_model.safetensors"), weights_of(family[owner], update))
    rows = [row for rows in blocks(succeed("log", run)).values() for row in rows]
    assert int(rows[-1].split()[0]) == head_of(run) == update
    child = run.parent / "again"
    succeed("continue", run, "--data", place / "signs", "--out", child)
    assert lines(child / "metrics.jsonl")[0]["update"] == update
    told = [row for rows in blocks(succeed("log", child)).values() for row in rows]
    assert [int(row.split()[0]) for row in told][-2:] == [update, update + 1]
    succeed("rollback", run, "--to", 3)
    assert head_of(run) == 3


def test_what_the_parent_does_not_keep_is_one_line_that_names_it(family):
    first, _, run = family
    for kept in (first / "state").glob("update_000-*"):
        kept.unlink()
    told = refused("rollback", run, "--to", 0)
    assert f"update 0 is of {first}, roll back that instead: " in told and "kept: 1" in told
    shutil.rmtree(first)
    assert f"{first}: no such run" in refused("rollback", run, "--to", 0)
    assert "kept: 2, 3" in refused("rollback", run, "--to", 7)


def test_an_unfinished_run_that_was_rolled_back_and_went_on_has_deployed_its_last_update(
    small_scale, tmp_path
):
    command = ["update", "--scale", small_scale, "--out", tmp_path / "run"]
    with after_steps(6, terminate):
        assert invoke(*command).exit_code == 143
    succeed("rollback", tmp_path / "run", "--to", 0)
    assert head_of(tmp_path / "run") == 0
    succeed(*command, "--resume")
    assert head_of(tmp_path / "run") == 3


def test_after_a_rollback_diff_still_knows_what_was_scored(family):
    run = family[2]
    before = [succeed("diff", run, *pair) for pair in ((1, 3), (0, 1), (2, 3))]
    succeed("rollback", run, "--to", 0)
    assert before == [succeed("diff", run, *pair) for pair in ((1, 3), (0, 1), (2, 3))]
    assert "update 4 was not scored, scored: 0, 1, 2, 3" in refused("diff", run, 0, 4)


@pytest.mark.parametrize(
    "command", [["log"], ["diff", 0, 1], ["rollback", "--to", 0], ["continue", "--data", "x"], ["report"]]
)
@pytest.mark.parametrize(
    "what, told", [("gone", "no such run"), ("empty", "is no run"), ("file.txt", "is no run")]
)
def test_a_run_that_is_not_there_is_one_line(tmp_path, command, what, told):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    name, *rest = command
    line = refused(name, tmp_path / what, *rest)
    assert line.startswith(f"fomo: {tmp_path / what}: {told}") and line.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file.txt"}
    assert not list((tmp_path / "empty").iterdir())


def test_a_folder_that_is_no_run_is_not_called_one(place, small_scale, tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")  # of the user's, who has not run it yet
    for way in ([], ["--resume"], ["--data", place / "flags"]):
        told = refused("update", "--scale", small_scale, *way, "--out", tmp_path)
        assert "this folder is no run and holds 1 other thing, as recipe.yaml" in told
        assert "a new or an empty folder" in told
    assert "is a file" in refused("update", "--data", place / "flags", "--out", tmp_path / "recipe.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    (tmp_path / "empty").mkdir()
    succeed("continue", place / "runs/model", "--data", place / "stars", "--out", tmp_path / "empty")
    assert (tmp_path / "empty/metrics.jsonl").exists()
