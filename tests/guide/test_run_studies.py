"""Every run once, finished ones reused, stopped ones continued, failed ones named; then tables that say so."""

import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from small_runs import after_steps, terminate

from fomo.errors import Failure, Interrupted, UserError
from fomo.guide.run_studies import base_models, listing, part, plan, reproduce, run_jobs
from fomo.guide.studies import find_studies, read_study
from fomo.guide.verdicts import COLUMNS
from fomo.load_recipe import ROOT
from fomo.update import run_recipe
from tests.guide.study_files import FINETUNE, claim, study_file


def go(study: Path, scale: Path, out: Path, **changes) -> str:
    said = {"seeds": None, "shard": None, "dry_run": False, "jobs": 2, "device": "cpu", **changes}
    return reproduce((str(study),), scale=str(scale), out=str(out), **said)


def rows_of(out: Path) -> list[dict]:
    with open(out / "claims.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def without_seconds(out: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(out)]


@pytest.fixture(scope="module")
def done(small_scale, tmp_path_factory) -> tuple[Path, Path, str]:
    """-> the study, the folder of its reproduction, and how that ended."""
    folder = tmp_path_factory.mktemp("reproduction")
    study = study_file(folder)
    with pytest.raises(Failure) as caught:
        go(study, small_scale, folder / "out")
    return study, folder / "out", str(caught.value)


def test_a_run_that_fails_is_named_and_the_others_are_finished(done):
    _, out, ended = done
    assert ended.startswith(f"2 of 6 runs failed, the others are in {out}: ")
    assert ended.count("the loss is") == 2 and "study/broken, seed 1: " in ended
    index = (out / "runs.csv").read_text().splitlines()
    assert index[0] == "run,study,variant,seed" and len(index) == 7
    for line in index[1:]:
        run, _, variant, seed = line.split(",")
        assert (run in ended) == (variant == "broken") and seed in "01"
        left = {path.name for path in (out / "runs" / run).iterdir()}
        assert {"recipe.yaml", "metrics.jsonl"} <= left
        assert variant == "broken" or not left & {"state", "weights", "model"}


def test_claims_are_in_order_with_their_verdicts(done):
    rows = rows_of(done[1])
    assert tuple(rows[0]) == COLUMNS
    assert [(row["claim"], row["n"]) for row in rows] == [("2", "2"), ("10", "2"), ("T1", "0")]
    assert rows[1]["verdict"] in ("undecided", "opposite") and rows[2]["verdict"] == "failed"
    assert rows[0]["paper"] == "+3 KA" and rows[0]["study"] == "study" and float(rows[0]["seconds"]) >= 0
    assert float(rows[0]["low"]) < float(rows[0]["effect"]) < float(rows[0]["high"])
    assert rows[2]["effect"] == rows[2]["low"] == rows[2]["high"] == ""
    html = (done[1] / "report.html").read_text()
    assert "1 failed." in html and "failed (0 of 1 hold)" in html and "claim T1. (section 1)" in html
    assert html.count("<svg") == 1 and "Rates" in html and "untouched model" in html


def test_the_effect_is_the_mean_of_the_runs_own_scores(done):
    out = done[1]
    ends = {}
    for line in (out / "runs.csv").read_text().splitlines()[1:]:
        run, _, variant, seed = line.split(",")
        lines = (out / "runs" / run / "metrics.jsonl").read_text().splitlines()
        ends[variant, int(seed)] = yaml.safe_load(lines[-1])["ka"]
    expected = np.mean([ends["fast", seed] - ends["slow", seed] for seed in (0, 1)])
    assert float(rows_of(out)[0]["effect"]) == pytest.approx(expected, abs=1e-3)


def test_the_same_study_run_again_gives_the_same_claims(done, small_scale, tmp_path):
    with pytest.raises(Failure):
        go(done[0], small_scale, tmp_path / "again", jobs=1)
    assert without_seconds(tmp_path / "again") == without_seconds(done[1])


def test_finished_runs_are_reused(done, small_scale):
    study, out, _ = done
    names = ["fast", "slow"]
    variants = {name: v for name, v in yaml.safe_load(study.read_text())["variants"].items() if name in names}
    claims = [claim("2", "ka(fast) - ka(slow) > 0")]
    other = study_file(study.parent, "other", variants=variants, claims=claims)
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    began = time.monotonic()
    said = go(other, small_scale, out)
    assert time.monotonic() - began < 5  # no process was started
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    assert said.endswith(str(out / "report.html"))


def test_variants_that_studies_share_run_once(tmp_path, small_scale):
    paths = [study_file(tmp_path, name) for name in ("a", "b")]
    jobs = plan([read_study(path) for path in paths], str(small_scale), None, tmp_path)
    assert len(jobs) == 6
    for job in jobs:
        assert [study for study, _, _ in job.needed_by] == ["a", "b"]
        assert len({(variant, seed) for _, variant, seed in job.needed_by}) == 1


def test_all_studies_together_need_few_runs(tmp_path):
    jobs = plan(find_studies(), "tiny", [0], tmp_path)
    assert 95 <= len(jobs) <= 115
    finetune = next(job for job in jobs if ("methods", "finetune", 0) in job.needed_by)
    assert len(finetune.needed_by) >= 14


def test_shards_are_disjoint_and_complete(tmp_path, small_scale):
    jobs = plan([read_study(study_file(tmp_path))], str(small_scale), None, tmp_path)
    shards = [[job.folder.name for job in part(jobs, f"{i}/4")] for i in range(1, 5)]
    assert [len(shard) for shard in shards] == [2, 2, 1, 1]
    assert sorted(name for shard in shards for name in shard) == sorted(job.folder.name for job in jobs)


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_does_not_exist_is_refused(shard):
    with pytest.raises(UserError, match=f"--shard {shard}: expected I/N"):
        part([], shard)


def test_claims_of_what_has_not_run_are_unfinished(done, small_scale, tmp_path):
    for shard in ("1/3", "2/3", "3/3"):  # sorted by hash: a run in each, and one of the three fails
        try:
            said = go(done[0], small_scale, tmp_path / "out", seeds=[0], shard=shard)
            break
        except Failure:
            continue
    verdicts = [row["verdict"] for row in rows_of(tmp_path / "out")]
    assert "unfinished" in said and verdicts.count("unfinished") >= 2


def test_a_dry_run_lists_the_runs_and_writes_nothing(done, small_scale, tmp_path):
    listed = go(done[0], small_scale, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists() and len(listed.splitlines()) == 7
    assert "6 runs" in listed and "assumed, as no run has finished yet" in listed
    listed = go(done[0], small_scale, done[1], dry_run=True)
    assert listed.count("finished  seed") == 4 and "from 4 finished runs" in listed


def test_hours_are_those_that_finished_runs_took(tmp_path, small_scale):
    jobs = plan([read_study(study_file(tmp_path))], str(small_scale), [0], tmp_path)
    hours = jobs[0].hours
    assert hours == pytest.approx(3 * 4 * 12 / 1000 / 3600)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "metrics.jsonl").write_text('{"update": 3, "seconds": 7200}\n')
    listed = listing(jobs, jobs, 1)
    assert listed.count("2.00 h  to do") == 2 and "4.00 hours to go with 1 at a time" in listed


def test_a_run_that_was_stopped_goes_on_to_the_same_scores(done, small_scale, tmp_path):
    study, out, _ = done
    (job,) = [
        job
        for job in plan([read_study(study)], str(small_scale), [0], tmp_path)
        if job.needed_by[0][1] == "fast"
    ]
    with after_steps(6, terminate), pytest.raises(Interrupted):
        run_recipe(job.recipe, job.folder, resume=False, device="cpu")
    assert not job.finished and job.evaluations()
    assert run_jobs([job], 1, "cpu") == {} and job.finished
    key = job.folder.name
    assert key in (out / "runs.csv").read_text()  # seed 0 takes no copy of the data, so the hash is the same
    scores = [[line[k] for k in ("update", "ka", "zs")] for line in job.evaluations()]
    before = [
        yaml.safe_load(line) for line in (out / "runs" / key / "metrics.jsonl").read_text().splitlines()
    ]
    assert scores == [[line[k] for k in ("update", "ka", "zs")] for line in before]


def test_base_models_are_pretrained_once_and_first(tmp_path, small_scale, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "empty"))
    study = read_study(study_file(tmp_path))
    for bases in (1, 2):  # of two seeds
        jobs = plan([study], str(small_scale), None, tmp_path, bases)
        assert len(base_models(jobs)) == bases


def test_a_signal_saves_the_runs_and_ends_the_command_with_its_status(small_scale, tmp_path):
    long = {"fast": {"recipe": FINETUNE, "set": {"budget.steps": 3000}}}
    study = study_file(tmp_path, variants=long, claims=[claim("2", "ka(fast) > 0")], seeds=[0])
    said = ["--scale", small_scale, "--out", tmp_path / "out", "--jobs", "1", "--device", "cpu"]
    command = [sys.executable, ROOT.parent / "fomo.py", "reproduce", study, *said]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("out/runs/*/train.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and "interrupted; the same command goes on from here" in errors
    assert list(tmp_path.glob("out/runs/*/state/*.pt")) and not (tmp_path / "out" / "claims.csv").exists()


def test_a_killed_process_is_named_and_the_others_go_on(tmp_path, small_scale):
    variants = {
        name: {"recipe": FINETUNE, "set": {"budget.steps": n}} for name, n in (("long", 3000), ("short", 1))
    }
    study = read_study(study_file(tmp_path, variants=variants, claims=[], seeds=[0]))
    long, short = plan([study], str(small_scale), None, tmp_path)

    def kill():
        while not (long.folder / "train.jsonl").exists():
            time.sleep(0.1)
        for process in multiprocessing.active_children():
            process.kill()

    threading.Thread(target=kill, daemon=True).start()
    failed = run_jobs([long, short], 1, "cpu")
    assert failed == {long.folder.name: "study/long, seed 0: its process died with status -9"}
    assert short.finished and not long.finished


def test_a_run_that_may_diverge_ends_where_it_does_and_keeps_its_last_scores(tmp_path, small_scale):
    broken = {
        "recipe": str(ROOT / "merge.yaml"),
        "set": {
            "optimizer.lr": 1e30,
            "method.rule": "task_arithmetic",
            "method.scale": 1.0,
            "method.allow_divergent": True,
        },
    }
    claims = [claim("T1", "ka(fast) - ka(broken) > 0")]
    study = study_file(
        tmp_path, variants={"fast": {"recipe": FINETUNE}, "broken": broken}, claims=claims, seeds=[0]
    )
    go(study, small_scale, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["verdict"] != "failed"
    (told,) = (tmp_path / "out").glob("runs/*/diverged.txt")
    assert "the loss is" in told.read_text()
    assert len((told.parent / "metrics.jsonl").read_text().splitlines()) < 4
    listed = plan(find_studies([str(study)]), str(small_scale), None, tmp_path / "out")
    (job,) = [job for job in listed if job.folder == told.parent]
    assert job.finished and len(job.scores()["ka"]) == 4 and len(set(job.scores()["ka"].tolist()[-3:])) == 1
