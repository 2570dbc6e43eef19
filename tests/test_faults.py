"""Promises hold whatever goes wrong: kills, signals, full disks, damaged files, two at a time, no numbers.

`tests/soak.py` (`make soak`) does the kills at many more instants. docs/reliability.md lists the promises.
"""

import hashlib
import os
import resource
import shlex
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import FORKS, Child, assert_same, recipe_of, run, run_until, terminate, weights_of
from soak import Kill, contents, differing, kill_at_change, update

from fomo.atomic import naming
from fomo.clip import load as load_model
from fomo.errors import Failure, Interrupted, UserError
from fomo.load_recipe import load
from fomo.runs.folder import FORMAT, Run

COUNT = FORKS.RawValue("i", 0)


@pytest.fixture(scope="module")
def whole(small_scale, tmp_path_factory):
    """The place of an uninterrupted run; `changes` of the file system in it."""
    place = tmp_path_factory.mktemp("whole")
    assert killed_at(place, 0, *update(small_scale, place)) == 0
    (place / "changes").write_text(str(COUNT.value))
    return place


@pytest.fixture
def place(whole, tmp_path):
    """A copy of the whole one: a run to damage, and a cache that is there."""
    shutil.copytree(whole, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def begun(place):
    """The same before its run began."""
    shutil.rmtree(place / "run")
    return place


@pytest.fixture(scope="module")
def recipe(small_scale):
    return recipe_of(small_scale, "method={name: merge}")


@pytest.fixture(scope="module")
def quick(recipe, tmp_path_factory):
    """The place of an uninterrupted run of this process."""
    place = tmp_path_factory.mktemp("quick")
    run(recipe, place / "run")
    return place


def killed_at(place: Path, change: int, *command: object) -> int:
    """The exit status of a command that is killed at a change of the file system; COUNT says how many it made."""
    COUNT.value = 0
    return Child(place, *command, fault=partial(kill_at_change, change, COUNT)).end()


def goes_on_as(whole: Path, place: Path, scale: Path, training: bool = True) -> None:
    child = Child(place, *update(scale, place))
    assert child.end() == 0, child.log.read_text()
    assert differing(whole, place, training) == []


def checkpoints(place: Path) -> list[Path]:
    return sorted((place / "run/state").glob("0*.pt"))


def named(path: Path, content: dict | bytes) -> None:
    """Write a newer checkpoint with the hash that belongs to its bytes."""
    torch.save(content, path) if isinstance(content, dict) else path.write_bytes(content)
    path.rename(path.with_name(f"000099-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.pt"))


def test_the_comparison_sees_one_changed_bit(whole, place):
    assert differing(whole, place) == []
    state = next((place / "run/state").glob("update_001-*"))
    content = torch.load(state, weights_only=True)
    content["method"]["models"]["ema"]["logit_scale"] += 1e-6
    torch.save(content, state)
    for path in (place / "run/weights/update_001.safetensors", *(place / "cache").rglob("pixels.bin")):
        damage(path, 9, flip=True)
    log = place / "run/metrics.jsonl"
    log.write_text(log.read_text().replace('"update": 2', '"update": 4'))
    found = differing(whole, place)
    assert found[0] == "metrics.jsonl" and found[-1] == "state of update_001" and len(found) == 9


# --- killed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, after, share", [(3, 0, 0.25), (0, 1, 0.65), (1, 3, 0.9)])
def test_a_killed_run_goes_on_to_the_same_bits(whole, small_scale, tmp_path, workers, after, share):
    change = round(share * int((whole / "changes").read_text()))
    killed = Kill(workers, after, change=change).survived(small_scale, whole, tmp_path / "place", COUNT)
    assert killed is not None and killed[1] == []


def crash(*_) -> None:
    raise GeneratorExit  # which nobody handles


@pytest.mark.parametrize("step", [1, 4, 7, 11, 12])
@pytest.mark.parametrize("act, error", [(terminate, Interrupted), (crash, GeneratorExit)])
def test_a_run_stopped_within_or_after_any_step_goes_on_to_the_same_bits(
    recipe, quick, tmp_path, step, act, error
):
    with pytest.raises(error):
        run_until(recipe, tmp_path / "run", step, act)
    run(recipe, tmp_path / "run", resume=True, workers=1)
    assert differing(quick, tmp_path, training=error is not Interrupted) == []


def in_training(place: Path) -> bool:
    log = place / "run/train.jsonl"
    return log.exists() and log.read_text().count("\n") > 4


@pytest.mark.parametrize("signum, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_to_a_process_saves_and_tells_the_way_on(whole, begun, small_scale, signum, workers):
    child = Child(begun, *update(small_scale, begun, workers))
    child.signal_when(partial(in_training, begun), signum)
    python, program, *command = shlex.split(child.mistake(128 + signum).partition("go on with: ")[2])
    assert (python, program) == ("python", "fomo.py")
    assert Child(begun, *command, "--device", "cpu").end() == 0
    assert differing(whole, begun, training=False) == []  # its log has one line more


def test_data_workers_that_outlive_a_killed_run_do_not_keep_its_folder(whole, begun, small_scale):
    child = Child(begun, *update(small_scale, begun, workers=2))
    assert child.signal_when(partial(in_training, begun), signal.SIGKILL) == 128 + signal.SIGKILL
    goes_on_as(whole, begun, small_scale)  # at once


def test_a_killed_continue_is_resumed_like_any_run(place):
    new = place / "new.yaml"
    new.write_text("adaptation:\n  stars: {source: world, domain: stars, train: 6, test: 4}\n")
    whole, child = place / "first/run", place / "child/run"
    assert killed_at(place, 0, "continue", place / "run", "--data", new, "--out", whole) == 0
    change = round(0.8 * COUNT.value)
    go_on = ["continue", place / "run", "--data", new, "--out", child]
    assert killed_at(place, change, *go_on) == 128 + signal.SIGKILL
    resumed = Child(place, "update", "--recipe", child / "recipe.yaml", "--out", child, "--resume")
    assert resumed.end() == 0, resumed.log.read_text()
    assert differing(whole.parent, child.parent) == []


def test_a_killed_pretrain_leaves_the_whole_model_or_none(whole, small_scale, begun):
    out, change = begun / "base", 1
    command = ["pretrain", "--scale", small_scale, "-o", out, "--device", "cpu"]
    while killed_at(begun, change, *command):
        assert not out.exists() or load_model(None, str(out))
        shutil.rmtree(out, ignore_errors=True)  # killed between its name and the end
        change += 1
    assert 4 < change < 20
    model = next((whole / "cache/models").glob("*/open_clip_model.safetensors"))
    assert (out / model.name).read_bytes() == model.read_bytes()


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_killed_cache_leaves_nothing_that_a_later_one_takes_for_whole(whole, small_scale, tmp_path, share):
    command = ["data", "cache", small_scale.parent / "data.yaml", "--size", 32]
    there, made = whole / "cache/pixels", tmp_path / "cache/pixels"
    changes = 7 * len(list(there.iterdir()))  # of each cache at least
    assert killed_at(tmp_path, round(share * changes), *command) == 128 + signal.SIGKILL
    before = contents(made)
    assert before < contents(there)
    assert Child(tmp_path, *command).end() == 0
    assert contents(made) == contents(there) > before
    assert all((made / name).read_bytes() == (there / name).read_bytes() for name in contents(there))


# --- full and read-only disks ----------------------------------------------------------------------------


def limit_files(size: int) -> None:
    """No file may become larger: what a full disk does, but for the error's number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_at(event: str, name: str, number: int, room: int) -> None:
    """From the number-th audit event of a path on the disk has room for so many bytes, until a write fails."""
    left = number

    def hook(happened: str, arguments: tuple) -> None:
        nonlocal left
        if happened == event and str(arguments[0]).endswith(name):
            left -= 1
            if not left:
                limit_files(room + (os.path.getsize(arguments[0]) if event == "open" else 0))

    signal.signal(signal.SIGXFSZ, lambda *_: limit_files(resource.RLIM_INFINITY))
    sys.addaudithook(hook)


@pytest.mark.parametrize(
    "fault, line, left",
    [
        (partial(limit_files, 2_000_000), "run/weights/update_000.safetensors: File too large", 0),
        (partial(limit_files, 9_000_000), "run/state/writing.pt: File too large", 1),
        (
            partial(full_at, "os.mkdir", "model.part", 1, 2_000_000),
            "run/model.part/open_clip_model.safetensors: File too large",
            0,
        ),
        (partial(full_at, "open", "train.jsonl", 5, 20), "run/train.jsonl: File too large", 2),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_good_state_goes_on(
    whole, begun, small_scale, fault, line, left
):
    child = Child(begun, *update(small_scale, begun), fault=fault)
    assert child.mistake(1) == f"fomo: {begun / line}"
    assert len(checkpoints(begun)) == left
    assert not [p for p in (begun / "run").rglob("*") if p.name == "writing.pt" or p.suffix == ".part"]
    goes_on_as(whole, begun, small_scale)


@pytest.mark.parametrize("size", [1_000_000, 100_000])  # enough for pictures but no model, for neither
def test_a_cache_without_room_is_one_line(whole, small_scale, tmp_path, size):
    child = Child(tmp_path, *update(small_scale, tmp_path), fault=partial(limit_files, size))
    line = child.mistake(2)
    assert "File too large" in line and "FOMO_CACHE" in line and str(tmp_path / "cache") in line
    goes_on_as(whole, tmp_path, small_scale)


def test_an_error_that_is_not_the_systems_is_not_disguised(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), naming(tmp_path / "x"):
        raise RuntimeError("out of memory")


# --- damaged, deleted, newer, another's ------------------------------------------------------------------


def reopened(place: Path) -> dict | None:
    """The checkpoint that a resumed run would go on from."""
    opened, checkpoint = Run.open(place / "run", load(place / "run/recipe.yaml"), resume=True)
    opened.close()
    return checkpoint


def damage(path: Path, tenth: int, flip: bool) -> None:
    content = bytearray(path.read_bytes())
    at = len(content) * tenth // 10
    if flip:
        content[at] ^= 1 << tenth % 8
    path.write_bytes(content if flip else content[:at])


@pytest.mark.parametrize("flip", [False, True])
def test_a_checkpoint_cut_or_flipped_at_each_tenth_is_passed_over(place, capfd, flip):
    before, newest = checkpoints(place)
    expected = torch.load(before)["position"]
    content = newest.read_bytes()
    assert torch.load(newest)["position"] != expected
    for tenth in range(10):
        newest.write_bytes(content)
        damage(newest, tenth, flip)
        assert reopened(place)["position"] == expected, tenth
        assert str(newest) in capfd.readouterr().err


def test_both_checkpoints_damaged_the_last_good_update_is_used(whole, place, small_scale):
    for path in (*checkpoints(place), *(place / "run/state").glob("update_003-*")):
        damage(path, 5, flip=True)
    assert reopened(place)["position"]["update"] == 2
    goes_on_as(whole, place, small_scale)


@pytest.mark.parametrize("delete", [False, True])
def test_no_checkpoint_left_a_run_begins_again_and_says_so(whole, place, small_scale, delete):
    for path in (place / "run/state").iterdir():
        path.unlink() if delete else damage(path, 3, flip=False)
    assert reopened(place) is None
    goes_on_as(whole, place, small_scale)
    assert ("damaged" in (place / "log.txt").read_text()) != delete


def test_a_child_without_a_whole_checkpoint_does_not_begin_as_its_parents_did(place):
    (place / "run/parent.yaml").write_text("run: elsewhere\n")
    shutil.rmtree(place / "run/state")
    with pytest.raises(UserError, match="run/state: "):
        reopened(place)


def test_deleted_weights_are_missed_only_where_they_are_needed(place, small_scale):
    (place / "run/weights/update_001.safetensors").unlink()
    assert Child(place, *update(small_scale, place)).end() == 0
    child = Child(place, "rollback", place / "run", "--to", 1)
    assert "update_001.safetensors: " in child.mistake(2)


def test_a_log_that_lost_lines_is_not_written_on(place, small_scale):
    checkpoints(place)[-1].unlink()
    (place / "run/metrics.jsonl").write_text("")
    assert "metrics.jsonl: 0 bytes" in Child(place, *update(small_scale, place)).mistake(2)


def test_a_run_of_a_newer_format_is_refused(place):
    newest = checkpoints(place)[-1]
    named(newest, {**torch.load(newest), "format": FORMAT + 1})
    with pytest.raises(UserError, match=f"format {FORMAT + 1} .*accepted: up to {FORMAT}"):
        reopened(place)


def test_two_processes_on_one_run_the_second_is_told_who_is_first(place, small_scale):
    first, _ = Run.open(place / "run", load(place / "run/recipe.yaml"), resume=True)
    told = Child(place, *update(small_scale, place)).mistake(2)
    assert f"{place / 'run'}: " in told and str(os.getpid()) in told and socket.gethostname() in told
    first.close()
    assert Child(place, *update(small_scale, place)).end() == 0


def test_another_number_of_threads_is_warned_of(place, small_scale):
    checkpoints(place)[-1].unlink()
    child = Child(place, *update(small_scale, place), fault=partial(torch.set_num_threads, 2))
    assert child.end() == 0
    told = child.log.read_text()
    assert "'threads': 1} then" in told and "'threads': 2} now" in told


def test_a_changed_recipe_is_refused_by_name(small_scale, quick):
    changed = recipe_of(small_scale, "method={name: merge, keep: 0.9}", "optimizer.lr=0.5")
    with pytest.raises(UserError, match=r"method\.keep, optimizer\.lr"):
        run(changed, quick / "run", resume=True)


def test_resume_of_a_finished_run_changes_nothing(recipe, quick):
    before = (quick / "run/metrics.jsonl").read_bytes()
    assert run(recipe, quick / "run", resume=True)[-1]["update"] == 3
    assert (quick / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("there", [False, True])
def test_resume_of_nothing_is_a_start(recipe, tmp_path, there):
    if there:
        (tmp_path / "run").mkdir()
    opened, checkpoint = Run.open(tmp_path / "run", recipe, resume=True)
    opened.close()
    assert checkpoint is None and opened.position.update == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_model_left_aside_between_two_renames_is_found(place):
    (place / "run/model").rename(place / "run/model.old")
    assert load_model(None, str(Run(place / "run").model))
    assert not (place / "run/model.old").exists()


# --- no numbers ------------------------------------------------------------------------------------------


@torch.no_grad()
def poison(optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[0]["params"][0].fill_(torch.nan)


def test_a_loss_that_is_not_finite_names_update_and_step_and_the_last_good_weights_stay(
    recipe, quick, tmp_path
):
    with pytest.raises(Failure, match=rf"update 2, step 2: .*{tmp_path / 'run'}"):
        run_until(recipe, tmp_path / "run", 4 + 2, poison)  # steps count from 0
    good = weights_of(quick / "run", 1)
    assert_same(weights_of(tmp_path / "run", 1), good)
    assert_same(load_model(None, str(tmp_path / "run/model")).model.state_dict(), good)
    assert not (tmp_path / "run/weights/update_002.safetensors").exists()
    run(recipe, tmp_path / "run", resume=True)
    assert differing(quick, tmp_path) == []
