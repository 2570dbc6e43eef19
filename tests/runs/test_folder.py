"""Checkpoints are complete or absent, and a run goes on exactly where it was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lives import stop_after
from safetensors.torch import load_file

from fomo.errors import Failure, UserError
from fomo.load_recipe import load
from fomo.runs.folder import Run, checkpoints, differences, kept_updates
from fomo.update import run_recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(small_scale):
    return load(None, scale=str(small_scale), overrides=["method={name: merge}"])


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(recipe, folder, resume=False, device="cpu")
    return folder


def scores(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines]


def assert_same(a, b):
    assert scores(a) == scores(b)
    for path in sorted((a / "weights").iterdir()):
        left, right = load_file(path), load_file(b / "weights" / path.name)
        assert all(torch.equal(left[name], right[name]) for name in left), path.name
    left, right = (load_file(folder / "model/open_clip_model.safetensors") for folder in (a, b))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("steps", [1, 4, 6, 11])
def test_a_signal_saves_and_resume_ends_bit_identical(recipe, whole, tmp_path, monkeypatch, steps):
    from fomo.errors import Interrupted

    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted) as caught:
            run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    assert caught.value.exit_status == 143
    run_recipe(recipe, tmp_path / "run", resume=True, device="cpu")
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("steps", [1, 7, 12])
def test_a_crash_goes_back_to_the_last_checkpoint(recipe, whole, tmp_path, monkeypatch, steps):
    class Crash(BaseException):
        pass

    def crash():
        raise Crash

    with monkeypatch.context() as patch:
        stop_after(patch, steps, crash)
        with pytest.raises(Crash):
            run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    run_recipe(recipe, tmp_path / "run", resume=True, device="cpu", workers=1)
    assert_same(whole, tmp_path / "run")


def test_kill_in_another_process_and_resume(recipe, whole, small_scale, tmp_path):
    command = [
        sys.executable,
        "fomo.py",
        "update",
        "--recipe",
        "recipes/merge.yaml",
        "--scale",
        str(small_scale),
    ]
    command += ["--out", str(tmp_path / "run"), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run([*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "KA " in done.stdout and "report.html" in done.stdout
    assert_same(whole, tmp_path / "run")


def test_a_damaged_checkpoint_is_recognised_and_the_one_before_is_used(recipe, whole, tmp_path, monkeypatch):
    class Crash(BaseException):
        pass

    def crash():
        raise Crash

    for damage in ("cut", "flip"):
        folder = tmp_path / damage
        with monkeypatch.context() as patch:
            stop_after(patch, 10, crash)
            with pytest.raises(Crash):
                run_recipe(recipe, folder, resume=False, device="cpu")
        newest = checkpoints(folder / "state")[-1]
        content = bytearray(newest.read_bytes())
        if damage == "cut":
            content = content[: len(content) // 2]
        else:
            content[len(content) // 2] ^= 1
        newest.write_bytes(content)
        run, checkpoint = Run.open(folder, recipe, resume=True)
        run.close()
        assert checkpoint is not None and run.position.update == 1
        run_recipe(recipe, folder, resume=True, device="cpu")
        assert_same(whole, folder)


def test_an_existing_run_is_not_overwritten(recipe, whole):
    with pytest.raises(UserError, match="go on with --resume"):
        run_recipe(recipe, whole, resume=False, device="cpu")


def test_resume_on_a_finished_run_changes_nothing(recipe, whole):
    before = (whole / "metrics.jsonl").read_bytes()
    assert "in 3 updates" in run_recipe(recipe, whole, resume=True, device="cpu")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_changed_recipe_is_refused_by_name(small_scale, whole):
    changed = load(
        None, scale=str(small_scale), overrides=["method={name: merge, keep: 0.9}", "optimizer.lr=0.5"]
    )
    with pytest.raises(UserError, match=r"differing: method\.keep, optimizer\.lr"):
        run_recipe(changed, whole, resume=True, device="cpu")


def test_fields_that_either_recipe_lacks_differ_by_their_dotted_names():
    before = {"method": {"name": "merge", "tune": {"name": "lora", "rank": 4}}, "seed": 0}
    now = {"method": {"name": "merge", "tune": {"name": "lora"}, "keep": 0.5}, "seed": 0}
    assert sorted(differences(before, now)) == ["method.keep", "method.tune.rank"]
    assert sorted(differences(now, before)) == ["method.keep", "method.tune.rank"]
    assert differences(now, now) == []


def test_signals_are_the_callers_again_after_a_run(recipe, whole, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run, _ = Run.open(tmp_path / "run", recipe, resume=False)
    run.begin(recipe, {}, {}, None)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    run.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_update_is_kept_for_continue_before_its_checkpoint_counts(recipe, tmp_path, monkeypatch):
    """Killed between the two names, `--resume` does the update again; a finished run always has what it keeps."""
    run, _ = Run.open(tmp_path / "run", recipe, resume=False)
    run.begin(recipe, {}, {}, None)
    run.position.evaluated = True
    run.save_checkpoint(model={})
    run.position.update = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "fomo.runs.folder.same_file", lambda path, other: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        run.save_checkpoint(model={"a": torch.zeros(1)})
    state = tmp_path / "run/state"
    assert [path.name.split("-")[0] for path in checkpoints(state)] == ["000001"]
    assert run.latest_checkpoint()["position"]["update"] == 0
    run.save_checkpoint(model={"a": torch.ones(1)})
    run.close()
    assert sorted(path.name.split("-")[0] for path in state.glob("u*")) == ["update_000", "update_001"]
    assert run.latest_checkpoint()["model"]["a"] == 1


def test_updates_have_the_order_of_their_numbers_and_unfinished_files_are_none(tmp_path):
    names = [f"update_{n:03d}-0f.pt" for n in (2, 999, 1000, 12000)]
    for name in (*reversed(names), "update_1001-0f.pt.part"):
        (tmp_path / name).touch()
    assert [path.name for path in kept_updates(tmp_path)] == names


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_weights(
    small_scale, tmp_path, monkeypatch
):
    import fomo.train

    calls = 0

    def poisoned(features):
        nonlocal calls
        calls += 1
        return fomo.clip.contrastive_loss(features) * (float("nan") if calls == 7 else 1)

    recipe = load(None, scale=str(small_scale))
    run_recipe(recipe, tmp_path / "first", resume=False, device="cpu")  # the base model is made
    monkeypatch.setattr(fomo.train, "contrastive_loss", poisoned)
    with pytest.raises(Failure, match=r"update 2, step 2: the loss is nan"):
        run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    run, checkpoint = Run.open(tmp_path / "run", recipe, resume=True)
    run.close()
    assert run.position.update == 1
    assert all(t.isfinite().all() for t in checkpoint["model"].values())
