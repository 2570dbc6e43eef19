"""The table of a GPU: its dry run measures every part, and what goes wrong in one costs that one alone."""

import importlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu
import gpu_table
import gpu_training
import pytest
import torch
from gpu_training import Bench, Plan
from parts import ENDED, in_process
from small_runs import ROOT
from speed import Turn

SPREAD = {"median", "lowest", "highest", "n"}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Quicker, and as good without a GPU; another test may have asked for one."""
    monkeypatch.setattr("parts.way_to_start", lambda: multiprocessing.get_context("fork"))


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> tuple[dict, subprocess.CompletedProcess]:
    file = tmp_path_factory.mktemp("gpu") / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--small"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done


def spreads(value: object) -> list[dict]:
    """All of them within it."""
    if not isinstance(value, dict):
        return []
    return [value] if value.keys() >= SPREAD else [one for own in value.values() for one in spreads(own)]


def test_the_dry_run_measures_every_part(dry_run):
    found, _ = dry_run
    merges = [f"merge, {case}, cpu" for case in ("interpolate, 2 in memory", "interpolate", "ties")]
    assert [*found] == [
        *("machine", "pictures", "resume", "checkpoints"),
        *merges[:2],
        "tiny",
        merges[2],
    ]
    assert all(ENDED not in own and own["seconds"] > 0 for own in found.values())
    assert found["machine"].keys() >= {"device", "cores", "versions", "float32_flops"}
    assert found["resume"]["resumed"] == {"bits_agree": True, "largest_difference": 0}
    assert found["resume"]["whole again"]["bits_agree"]
    assert found["checkpoints"]["written"]["models"] == 10
    assert all(0 < found[name]["merged"]["seconds"] < 100 for name in merges)
    assert all(found[name]["merged"]["memory"] > 0 for name in merges)


def test_the_dry_runs_numbers_are_sane(dry_run):
    found, _ = dry_run
    own = found["tiny"]
    assert own["batch_size"] == 16 and own["step"]["tokens"] == 77 and own["weights_finite"]
    for way in ("eager", "compiled"):
        row, memory = own[way], own[f"memory, {way}"]
        assert {"bare", "ours", "open_clip", "loop_over_bare", "over_open_clip", "mfu"} <= row.keys()
        assert 0 < row["mfu"] < 2 and memory["measured"] > memory["predicted"] > 0  # of all this process
        assert all(0 <= row[side]["waits"] < 1 for side in ("ours", "open_clip"))
    assert own["eager"].keys() >= {"short", "short_over_open_clip"} and own["compile_seconds"] > 0
    assert own["workers"].keys() >= {"0 workers", "1 workers"}
    assert len(spreads(own)) == 4 + 3 + 3 + 2 + 2  # sides and ratios, eager and compiled; workers
    for one in spreads(own):
        assert 0 < one["lowest"] <= one["median"] <= one["highest"] < math.inf and one["n"] >= 1
    assert all(1 / 50 < own[way]["over_open_clip"]["median"] < 50 for way in ("eager", "compiled"))


def test_the_dry_run_tells_what_it_finds_as_it_comes_and_ends_with_tables(dry_run):
    found, done = dry_run
    told = [line for line in done.stderr.splitlines() if " s  " in line]
    assert [line.split(": ")[0].split(" s  ")[1] for line in told][:2] == ["machine", "machine"]
    assert sum(len(own) - 1 for own in found.values()) <= len(
        told
    )  # all but `seconds`, rounds more than once
    lines = done.stdout.splitlines()
    assert lines[0].endswith("CPU cores; " + lines[0].split("; ")[1]) and "float32" in lines[0]
    for name in (
        "| tiny | 16 | eager |",
        "| tiny | 16 | compiled |",
        "| merge, ties, cpu |",
        "| tiny | 0 workers |",
    ):
        assert sum(line.startswith(name) for line in lines) == 1, name
    assert "went on: bits agree" in done.stdout
    head, *rows = [line.count("|") for line in lines if line.startswith(("| model | batch |", "| tiny | 16"))]
    assert rows == [head, head]


# --- parts -----------------------------------------------------------------------------------------------


def patient(report, seconds):
    report("began", 1)
    time.sleep(seconds)
    report("done", 2)


def broken(report):
    report("began", 1)
    raise ValueError("no\nsuch thing")


def killed(report):
    report("began", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def outlived(report, file):
    """Leaves a process behind that holds its pipe."""
    child = os.fork()
    if not child:
        time.sleep(600)
    Path(file).write_text(str(child))
    report("began", 1)


def test_a_part_that_is_cut_off_keeps_what_it_reported():
    began = time.monotonic()
    found = dict(in_process(patient, 1.0, 600))
    assert found["began"] == 1 and "done" not in found and time.monotonic() - began < 20
    assert found[ENDED].startswith("cut off after its share of ")


def test_a_part_that_ends_in_time_says_nothing_of_it():
    assert dict(in_process(patient, 60.0, 0.01)) == {"began": 1, "done": 2}


@pytest.mark.parametrize(
    ("part", "why"),
    [(broken, "failed: ValueError: no such thing"), (killed, f"failed: killed by signal {signal.SIGKILL:d}")],
)
def test_a_part_that_fails_keeps_what_it_reported_and_says_why(part, why):
    assert dict(in_process(part, 60.0)) == {"began": 1, ENDED: why}


def test_processes_that_a_part_leaves_behind_are_ended(tmp_path):
    began = time.monotonic()
    assert dict(in_process(outlived, 60.0, tmp_path / "pid")) == {"began": 1}
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() - began < 30
        time.sleep(0.01)


def test_without_a_gpu_it_is_told_and_nothing_else_is_begun(capsys, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    assert gpu.main(Plan("cuda", tmp_path), 1.0, None) == 1
    told = capsys.readouterr()
    assert "machine: failed: UserError: --device cuda: not available here, accepted: cpu" in told.out
    assert "pictures" not in told.err


# --- what is measured ------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """-> a Bench and what it reports; made when called."""
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    plan = Plan("cpu", tmp_path, **{**gpu.SMALL, "workers": (0,)})
    told: dict = {}

    class Told:
        def __call__(self, key, value):
            told[key] = value

        def used(self):
            return 0.5

    gpu.pictures(Told(), plan, {})
    return lambda **changed: (Bench("tiny", Told(), replace(plan, **changed), 1e12), told)


def test_a_batch_that_does_not_fit_is_halved(bench, monkeypatch):
    loop, tried = gpu_training.OurSide.loop, []

    def tight(self, case, *rest):
        tried.append((case.batch_size, case.accumulate))
        if case.batch_size // case.accumulate > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loop(self, case, *rest)

    monkeypatch.setattr(gpu_training.OurSide, "loop", tight)
    one, told = bench()
    assert tried == [(16, 1), (8, 1), (4, 1)] and one.case.batch_size == told["batch_size"] == 4
    one.in_parts()
    assert tried[3:] == [(16, 4)] and told["whole_batch"] == 16 and told["in parts"]["ours"]["n"] == 1
    monkeypatch.setattr(gpu_training, "room", lambda device: 1e6)  # not even the weights
    with pytest.raises(gpu.Failure, match="tiny: no batch fits"):
        bench()


def test_a_peer_that_fails_leaves_ours(bench, monkeypatch):
    def missing(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(gpu_training, "peer", missing)
    one, told = bench()
    one.eager(until=0.0)
    assert told["eager, open_clip failed"] == "OutOfMemoryError: CUDA out of memory"
    assert "over_open_clip" not in told["eager"] and told["eager"]["loop_over_bare"]["n"] == 1
    (row,) = gpu_table.training_rows("tiny", told)
    assert row.count("-") == 4 and "eager, open_clip failed" in gpu_table.tables({"tiny": told})


def test_little_shared_memory_means_fewer_workers(bench, monkeypatch):
    need = 2 * 16 * 3 * 4 * 32**2
    monkeypatch.setattr(
        gpu_training.shutil, "disk_usage", lambda path: gpu_training.shutil._ntuple_diskusage(9, 9, 5 * need)
    )
    one, told = bench(workers=(0, 4, 8))
    assert one.workers() == 4 and told["fewer workers"].startswith("4, for /dev/shm has 0.00 GiB")


def test_ratios_are_of_the_same_round_and_mfu_is_of_the_median(bench):
    one, _ = bench()
    done = {
        "ours": [Turn(rate, 0.1, 1) for rate in (10.0, 40.0, 30.0)],
        "bare": [Turn(rate, 0.0, 1) for rate in (20.0, 40.0, 30.0)],
        "open_clip": [Turn(10.0, 0.3, 1)],  # then it failed
        "short": [],
    }
    row = one.compared(done)
    assert row["ours"] == {"median": 30, "lowest": 10, "highest": 40, "n": 3, "waits": 0.1}
    assert row["loop_over_bare"] == {"median": 1, "lowest": 1, "highest": 2, "n": 3}
    assert row["over_open_clip"] == {"median": 1, "lowest": 1, "highest": 1, "n": 1}
    assert row["mfu"] == pytest.approx(one.counted.step_flops / 16 * 30 / 1e12)
    assert "short" not in row and "short_over_open_clip" not in row


def test_turns_are_whole_rounds_of_the_workers(bench):
    one, _ = bench(window=1.5)
    case = replace(one.case, workers=8)
    assert [one.steps(case, seconds) for seconds in (0.05, 0.09, 0.2, 2.0)] == [32, 16, 8, 8]
    assert [one.steps(replace(case, workers=0), seconds) for seconds in (0.05, 2.0)] == [30, 1]


def test_tables_of_what_is_not_there_have_dashes():
    assert gpu_table.tables({}).startswith("unknown device, - CPU cores")
    nothing = {"machine": {"cores": 4}, "tiny": {"batch_size": 8}, "merge, ties, cpu": {ENDED: "cut off"}}
    assert gpu_table.tables(nothing).splitlines()[-1] == "- merge, ties, cpu: cut off"
    card = {"name": "A GPU", "memory": 80 * 2**30, "capability": "9.0", "driver": "1.2", "cuda": "13.0"}
    found = {"machine": {"device": card, "cores": 4, "bfloat16_flops": {"best": 5e14, "8192": 5e14}}}
    assert gpu_table.tables(found) == (
        "A GPU, 80 GiB, driver 1.2, CUDA 13.0, 4 CPU cores; TFLOP/s of matrix products: bfloat16 500"
    )
    assert gpu.base_rate(found) == 5e14 and gpu.base_rate({"machine": {}}) is None


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_every_benchmark_can_be_imported(path):
    importlib.import_module(path.stem)
