"""One hash for each of many small runs: of their batches, weights and scores. What must not move when code does.

    python tests/hashes.py > before.txt; ...; python tests/hashes.py | diff before.txt -

The same machine, torch build and thread count give the same lines; nothing is compared across machines.
"""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from conftest import SMALL_DATA, SMALL_SCALE  # noqa: E402
from small_runs import invoke  # noqa: E402

from fomo.datasets.mixture import Batches  # noqa: E402

SCORES = ("update", "ka", "zs", "gm", "datasets", "stderr", "details", "drift", "transfer", "keeps", "frozen")
RECIPES = ("bitfit", "distill", "dora-4", "ewc", "finetune", "galore-16", "lnfit", "locked-image", "lora-4")
RECIPES += ("offline-merge", "si", "stock-merge", "ties-merge", "vera-4", "zs-merge")
RULES = ("interpolate", "slerp", "task_arithmetic", "ties", "dare", "breadcrumbs", "magmax", "model_stock")
RULES += ("opcm",)
ORDERS = ("random", "frequency", "performance", "similarity", "time", "dataset")
VARIANTS = {  # changes of recipes/merge.yaml
    "merge": [],
    "ft-merge": ["method.partner=base"],
    "dare": ["method.rule=dare"],
    "lora-merge": ["method.tune={name: lora, rank: 4}"],
    "ar-rsqrt": ["schedule={name: rsqrt, meta: autoregressive}"],
    "infinite": ["schedule={name: wsd, meta: infinite}"],
    "accumulate": ["optimizer.accumulate=3"],
    "limit": ["mixture.limit=7", "mixture.pretraining=0", "mixture.update=0.5", "mixture.buffer=0.5"],
    "temperature": ["temperature={init: 0.05, learn: true}"],
    "keeps": ["evaluation.keeps=[0,0.5]"],
    **{order: [f"stream.order={order}"] for order in ORDERS[1:]},
}
RETRIEVAL = "  captions: {source: world, domain: icons, test: 4, task: retrieval}\n"
WEIGHED = SMALL_DATA.replace(
    "per_concept: 8}", "per_concept: 8, weight: 2}\n  - {source: world, domain: icons, per_concept: 3}"
)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name).resolve()
        os.environ["FOMO_CACHE"] = str(place / "cache")
        os.chdir(place)
        write_inputs(place)
        for line in lines(place):
            print(line, flush=True)


def lines(place: Path) -> Iterator[str]:
    small = ["--scale", place / "small.yaml", "--device", "cpu"]
    merge = ROOT / "recipes/merge.yaml"
    for name in RECIPES:
        recipe = ROOT / f"recipes/methods/{name}.yaml"
        rank = ["--set", "method.rank=4"] if "galore" in name else []
        yield f"method {name}: {run('update', '--recipe', recipe, *small, *rank, out=place / name)}"
    for name, changes in VARIANTS.items():
        settings = [word for change in changes for word in ("--set", change)]
        yield f"variant {name}: {run('update', '--recipe', merge, *small, *settings, out=place / name)}"
    for name in ("retrieval", "weighed"):
        data = ["--data", place / f"{name}.yaml"]
        yield f"data {name}: {run('update', '--recipe', merge, *small, *data, out=place / name)}"
    for name in ("photos", "photos.csv", "photos.tar"):
        out = place / f"own-{name}"
        yield f"own {name}: {run('update', '--data', place / name, *small, out=out)}"
    child = place / "child"
    yield f"continue: {run('continue', place / 'own-photos', '--data', place / 'photos.csv', out=child)}"
    call("rollback", child, "--to", 1)
    yield f"rollback: {of_tensors(child / 'model/open_clip_model.safetensors')}"
    grandchild = place / "grandchild"
    yield f"continue: {run('continue', child, '--data', place / 'photos.tar', out=grandchild)}"
    yield f"kill, resume: {killed(place / 'killed', '--recipe', merge, *small)}"
    yield from texts(place, small)
    yield from merges(place)


def texts(place: Path, small: list) -> Iterator[str]:
    """What the commands that train nothing print and write."""
    scale = small[:2]
    for name in ("merge", "guide"):
        printed = call("schedule", "--recipe", ROOT / f"recipes/{name}.yaml", *scale, "--csv")
        yield f"schedule {name}: {digest(printed.encode())}"
    printed = call("schedule", "--recipe", ROOT / "recipes/merge.yaml", "--steps", 1000, "--csv")
    yield f"schedule 1000: {digest(printed.encode())}"
    for order in ORDERS:
        out = place / f"{order}.json"
        printed = call("stream", "--order", order, "--updates", 4, "-o", out, *small)
        yield f"stream {order}: {digest(printed.encode(), out.read_bytes())}"
    methods = "finetune,locked-text,lora-4,galore-16,ewc,distill,ema-merge"
    for name in ("tiny", "b32"):
        printed = call("budget", "--json", "--methods", methods, "--scale", name)
        yield f"budget {name}: {digest(printed.encode())}"
    printed = call("eval", "--json", "--model", place / "merge/model", *small)
    yield f"eval: {digest(printed.encode())}"


def merges(place: Path) -> Iterator[str]:
    weights = [place / f"finetune/weights/update_{n:03d}.safetensors" for n in range(4)]
    for rule in RULES:
        out = place / f"{rule}.safetensors"
        call("merge", "--rule", rule, "--base", *weights[:1], *weights[2:], "-o", out)
        yield f"merge {rule}: {of_tensors(out)}"
    call("merge", "--rule", "interpolate", *weights[1:], "-o", place / "three.safetensors")
    yield f"merge three: {of_tensors(place / 'three.safetensors')}"
    models = [place / "finetune/model", place / "merge/model"]
    call("merge", "--rule", "interpolate", "--set", "keep=0.3", *models, "-o", place / "directory")
    yield f"merge models: {of_tensors(place / 'directory/open_clip_model.safetensors')}"


# --- running and hashing ---------------------------------------------------------------------------------


def call(*arguments: object) -> str:
    """Run a command of the command line in this process; -> what it prints."""
    done = invoke(*arguments)
    if done.exit_code:
        raise RuntimeError(f"{arguments}: exit status {done.exit_code}: {done.stderr[-500:]}")
    return done.stdout


def run(*arguments: object, out: Path) -> str:
    """A run, and hashes of its batches and of what it leaves."""
    batches, original = hashlib.sha256(), Batches.__getitem__

    def noted(self, step):
        batch = original(self, step)
        for tensor in batch:
            batches.update(tensor.numpy().tobytes())
        return batch

    Batches.__getitem__ = noted
    try:
        call(*arguments, "--out", out)
    finally:
        Batches.__getitem__ = original
    return f"batches {batches.hexdigest()[:12]} {of_run(out)}"


def killed(out: Path, *arguments: object) -> str:
    """The same for a run that is killed once it has scored an update, then resumed."""
    words = ["update", *map(str, arguments), "--out", str(out), "--set", "budget.steps=30"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "fomo.py"), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 1):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    call(*words, "--resume")
    return of_run(out)


def of_run(folder: Path) -> str:
    weights = [of_tensors(path) for path in sorted((folder / "weights").glob("update_*"))]
    parsed = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [{key: line.get(key) for key in SCORES} for line in parsed]
    losses = [json.loads(line)["loss"] for line in (folder / "train.jsonl").read_text().splitlines()]
    said = digest(json.dumps([scores, losses], sort_keys=True).encode())
    return f"weights {digest(''.join(weights).encode())} scores {said}"


def of_tensors(path: Path) -> str:
    tensors = sorted(load_file(path).items())
    return digest(
        *(part for name, t in tensors for part in (name.encode(), t.contiguous().numpy().tobytes()))
    )


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


# --- inputs ----------------------------------------------------------------------------------------------


def write_inputs(place: Path) -> None:
    """A small scale, data files, and the same pictures as class folders, as a table and as a shard."""
    (place / "small.yaml").write_text(SMALL_SCALE)
    (place / "data.yaml").write_text(SMALL_DATA)
    (place / "retrieval.yaml").write_text(SMALL_DATA + RETRIEVAL)
    (place / "weighed.yaml").write_text(WEIGHED)
    rng = np.random.default_rng(0)
    rows, members = [["filepath", "title", "label"]], {}
    for label, name in enumerate(("cat", "dog", "red_fox")):
        (place / "photos" / name).mkdir(parents=True)
        for number in range(9):
            shape = rng.integers(30, 60, 2)
            pixels = rng.integers(80 * label, 80 * label + 90, (*shape, 3)).astype(np.uint8)
            file = place / "photos" / name / f"{number}.png"
            Image.fromarray(pixels).save(file)
            os.utime(file, (1_000_000_000, 1_000_000_000))
            rows.append([str(file.relative_to(place)), f"a {name} number {number}", name])
            members[f"{name}{number}.png"] = file.read_bytes()
            members[f"{name}{number}.cls"] = str(label).encode()
            members[f"{name}{number}.txt"] = f"a {name}".encode()
    with open(place / "photos.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (place / "classes.txt").write_text("cat\ndog\nred fox\n")
    with tarfile.open(place / "photos.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    main()
