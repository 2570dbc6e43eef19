"""Both sides of one model on the GPU, for benchmarks/gpu.py: our loop, eager and compiled, and open_clip's."""

import gc
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import open_clip
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from parts import Report  # noqa: E402
from speed import TABLE, Case, OurSide, Turn, peer, pictures_of, pool_from  # noqa: E402

from fomo.budget.flops_memory import Counted, Training, parameter_count  # noqa: E402
from fomo.budget.mafs import counted_once  # noqa: E402
from fomo.clip import new  # noqa: E402
from fomo.devices import pick_device  # noqa: E402
from fomo.errors import Failure, one_line  # noqa: E402
from fomo.load_recipe import load  # noqa: E402

LONG = "long.tsv"  # beside TABLE: the same pictures with captions as long as the context


@dataclass(frozen=True)
class Plan:
    """What all parts are told."""

    device: str
    folder: Path
    models: tuple[str, ...] = ("ViT-B-16", "ViT-B-32", "ViT-L-14")
    batch_size: int = 512
    pictures: int = 1024
    workers: tuple[int, ...] = (0, 4, 8)  # the last: of every comparison but that of workers
    window: float = 1.5  # seconds that a turn is timed, or a little more
    turns: int = 5  # at most
    products: tuple[int, ...] = (4096, 8192, 16384)  # sides of the matrices that are multiplied
    merged: str = "ViT-B-16"


def config_of(model: str) -> dict:
    """open_clip's model_cfg."""
    return load(None, scale="tiny").model.config if model == "tiny" else open_clip.get_model_config(model)


def spread(values: Iterable[float]) -> dict:
    found = sorted(values)
    return {"median": statistics.median(found), "lowest": found[0], "highest": found[-1], "n": len(found)}


def train_both(model: str, report: Report, plan: Plan, rate: float | None) -> None:
    """rate: FLOP/s of large matrix products. Compiled last: if it is cut off, nothing else is lost."""
    bench = Bench(model, report, plan, rate)
    bench.eager(until=0.3)
    bench.waiting(until=0.4)
    if bench.case.batch_size < plan.batch_size:
        bench.in_parts()
    bench.compiled(until=1.0)
    report("weights_finite", all(bool(p.isfinite().all()) for p in bench.clip.model.parameters()))


class Bench:
    """Both sides of one model."""

    def __init__(self, model: str, report: Report, plan: Plan, rate: float | None):
        self.report, self.plan, self.rate = report, plan, rate
        self.device = pick_device(plan.device)
        self.clip = new(config_of(model), seed=0)
        self.side = OurSide(self.clip, self.device)
        self.long, self.short = (pool_from(pictures_of(plan.folder, t), self.clip) for t in (LONG, TABLE))
        config, workers = self.clip.config["model_cfg"], self.workers()
        case = Case(model, config, plan.batch_size, 3, self.device.type, None, workers)
        self.case, self.counted = self.fitted(case)
        self.own = held(self.device)  # bytes: weights and moments
        self.resident = self.side.resident(self.case, self.long, 1)
        self.peer = peer(self.case, plan.folder, self.device)

    def workers(self) -> int:
        """As many as can hand over what open_clip's pipeline makes: containers often share 64 MB of memory."""
        shared = Path("/dev/shm")
        free = shutil.disk_usage(shared).free if shared.exists() else math.inf
        ahead = 2 * self.plan.batch_size * 3 * 4 * self.clip.image_size**2  # of each worker: two batches
        usable = max(count for count in self.plan.workers if count * ahead <= free)
        if usable < self.plan.workers[-1]:
            self.report("fewer workers", f"{usable}, for /dev/shm has {free / 2**30:.2f} GiB")
        return usable

    def fitted(self, case: Case) -> tuple[Case, Counted]:
        """With the largest batch that fits beside the peer's weights and moments, halved until it does."""
        half, beside = self.side.precision.dtype is not None, 16 * parameter_count(case.config)
        while case.batch_size > 1:
            counted = counted_once(Training(case.config, {"name": "finetune"}, case.batch_size, half, 0))
            turn = self.tried(case) if counted.peak_memory + beside < room(self.device) else None
            if turn:
                self.report("batch_size", case.batch_size)
                self.report("step", {"flops": counted.step_flops, "tokens": self.clip.model.context_length})
                self.tell_memory("memory, eager", turn.memory, counted)
                return replace(case, steps=self.steps(case, case.batch_size / turn.rate)), counted
            case = replace(case, batch_size=case.batch_size // 2)
        raise Failure(f"{case.model}: no batch fits")

    def tried(self, case: Case) -> Turn | None:
        """A turn, if it fits."""
        forget_peak(self.device)
        try:
            return self.side.loop(case, self.long)
        except torch.OutOfMemoryError:
            pass  # the error holds what was allocated, until here
        self.side.optimizer.zero_grad(set_to_none=True)
        release(self.device)
        return None

    def steps(self, case: Case, seconds: float) -> int:
        """Of a turn. Whole rounds of all workers: they have as much ready when the clock starts as at its end."""
        at_once = max(case.workers, 1)
        return at_once * max(1, round(self.plan.window / seconds / at_once))

    def eager(self, until: float) -> None:
        turns = {
            "bare": partial(self.side.bare, self.case, self.resident),
            "ours": partial(self.side.loop, self.case, self.long),
            "short": partial(self.side.loop, self.case, self.short),
            "open_clip": partial(next, self.peer),
        }
        self.rounds("eager", turns, until)

    def compiled(self, until: float) -> None:
        case, began = replace(self.case, compile=True), time.monotonic()
        if self.device.type == "cpu":  # where compiling takes longer than all else
            torch.compile = partial(torch.compile, backend="aot_eager")
        if self.taken("compiling", partial(self.side.bare, replace(case, steps=1), self.resident)) is None:
            return
        self.report("compile_seconds", time.monotonic() - began)
        forget_peak(self.device)
        others = held(self.device) - self.own  # the peer's, and the resident batch
        peak = self.side.loop(replace(case, steps=1), self.long).memory
        self.tell_memory("memory, compiled", peak - others, self.counted)
        turns = {
            "bare": partial(self.side.bare, case, self.resident),
            "ours": partial(self.side.loop, case, self.long),
            "open_clip": partial(next, self.peer),
        }
        self.rounds("compiled", turns, until)

    def waiting(self, until: float) -> None:
        """Our loop with batches made in this process, and in others."""
        cases = [replace(self.case, workers=n) for n in self.plan.workers if n <= self.case.workers]
        turns = {f"{case.workers} workers": partial(self.side.loop, case, self.long) for case in cases}
        self.rounds("workers", turns, until)

    def in_parts(self) -> None:
        """The whole batch all the same, by `accumulate`."""
        whole = self.plan.batch_size
        case = replace(self.case, batch_size=whole, accumulate=whole // self.case.batch_size, steps=2)
        self.report("whole_batch", whole)
        self.rounds("in parts", {"ours": partial(self.side.loop, case, self.long)}, until=0.0)

    def rounds(self, stage: str, turns: dict[str, Callable[[], Turn]], until: float) -> None:
        """Each takes its turn, while another round ends before that share of the time; at least one."""
        done: dict[str, list[Turn]] = {name: [] for name in turns}
        for _ in range(self.plan.turns):
            began = self.report.used()
            for name in list(turns):
                turn = self.taken(f"{stage}, {name}", turns[name])
                if turn is None:
                    del turns[name]
                else:
                    done[name].append(turn)
            self.report(stage, self.compared(done))
            if 2 * self.report.used() - began > until:
                break

    def taken(self, name: str, take_turn: Callable[[], Turn]) -> Turn | None:
        """What fails is told, and the others go on."""
        try:
            return take_turn()
        except Exception as error:
            self.report(f"{name} failed", f"{type(error).__name__}: {one_line(error)}")
        release(self.device)
        return None

    def compared(self, done: dict[str, list[Turn]]) -> dict:
        """Of turns that were taken so far: samples/s and data waited for, and of ours what they come to."""
        rates = {name: [turn.rate for turn in turns] for name, turns in done.items() if turns}
        row: dict = {
            name: {**spread(values), "waits": statistics.median(turn.waited for turn in done[name])}
            for name, values in rates.items()
        }
        flops = self.counted.step_flops / self.case.batch_size
        if "ours" in rates and self.rate:
            row["mfu"] = flops * row["ours"]["median"] / self.rate
        for name, one, other in (
            ("loop_over_bare", "bare", "ours"),  # of their times
            ("over_open_clip", "ours", "open_clip"),
            ("short_over_open_clip", "short", "open_clip"),
        ):
            if one in rates and other in rates:
                row[name] = spread(a / b for a, b in zip(rates[one], rates[other], strict=False))
        return row

    def tell_memory(self, key: str, measured: int, counted: Counted) -> None:
        ratio = counted.peak_memory / measured
        self.report(key, {"measured": measured, "predicted": counted.peak_memory, "ratio": ratio})


def room(device: torch.device) -> float:
    """Bytes that a step may take; a part of what is free is left for fragments."""
    return 0.95 * torch.cuda.mem_get_info()[0] if device.type == "cuda" else math.inf


def held(device: torch.device) -> int:
    """Bytes of tensors on it; 0 on the CPU, where nobody counts them."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
