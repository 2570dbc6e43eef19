"""What this machine's GPU does with CLIP: one table in at most 8 minutes.

    python benchmarks/gpu.py [--json FILE] [--minutes 8]
    python benchmarks/gpu.py --small [--device cpu]        every part in brief, with a tiny model: a test

ViT-B-16, ViT-B-32 and ViT-L-14 have random weights. Pictures are noise, 4:3, with the model's input as their short
side (in JPEG as many bytes as photographs of 500 pixels). Captions are random words: "long" ones fill the context,
so that a step has the FLOPs and takes the memory that `budget` counts, "short" ones have ten words. Our loop reads
the pixel cache, open_clip's `train_one_epoch` the JPEG files, both through as many worker processes.

What is compared takes turns in one process, and after each round the medians so far are told. Each part has a
share of the time and is cut off at it; what it leaves goes to those after it. FILE is written as results come.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

BEGAN = time.monotonic()  # before the imports that take seconds

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import life  # noqa: E402
import merging  # noqa: E402
from evaluation import Noise  # noqa: E402
from gpu_table import on_one_line, tables  # noqa: E402
from gpu_training import LONG, Plan, config_of, train_both  # noqa: E402
from parts import Report, in_process  # noqa: E402
from speed import TABLE, pictures_of, pool_from, write_table  # noqa: E402

from fomo.atomic import write_atomically  # noqa: E402
from fomo.budget.dry_run import matrix_rate  # noqa: E402
from fomo.clip import new  # noqa: E402
from fomo.datasets.sources.world import ALL_DOMAINS  # noqa: E402
from fomo.devices import Precision, pick_device  # noqa: E402
from fomo.errors import Failure, Interrupted  # noqa: E402
from fomo.load_recipe import load  # noqa: E402
from fomo.update import run_recipe  # noqa: E402

EXPERTS, FILES = 10, 2  # models that are merged, each of which is one of so many files
STOP = 4  # the step of the first update after which a run is stopped, to go on
SMALL = {
    "models": ("tiny",),
    "batch_size": 16,
    "pictures": 48,
    "workers": (0, 1),
    "window": 0.02,
    "turns": 2,
    "products": (128, 256),
    "merged": "tiny",
}


# --- the machine and the pictures ------------------------------------------------------------------------


def machine(report: Report, plan: Plan, found: dict) -> None:
    device = pick_device(plan.device)
    report("device", card() if device.type == "cuda" else {"name": platform.processor() or "CPU"})
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report("cores", usable)
    report("versions", {"torch": str(torch.__version__), "open_clip": open_clip.__version__})
    half = Precision("auto", device).dtype
    ways = [("float32", torch.float32, "highest")]
    if device.type == "cuda":
        ways = [(str(half)[6:], half, "high"), ("tf32", torch.float32, "high"), *ways]
    for name, dtype, precision in ways:
        torch.set_float32_matmul_precision(precision)
        rates = {side: matrix_rate(device, dtype, 10, side) for side in plan.products}
        report(f"{name}_flops", {"best": max(rates.values()), **rates})


def card() -> dict:
    """Of the GPU that is used, the first."""
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "memory": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "driver": driver(),
        "cuda": torch.version.cuda,
    }


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        said = []
    return said[0] if said else "unknown"


def base_rate(found: dict) -> float | None:
    """FLOP/s of the best matrix product in the precision of training, if it was measured."""
    names = ("bfloat16_flops", "float16_flops", "float32_flops")
    measured = (found["machine"][name] for name in names if name in found["machine"])
    return next(measured, {"best": None})["best"]


class Captioned(Noise):
    """Noise with captions, which are words that open_clip knows."""

    def __init__(self, count: int, side: int, words: int):
        super().__init__(count, side)
        self.words = words

    def captions(self, index: int) -> list[str]:
        vocabulary = " ".join(open_clip.IMAGENET_CLASSNAMES).split()
        return [" ".join(np.random.default_rng(index).choice(vocabulary, self.words))]


def pictures(report: Report, plan: Plan, found: dict) -> None:
    """JPEG files, two tables of captions, and the pixel cache."""
    clip = new(config_of(plan.models[0]), seed=0)
    for table, words in ((TABLE, 10), (LONG, 2 * clip.model.context_length)):
        source = Captioned(plan.pictures, clip.image_size, words)
        write_table(plan.folder / table, [source.captions(i)[0] for i in range(plan.pictures)])
    for index in range(plan.pictures):
        source.image(index).save(plan.folder / f"{index}.jpg", quality=95)
    pool_from(pictures_of(plan.folder), clip)
    size = sum(file.stat().st_size for file in plan.folder.glob("*.jpg"))
    report("written", {"pictures": plan.pictures, "bytes": size})


def training(model: str, report: Report, plan: Plan, found: dict) -> None:
    train_both(model, report, plan, base_rate(found))


# --- resuming and merging --------------------------------------------------------------------------------


def resume(report: Report, plan: Plan, found: dict) -> None:
    """A run that was stopped within its first update and went on, and one that was not; the latter twice, for
    some of CUDA's kernels add in any order."""
    settings = [*life.settings(2, "null"), "budget={steps: 6}"]
    data = life.world(plan.folder / "world.yaml", ALL_DOMAINS[:2], known=ALL_DOMAINS[2].name)
    recipe = load(life.RECIPE, data=data, overrides=settings)

    def weights(name: str) -> dict[str, torch.Tensor]:
        run_recipe(recipe, plan.folder / name, resume=name == "resumed", device=plan.device)
        return load_file(plan.folder / name / "weights/update_002.safetensors")

    whole = weights("whole")
    with stopped_after(STOP):
        try:
            run_recipe(recipe, plan.folder / "resumed", resume=False, device=plan.device)
            raise Failure("the run was not stopped")
        except Interrupted:
            pass
    for name in ("resumed", "whole again"):
        report(name, difference(whole, weights(name)))


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """A signal to this process within the so-manieth step of any optimizer."""
    numbers = count(1)

    def stop(*_: object) -> None:
        if next(numbers) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict:
    largest = max((a[name].double() - b[name].double()).abs().max().item() for name in a)
    return {"bits_agree": all(a[name].equal(b[name]) for name in a), "largest_difference": largest}


def checkpoints(report: Report, plan: Plan, found: dict) -> None:
    """To be merged: as many names as models, of fewer files, as only the values would differ."""
    folder = plan.folder / "merged"
    size = merging.prepare(folder, FILES, new(config_of(plan.merged), seed=0).model)
    for number in range(FILES, EXPERTS):
        (folder / f"{number}.safetensors").symlink_to(f"{number % FILES}.safetensors")
    report("written", {"models": EXPERTS, "bytes_each": size})


def merge(case: str, kind: str, report: Report, plan: Plan, found: dict) -> None:
    done = merging.run(case, plan.folder / "merged", EXPERTS, torch.device(kind))
    report("merged", {"seconds": done["seconds"], "memory": done["above"]})


# --- all of it -------------------------------------------------------------------------------------------


class Part(NamedTuple):
    name: str
    share: float  # of the time
    run: Callable[[Report, Plan, dict], None]


def parts_of(plan: Plan) -> list[Part]:
    """What a part leaves goes to those after it: the largest model and the slowest merge come last."""
    *models, largest = (Part(name, 130, partial(training, name)) for name in plan.models)
    devices = dict.fromkeys([plan.device, "cpu"])
    *merges, slowest = (
        Part(f"merge, {case}, {kind}", share, partial(merge, case, kind))
        for case, share in (("interpolate, 2 in memory", 4), ("interpolate", 10), ("ties", 30))
        for kind in devices
    )
    return [
        Part("machine", 30, machine),
        Part("pictures", 30, pictures),
        *models,
        Part("resume", 25, resume),
        Part("checkpoints", 15, checkpoints),
        *merges,
        largest,
        slowest,
    ]


def measure(plan: Plan, ends: float, file: Path | None, found: dict) -> None:
    """Fill `found`: part -> what it reports."""
    parts = parts_of(plan)
    for index, part in enumerate(parts):
        began = time.monotonic()
        seconds = (ends - began) * part.share / sum(other.share for other in parts[index:])
        own = found.setdefault(part.name, {})
        for key, value in in_process(part.run, max(seconds, 1.0), plan, found):
            own[key] = value
            line = f"{time.monotonic() - BEGAN:4.0f} s  {part.name}: {key}: {on_one_line(value)}"
            print(line, file=sys.stderr, flush=True)
            write(found, file)
        own["seconds"] = time.monotonic() - began
        write(found, file)
        if part.run is machine and "device" not in own:
            return  # without one nothing else can be measured


def write(found: dict, file: Path | None) -> None:
    if file:
        write_atomically(file, json.dumps(found, indent=1).encode())


def main(plan: Plan, minutes: float, file: Path | None) -> int:
    """-> exit status: 1 if anything failed; what is cut off is told, no more."""
    found: dict[str, dict] = {}
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        measure(plan, BEGAN + 60 * minutes, file, found)
    finally:  # also of a run that is stopped
        print(tables(found))
    told = [(key, str(value)) for own in found.values() for key, value in own.items()]
    return int(any(key.endswith("failed") or value.startswith("failed") for key, value in told))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that is found, as it is found")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it takes at most [8]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="[cuda]; cpu: with --small")
    parser.add_argument("--small", action="store_true", help="every part in brief, with a tiny model")
    said = parser.parse_args()
    if said.device == "cpu" and not said.small:
        parser.error("--device cpu: only with --small")
    if said.json and not said.json.parent.is_dir():
        parser.error(f"--json {said.json}: there is no folder {said.json.parent}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        os.environ["FOMO_CACHE"] = f"{scratch}/cache"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/compiled"  # else the second run would not compile
        chosen = Plan(said.device, Path(scratch), **(SMALL if said.small else {}))
        sys.exit(main(chosen, said.minutes, said.json))
