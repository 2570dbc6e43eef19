"""Promises hold whatever goes wrong: kills, signals, full disks, damaged files, two at a time, no time left.

`tests/soak.py` (`make soak`) does the kills at many more instants. docs/reliability.md lists the promises.
"""

import json
import os
import resource
import shutil
import signal
import socket
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lives import stop_after
from soak import FORKS, Child, Kill, contents, differing, kill_at_change, lines, update

import fomo.runs.folder
import fomo.update
from fomo.atomic import naming
from fomo.budget.mafs import work_of
from fomo.clip import Clip
from fomo.clip import load as load_model
from fomo.errors import Interrupted, UserError
from fomo.load_recipe import load
from fomo.runs.folder import FORMAT, Run, checkpoints, file_hash, held
from fomo.update import run_recipe

COUNT = FORKS.RawValue("i", 0)


@pytest.fixture(scope="module", autouse=True)
def no_reports():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Child, "report", False)
        patch.setattr(fomo.update, "write_report", str)
        yield


@pytest.fixture(scope="module")
def whole(small_scale, tmp_path_factory):
    """The place of an uninterrupted run; `changes` of the file system in it is the last line of its log."""
    place = tmp_path_factory.mktemp("whole")
    COUNT.value = 0
    assert Child(place, *update(small_scale, place), fault=partial(kill_at_change, 0, COUNT)).end() == 0
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


def said(child: Child) -> str:
    """The one line that a command ends with."""
    told = child.log.read_text().splitlines()
    assert sum(line.startswith("fomo: ") for line in told) == 1 and "Traceback" not in child.log.read_text()
    return told[-1]


def goes_on_as(whole: Path, place: Path, scale: Path, training: bool = True) -> None:
    child = Child(place, *update(scale, place))
    assert child.end() == 0, child.log.read_text()
    assert differing(whole, place, training) == []


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


def in_training(place: Path) -> bool:
    log = place / "run/train.jsonl"
    return log.exists() and log.read_text().count("\n") > 4


@pytest.mark.parametrize("signum, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_to_a_process_saves_and_tells_the_way_on(whole, begun, small_scale, signum, workers):
    child = Child(begun, *update(small_scale, begun, workers))
    assert child.signal_when(partial(in_training, begun), signum) == 128 + signum
    assert f"saved, go on with --resume: {begun / 'run'}" in said(child)
    goes_on_as(whole, begun, small_scale, training=False)  # its log has one line more


def test_data_workers_that_outlive_a_killed_run_do_not_keep_its_folder(whole, begun, small_scale):
    child = Child(begun, *update(small_scale, begun, workers=2))
    assert child.signal_when(partial(in_training, begun), signal.SIGKILL) == 128 + signal.SIGKILL
    goes_on_as(whole, begun, small_scale)  # at once


def test_a_killed_continue_is_resumed_like_any_run(place):
    (place / "new.yaml").write_text(
        "adaptation:\n  stars: {source: world, domain: stars, train: 6, test: 4}\n"
    )
    go_on = ["continue", place / "run", "--data", place / "new.yaml", "--out", place / "child/run"]
    (place / "child").mkdir()
    COUNT.value = 0
    assert Child(place, *go_on, fault=partial(kill_at_change, 0, COUNT)).end() == 0
    total = COUNT.value
    (place / "child").rename(place / "first")
    (place / "child").mkdir()
    COUNT.value = 0
    fault = partial(kill_at_change, round(0.8 * total), COUNT)
    assert Child(place, *go_on, fault=fault).end() == 128 + signal.SIGKILL
    recipe = place / "child/run/recipe.yaml"
    resumed = Child(place, "update", "--recipe", recipe, "--out", recipe.parent, "--resume")
    assert resumed.end() == 0, resumed.log.read_text()
    for name in ("first", "child"):  # they share a cache, which is not compared
        (place / name / "cache/models").mkdir(parents=True)
        (place / name / "cache/pixels").mkdir()
    assert differing(place / "first", place / "child") == []


def test_a_killed_pretrain_leaves_the_whole_model_or_none(whole, small_scale, begun):
    out = begun / "base"
    command = ["pretrain", "--scale", small_scale, "-o", out, "--device", "cpu"]
    last = 0
    for change in range(1, 20):
        COUNT.value = 0
        if Child(begun, *command, fault=partial(kill_at_change, change, COUNT)).end() == 0:
            last = change - 1
            break
        assert not out.exists() or load_model(None, str(out))
        shutil.rmtree(out, ignore_errors=True)  # killed between its name and the end
    assert last >= 4
    model = next((whole / "cache/models").glob("*/open_clip_model.safetensors"))
    assert (out / model.name).read_bytes() == model.read_bytes()


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_killed_cache_leaves_nothing_that_a_later_one_takes_for_whole(whole, small_scale, tmp_path, share):
    command = ["data", "cache", small_scale.parent / "data.yaml", "--size", 32]
    changes = 7 * len(list((whole / "cache/pixels").iterdir()))  # of each cache at least
    COUNT.value = 0
    fault = partial(kill_at_change, round(share * changes), COUNT)
    assert Child(tmp_path, *command, fault=fault).end() == 128 + signal.SIGKILL
    made = contents(tmp_path / "cache/pixels")
    assert made < contents(whole / "cache/pixels")
    assert Child(tmp_path, *command).end() == 0
    assert contents(tmp_path / "cache/pixels") == contents(whole / "cache/pixels") > made
    for name in contents(whole / "cache/pixels"):
        there, made_again = (folder / "cache/pixels" / name for folder in (whole, tmp_path))
        assert there.read_bytes() == made_again.read_bytes()


# --- full and read-only disks ----------------------------------------------------------------------------


def limit_files(size: int) -> None:
    """No file may become larger: what a full disk does, but for the error's number."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_at_log(number: int) -> None:
    """The disk is full within the number-th line of a log."""
    original, left = Run.log, number

    def log(run: Run, name: str, line: dict) -> None:
        nonlocal left
        left -= 1
        if not left:
            limit_files((run.folder / name).stat().st_size + 20)
        try:
            original(run, name, line)
        finally:
            limit_files(resource.RLIM_INFINITY)  # what the command says goes to a file, too

    Run.log = log


def full_at_model() -> None:
    """The disk is full within the first deployed model."""
    original = Run.save_model

    def save_model(run: Run, clip: Clip) -> None:
        limit_files(2_000_000)
        original(run, clip)

    Run.save_model = save_model


@pytest.mark.parametrize(
    "fault, status, line, kept",
    [
        (partial(limit_files, 2_000_000), 1, "run/weights/update_000.safetensors: File too large", 0),
        (partial(limit_files, 9_000_000), 1, "run/state/writing.pt: File too large", 1),
        (full_at_model, 1, "run/model.part/open_clip_model.safetensors: File too large", 0),
        (partial(full_at_log, 9), 1, "run/train.jsonl: File too large", 2),
    ],
)
def test_a_full_disk_is_one_line_and_the_last_good_state_goes_on(
    whole, begun, small_scale, fault, status, line, kept
):
    child = Child(begun, *update(small_scale, begun), fault=fault)
    assert child.end() == status
    assert said(child) == f"fomo: {begun / line}"
    assert len(checkpoints(begun / "run/state")) == kept
    assert not [p for p in (begun / "run").rglob("*") if p.name == "writing.pt" or p.suffix == ".part"]
    goes_on_as(whole, begun, small_scale)


@pytest.mark.parametrize(
    "size, status, line",
    [(1_000_000, 1, "File too large"), (100_000, 2, "set FOMO_CACHE to a folder with room")],
)
def test_a_cache_without_room_is_one_line(whole, small_scale, tmp_path, size, status, line):
    child = Child(tmp_path, *update(small_scale, tmp_path), fault=partial(limit_files, size))
    assert child.end() == status
    assert line in said(child) and str(tmp_path / "cache") in said(child)
    goes_on_as(whole, tmp_path, small_scale)


def test_a_folder_that_may_not_be_written_is_one_line(small_scale, tmp_path, monkeypatch):
    recipe = load(None, scale=str(small_scale))

    def refuse(dir):
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr(fomo.runs.folder.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=r"--out .*run: cannot be written: Read-only file system"):
        Run.open(tmp_path / "run", recipe, resume=False)


def test_an_error_that_is_not_the_systems_is_not_disguised(tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"), naming(tmp_path / "x"):
        raise RuntimeError("out of memory")


# --- damaged, deleted, newer, another's ------------------------------------------------------------------


def reopened(place: Path) -> dict | None:
    """The checkpoint that a resumed run would go on from."""
    run, checkpoint = Run.open(place / "run", load(place / "run/recipe.yaml"), resume=True)
    run.close()
    return checkpoint


def damage(path: Path, tenth: int, flip: bool) -> None:
    content = bytearray(path.read_bytes())
    at = len(content) * tenth // 10
    if flip:
        content[at] ^= 1 << tenth % 8
    path.write_bytes(content if flip else content[:at])


@pytest.mark.parametrize("flip", [False, True])
def test_a_checkpoint_cut_or_flipped_at_each_tenth_is_passed_over(place, capfd, flip):
    before, newest = checkpoints(place / "run/state")
    expected = torch.load(before, weights_only=True)["position"]
    content = newest.read_bytes()
    assert torch.load(newest, weights_only=True)["position"] != expected
    for tenth in range(10):
        newest.write_bytes(content)
        damage(newest, tenth, flip)
        assert reopened(place)["position"] == expected, tenth
        assert capfd.readouterr().err == f"{newest}: damaged, passed over\n"


def test_both_checkpoints_damaged_the_last_good_update_is_used(whole, place, small_scale):
    state = place / "run/state"
    for path in (*checkpoints(state), *state.glob("update_003-*")):
        damage(path, 5, flip=True)
    assert reopened(place)["position"]["update"] == 2
    goes_on_as(whole, place, small_scale)


@pytest.mark.parametrize("delete", [False, True])
def test_no_checkpoint_left_a_run_begins_again_and_says_so(whole, place, small_scale, delete):
    for path in (place / "run/state").iterdir():
        path.unlink() if delete else damage(path, 3, flip=False)
    assert reopened(place) is None
    goes_on_as(whole, place, small_scale)
    assert ("damaged, passed over" in (place / "log.txt").read_text()) != delete


def test_a_child_without_a_whole_checkpoint_does_not_begin_as_its_parents_did(place):
    (place / "run/parent.yaml").write_text("run: elsewhere\n")
    shutil.rmtree(place / "run/state")
    with pytest.raises(UserError, match=r"run/state: no checkpoint is whole; make this run again"):
        reopened(place)


def test_deleted_weights_are_missed_only_where_they_are_needed(place, small_scale):
    (place / "run/weights/update_001.safetensors").unlink()
    assert Child(place, *update(small_scale, place)).end() == 0
    child = Child(place, "rollback", place / "run", "--to", 1)
    assert child.end() == 2
    assert "update_001.safetensors: not kept" in said(child)


def test_a_log_that_lost_lines_is_not_written_on(place, small_scale):
    checkpoints(place / "run/state")[-1].unlink()
    (place / "run/metrics.jsonl").write_text("")
    child = Child(place, *update(small_scale, place))
    assert child.end() == 2
    assert "metrics.jsonl: 0 bytes, and " in said(child)


def test_a_run_of_a_newer_format_is_refused(place):
    newest = checkpoints(place / "run/state")[-1]
    content = {**torch.load(newest, weights_only=True), "format": FORMAT + 1}
    torch.save(content, newest)
    newest.rename(newest.with_name(f"000099-{file_hash(newest)}.pt"))
    with pytest.raises(UserError, match=f"format {FORMAT + 1} of a newer fomo, accepted: up to {FORMAT}"):
        reopened(place)


def test_two_processes_on_one_run_the_second_is_told_who_is_first(place, small_scale):
    lock = held(place / "run/lock")
    child = Child(place, *update(small_scale, place))
    assert child.end() == 2
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert said(child) == f"fomo: {place / 'run'}: {holder} is working on this run"
    lock.close()
    assert Child(place, *update(small_scale, place)).end() == 0


def test_another_number_of_threads_is_warned_of(place, small_scale):
    checkpoints(place / "run/state")[-1].unlink()
    child = Child(place, *update(small_scale, place), fault=partial(torch.set_num_threads, 2))
    assert child.end() == 0
    told = child.log.read_text()
    assert "results may differ in their last bits" in told
    assert "'threads': 1} then" in told and "'threads': 2} now" in told


@pytest.mark.parametrize("there", [False, True])
def test_resume_of_nothing_is_a_start(small_scale, tmp_path, there):
    if there:
        (tmp_path / "run").mkdir()
    run, checkpoint = Run.open(tmp_path / "run", load(None, scale=str(small_scale)), resume=True)
    run.close()
    assert checkpoint is None and run.position.update == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_a_model_left_aside_between_two_renames_is_found(place):
    (place / "run/model").rename(place / "run/model.old")
    assert load_model(None, str(Run(place / "run").model))
    assert not (place / "run/model.old").exists()


# --- the budget ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [3.6, 4.3])
def test_gflops_are_spent_to_within_half_a_step_per_update(small_scale, tmp_path, steps):
    said = ["method={name: merge}"]
    work = work_of(load(None, scale=str(small_scale), overrides=said))
    total = 3 * (steps * work.gflops_per_step + work.gflops_per_update) * work.multiplier
    recipe = load(None, scale=str(small_scale), overrides=[*said, f"budget={{gflops: {total}}}"])
    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    last = lines(tmp_path / "run/metrics.jsonl")[-1]
    assert last["steps"] == 3 * 4 == 3 * (1 + lines(tmp_path / "run/train.jsonl")[-1]["step"])
    assert last["mafs"] == pytest.approx(total + 3 * (4 - steps) * work.mafs_per_step)
    assert last["mafs"] <= total + 3 * 0.5 * work.mafs_per_step


class Clock:
    """Time that passes only in steps and evaluations."""

    def __init__(self, patch: pytest.MonkeyPatch, step: float):
        self.now, self.step = 1000.0, step
        train, score = fomo.update.train, fomo.update.Life.score

        def timed_train(*args, **kwargs):
            for done in train(*args, **kwargs):
                self.now += self.step
                yield done

        def timed_score(life):
            self.now += 3.0
            return score(life)

        patch.setattr(fomo.update, "time", SimpleNamespace(monotonic=lambda: self.now))
        patch.setattr(fomo.update, "train", timed_train)
        patch.setattr(fomo.update.Life, "score", timed_score)


def in_hours(scale: Path, seconds: float):
    return load(None, scale=str(scale), overrides=[f"budget={{hours: {seconds / 3600}}}", "stream.updates=2"])


def test_hours_become_steps_that_fit_in_them(small_scale, tmp_path, monkeypatch):
    Clock(monkeypatch, step=1.0)
    run_recipe(in_hours(small_scale, 23), tmp_path / "run", resume=False, device="cpu")
    scored = lines(tmp_path / "run/metrics.jsonl")
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run/metrics.jsonl").open()]
    # A first evaluation of 3 s, then 6 steps timed once; 0.95 of what 3 s for the next evaluation leave of 23.
    assert scored[-1]["steps"] == 2 * int(0.95 * (23 - 3 - 6))
    assert seconds[0] == 3 and seconds[1] - seconds[0] <= 23 and seconds[2] - seconds[1] <= 23
    assert load_model(None, str(tmp_path / "run/model")) and scored[-1]["update"] == 2


def test_an_update_that_slows_down_ends_at_most_one_step_late(small_scale, tmp_path, monkeypatch):
    clock = Clock(monkeypatch, step=1.0)
    calibrate = fomo.update.Life.calibrate

    def then_slower(life):
        calibrate(life)
        clock.step = 2.5

    monkeypatch.setattr(fomo.update.Life, "calibrate", then_slower)
    run_recipe(in_hours(small_scale, 23), tmp_path / "run", resume=False, device="cpu")
    scored = lines(tmp_path / "run/metrics.jsonl")
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [line["update"] for line in scored] == [0, 1, 2]
    assert all(23 < b - a <= 23 + 2.5 for a, b in pairwise(seconds))
    assert (tmp_path / "run/weights/update_002.safetensors").exists() and (tmp_path / "run/model").exists()


def test_the_steps_of_an_hours_budget_survive_an_interruption(small_scale, tmp_path, monkeypatch):
    recipe, folder = in_hours(small_scale, 23), tmp_path / "run"
    with monkeypatch.context() as patch:
        Clock(patch, step=1.0)
        stop_after(patch, 6 + 5)
        with pytest.raises(Interrupted):
            run_recipe(recipe, folder, resume=False, device="cpu")
    run, _ = Run.open(folder, recipe, resume=True)
    run.close()
    assert (run.position.steps, run.position.step) == (13, 5)
    Clock(monkeypatch, step=0.1)  # a machine that would be given 130
    run_recipe(recipe, folder, resume=True, device="cpu")
    assert lines(folder / "metrics.jsonl")[-1]["steps"] == 2 * 13
