"""`reproduce`: run what the studies need, each recipe once, and write what came of it.

    studies -> (study, variant, seed) -> Job (recipe, folder) -> processes -> metrics.jsonl -> verdicts.py

A job's identity is the hash of its complete recipe and of the data file's text: variants that studies share run
once, finished runs are reused, and one that was stopped goes on from its checkpoint. Runs are single processes
with one thread each, `--jobs` of them side by side. What only resuming needs is deleted when a run is done.
"""

import hashlib
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, get_context, get_start_method, set_start_method
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from fomo.atomic import write_atomically
from fomo.errors import Failure, Interrupted, UserError, one_line
from fomo.guide.inequalities import SCORED
from fomo.guide.studies import Study, find_studies, resolve
from fomo.guide.verdicts import Outcome, markdown, tally, write_document, write_results
from fomo.load_recipe import ROOT
from fomo.progress import Progress
from fomo.recipe import Recipe, dump
from fomo.runs.logs import evaluations
from fomo.text import plural

# What a run takes where nothing was measured yet; finished runs of the same folder correct it.
SAMPLES_PER_SECOND = 1000  # `tiny` on a CPU core, ViT-B on a GPU
GFLOPS_PER_SECOND = 125_000  # one A100, as the headers of recipes/scales/ assume
OF_A_CORE = 78  # the same for `tiny` and other models of our own
DIVERGED = "diverged.txt"  # in the folder of a run that ended so, which its recipe allows: where and how
ONLY_TO_RESUME = ("state", "weights", "model", "experts")


@dataclass(frozen=True)
class Job:
    """One run: a recipe, its folder, and who needs it. Without a folder: to pretrain the recipe's base model."""

    recipe: Recipe
    folder: Path | None = None
    files: dict[Path, str] = field(default_factory=dict)  # data files to be written first
    needed_by: list[tuple[str, str, int]] = field(default_factory=list)  # (study, variant, seed)

    @property
    def hours(self) -> float:
        """What it takes by the constants above."""
        budget, updates = self.recipe.budget, self.recipe.stream.updates
        if self.folder is None:
            return self.recipe.model.pretraining.samples / SAMPLES_PER_SECOND / 3600
        if budget.hours is not None:
            return budget.hours * updates
        if budget.gflops is not None:
            return budget.gflops / (OF_A_CORE if self.recipe.model.config else GFLOPS_PER_SECOND) / 3600
        return self.recipe.steps * updates * self.recipe.optimizer.batch_size / SAMPLES_PER_SECOND / 3600

    @property
    def label(self) -> str:
        """One of its names, for messages."""
        if self.folder is None:
            return "a base model"
        study, variant, seed = self.needed_by[0]
        return f"{study}/{variant}, seed {seed}"

    def evaluations(self) -> list[dict]:
        """The lines of metrics.jsonl after whole updates; none if the run has not begun."""
        return evaluations(self.folder)

    @property
    def finished(self) -> bool:
        lines = self.evaluations()
        ended = lines and (lines[-1]["update"] >= self.recipe.stream.updates or self.diverged)
        return bool(ended)

    @property
    def diverged(self) -> bool:
        return (self.folder / DIVERGED).exists()

    def scores(self) -> dict[str, np.ndarray]:
        """By name after each scored update; of a run that diverged the last ones stand for those to come."""
        updates, every = self.recipe.stream.updates, self.recipe.evaluated_every
        count = 1 + len({1, updates, *range(every, updates + 1, every)})
        lines = self.evaluations()
        found = {key: np.array([line[key] for line in lines], dtype=float) for key in SCORED}
        return {key: np.pad(values, (0, count - len(values)), "edge") for key, values in found.items()}


def plan(studies: list[Study], scale: str, seeds: list[int] | None, out: Path, bases: int = 1) -> list[Job]:
    """Every run that the studies need at a scale, once; the first seed of all of them first.

    `bases`: of how many base models seeds take one in turn.
    """
    needs = [
        (study, variant, seed)
        for study in studies
        for seed in dict.fromkeys(study.seeds if seeds is None else seeds)
        for variant in study.variants_at(scale)
    ]
    jobs: dict[str, Job] = {}
    for study, variant, seed in sorted(needs, key=lambda need: need[2]):
        recipe, files = resolve(study, variant, scale, seed, out / "data", seed % bases)
        key = identity(recipe, files)
        job = jobs.setdefault(key, Job(recipe, out / "runs" / key, files))
        job.needed_by.append((study.name, variant, seed))
    return list(jobs.values())


def identity(recipe: Recipe, files: dict[Path, str]) -> str:
    """Everything that a study can change in a run, as a short hash."""
    path = Path(recipe.data)
    data = files.get(path) or path.read_text(encoding="utf-8")
    return hashlib.sha256(f"{dump(recipe)}\n{data}".encode()).hexdigest()[:12]


def part(jobs: list[Job], shard: str | None) -> list[Job]:
    """Shard I/N: every N-th job of those sorted by their hash, from the I-th."""
    if shard is None:
        return jobs
    index, _, count = shard.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise UserError(f"--shard {shard}: expected I/N with 1 <= I <= N, as in 3/8")
    return sorted(jobs, key=lambda job: job.folder.name)[int(index) - 1 :: int(count)]


# --- how long it takes -----------------------------------------------------------------------------------


def correction(jobs: list[Job]) -> tuple[float, str]:
    """-> what the hours of a job are to be multiplied by, and where that comes from."""
    measured = [(job.evaluations()[-1]["seconds"] / 3600, job.hours) for job in jobs if job.finished]
    if not measured:
        return 1.0, "assumed, as no run has finished yet"
    factor = statistics.median(took / guess for took, guess in measured)
    return factor, f"from {plural(len(measured), 'finished run')}"


def listing(jobs: list[Job], everything: list[Job], width: int) -> str:
    """What `--dry-run` prints: each run with its estimated hours; `width` runs side by side."""
    factor, source = correction(everything)
    rows, left = [], 0.0
    for job in jobs:
        hours = job.hours * factor
        left += 0 if job.finished else hours
        state = "finished" if job.finished else "begun" if job.evaluations() else "to do"
        users = ", ".join(dict.fromkeys(f"{study}/{variant}" for study, variant, _ in job.needed_by))
        rows.append(f"{job.folder.name}  {hours:6.2f} h  {state:8}  seed {job.needed_by[0][2]}  {users}")
    total = f"{plural(len(jobs), 'run')}, {left / width:.2f} hours to go with {width} at a time"
    return "\n".join([*rows, f"{total} ({source}; base models not counted)"])


# --- processes -------------------------------------------------------------------------------------------


def work(pipe: connection.Connection, device: str, start_method: str) -> None:
    """One process: job after job until the pipe is closed; answers each with None or with what went wrong."""
    set_start_method(start_method, force=True)  # a spawned process would spawn its own, each importing torch
    import torch

    torch.set_num_threads(1)
    with suppress(Interrupted, EOFError, BrokenPipeError):  # stopped, or the parent is gone
        while True:
            for signum in (signal.SIGINT, signal.SIGTERM):  # a run that has ended left its handlers
                signal.signal(signum, interrupt)
            pipe.send(problem_of(pipe.recv(), device))


def interrupt(signum: int, frame) -> None:
    raise Interrupted(signum)


def problem_of(job: Job, device: str) -> str | None:
    """Do a job; -> what went wrong."""
    from fomo.pretrain import pretrain_scale
    from fomo.update import run_recipe

    try:
        if job.folder is None:
            pretrain_scale(job.recipe, None, device)
        else:
            run_recipe(job.recipe, job.folder, resume=True, device=device)
    except Interrupted:
        raise
    except Exception as error:  # whatever it is, the other runs go on
        return one_line(error)


class Workers:
    """Up to `count` processes as long as the `with` block: importing torch costs more than a short run."""

    def __init__(self, count: int, device: str):
        self.count, self.device, self.signum = count, device, 0
        self.processes: dict[connection.Connection, BaseProcess] = {}

    def __enter__(self) -> "Workers":
        self.handlers = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def stop(self, signum: int, frame) -> None:
        """Let every process save its run; a second signal ends them at once."""
        for process in self.processes.values():
            process.kill() if self.signum else process.terminate()
        self.signum = signum

    def __exit__(self, *exception) -> None:
        for pipe, process in self.processes.items():
            pipe.close()
            process.join()
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def start(self) -> connection.Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.device, get_start_method()))
        os.environ["TQDM_DISABLE"] = "1"  # of the process, which reads it when it starts: the bar is ours
        process.start()
        del os.environ["TQDM_DISABLE"]
        theirs.close()
        self.processes[ours] = process
        return ours

    def do(self, jobs: list[Job]) -> Iterator[tuple[Job, str | None]]:
        """Hand out jobs; -> (job, what went wrong) as they come in."""
        waiting, busy, idle = list(jobs), {}, list(self.processes)
        while (waiting or busy) and not self.signum:
            while waiting and len(busy) < self.count:
                pipe = idle.pop() if idle else self.start()
                busy[pipe] = waiting.pop(0)
                pipe.send(busy[pipe])
            for pipe in connection.wait(list(busy), timeout=1):
                job = busy.pop(pipe)
                try:
                    problem = pipe.recv()
                    idle.append(pipe)
                except EOFError:  # killed, as by the system for its memory
                    process = self.processes.pop(pipe)
                    process.join()
                    problem = f"its process died with status {process.exitcode}"
                if not self.signum:
                    yield job, problem


def run_jobs(jobs: list[Job], width: int, device: str) -> dict[str, str]:
    """Run what is not finished; -> what failed, by the run's hash. Raises Interrupted after saving."""
    for path, text in {path: text for job in jobs for path, text in job.files.items()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    runs = [job for job in jobs if not job.finished]
    models = base_models(runs)
    total, failed = len(models) + len(runs), {}
    form = "{desc} |{bar}| {percentage:.0f} %, {elapsed} gone, {remaining} to go"
    with (
        Workers(min(width, max(1, len(runs))), device) as workers,
        Progress(total=sum(job.hours for job in [*models, *runs]), bar_format=form, disable=not runs) as bar,
    ):
        results = chain(workers.do(models), workers.do(runs))  # a model is there before a run needs it
        for done, (job, problem) in enumerate(results, 1):
            if problem:
                bar.write(f"{job.folder or job.label}: {job.label}: {problem}", file=sys.stderr)
            if problem and may_diverge(job, problem):
                write_atomically(job.folder / DIVERGED, problem.encode())
                problem = None
            if job.folder and problem:
                failed[job.folder.name] = f"{job.label}: {problem}"
            elif job.folder:
                for name in ONLY_TO_RESUME:
                    shutil.rmtree(job.folder / name, ignore_errors=True)
            bar.set_description(f"{done} of {total} models and runs", refresh=False)
            bar.update(job.hours)
    if workers.signum:
        raise Interrupted(workers.signum, "the same command goes on from here")
    return failed


def may_diverge(job: Job, problem: str) -> bool:
    """Whether a run was stopped by a loss that is not finite, as its recipe says that it may."""
    return "the loss is" in problem and bool(job.recipe.method.get("allow_divergent") and job.evaluations())


def base_models(runs: list[Job]) -> list[Job]:
    """A job for each base model that has to be pretrained, so that two runs do not both train it."""
    from fomo.pretrain import cached, stored_hash

    models = {
        cached(run.recipe.model): Job(run.recipe)
        for run in runs
        if run.recipe.model.pretraining and not stored_hash(run.recipe.model)
    }
    return [job for folder, job in models.items() if not folder.exists()]


# --- the command -----------------------------------------------------------------------------------------


def reproduce(
    names: tuple[str, ...],
    *,
    scale: str,
    seeds: list[int] | None,
    shard: str | None,
    dry_run: bool,
    out: str | None,
    jobs: int | None,
    device: str,
    bases: int = 1,
) -> str:
    """Run the named studies (all, without names) and write what they found; -> a line about it."""
    from fomo.devices import pick_device

    folder = Path(out).resolve() if out else Path("results").resolve() / Path(scale).stem
    studies = find_studies(names)
    everything = plan(studies, scale, seeds, folder, bases)
    chosen = part(everything, shard)
    on_gpu = pick_device(device, None).type != "cpu"
    width = jobs or (1 if on_gpu else os.cpu_count() or 1)
    if dry_run:
        return listing(chosen, everything, width)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "runs.csv", index(everything).encode())
    failed = run_jobs(chosen, width, device)
    outcomes = [outcome(study, everything, scale, failed) for study in studies]
    findings = write_results(folder, outcomes, scale)
    if not (names or seeds or shard or out or failed or bases > 1):
        name = "reproduction.md" if scale == "tiny" else f"reproduction-{Path(scale).stem}.md"
        write_document(ROOT.parent / "docs" / name, outcomes, findings, scale)
    if failed:
        named = "; ".join(f"{problem} (runs/{key})" for key, problem in failed.items())
        count = f"{len(failed)} of {plural(len(chosen), 'run')}"
        raise Failure(f"{count} failed, the others are in {folder}: {named}")
    peaks = "".join(markdown(o.best_peaks()) + "\n" for o in outcomes if o.study.peaks)
    return f"{peaks}{tally(findings)}; {folder / 'report.html'}"


def index(jobs: list[Job]) -> str:
    """runs.csv: which folder is which."""
    rows = [
        f"{job.folder.name},{study},{variant},{seed}"
        for job in jobs
        for study, variant, seed in job.needed_by
    ]
    return "\n".join(["run,study,variant,seed", *sorted(rows)]) + "\n"


def outcome(study: Study, jobs: list[Job], scale: str, failed: dict[str, str]) -> Outcome:
    """The finished runs of a study."""
    scores: dict[str, dict[int, dict]] = {name: {} for name in study.variants_at(scale)}
    seconds, broken = {}, set()
    for job in jobs:
        users = [(variant, seed) for name, variant, seed in job.needed_by if name == study.name]
        if job.folder.name in failed:
            broken.update(variant for variant, _ in users)
        if not users or not job.finished:
            continue
        for variant, seed in users:
            scores[variant][seed] = job.scores()
            seconds[variant, seed] = job.evaluations()[-1]["seconds"]
    return Outcome(study, scores, seconds, frozenset(broken))
