"""What a life holds: resident memory and run folder after every update, over T = 2, 5, 50 and 200 updates.

    OMP_NUM_THREADS=1 python benchmarks/life.py [--updates 2 5 50 200] [--plot docs/memory.png]

Target: flat, but for the files that `evaluation.keep_weights` asks for, and T = 200 holds what T = 2 does.
EMA-merge at `tiny`, two steps an update. T updates need T concepts and `tiny` teaches 100, so here the base
domains are taught too: 222 concepts. The model has random weights, and each concept a few pictures: neither
changes what is held. Each life runs in a process of its own. Measured on Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fomo.update  # noqa: E402
from fomo import clip as fomo_clip  # noqa: E402
from fomo.datasets.sources.world import ALL_DOMAINS, Domain  # noqa: E402
from fomo.load_recipe import load  # noqa: E402
from fomo.report.figures import legend_below, line_style, new_figure, write_figure  # noqa: E402
from fomo.runs.logs import read_lines  # noqa: E402
from fomo.schema import read_yaml  # noqa: E402

RECIPE = ROOT / "recipes" / "methods" / "ema-merge.yaml"
MB = 1e6
PARTS = ("training", "scoring", "saving")


class Watched(fomo.update.Trainer):
    """Writes after every evaluation what the process and its folder hold, and seconds of CPU time by part."""

    training = scoring = saving = 0.0

    def train_update(self) -> None:
        start = time.process_time()
        super().train_update()
        self.training += time.process_time() - start

    def score(self) -> tuple[dict, dict]:
        start = time.process_time()
        scores = super().score()
        self.scoring += time.process_time() - start
        return scores

    def evaluate(self) -> None:
        start, scored = time.process_time(), self.scoring
        super().evaluate()
        self.saving += time.process_time() - start - (self.scoring - scored)
        seconds = {key: getattr(self, key) for key in PARTS}
        held = {"resident": status("VmRSS"), "peak": status("VmHWM"), "folder": size_of(self.run.folder)}
        self.run.log("held.jsonl", {"update": self.run.position.update, **held, **seconds})


def status(key: str) -> int:
    """Bytes, from Linux. Not ru_maxrss: that of a process may be its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def size_of(folder: Path) -> int:
    """Bytes of its files; one with two names counts once."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in found}.values())


def live(folder: Path, said: dict) -> None:
    """A life in this process, watched. said: what `recipe.load` takes."""
    fomo.update.Trainer = Watched
    fomo.update.run_recipe(load(RECIPE, **said), folder, resume=False, device="cpu")


def settings(updates: int, keep: str) -> list[str]:
    """What makes a life short, as overrides of its recipe."""
    said = {"stream.updates": updates, "budget": "{steps: 2}", "evaluation.keep_weights": keep}
    said |= {"evaluation.subset": 0.01, "evaluation.frozen": "false"}
    return [f"{key}={value}" for key, value in said.items()]


def random_tiny(folder: Path) -> str:
    """A model of the scale's shape, which need not be pretrained; -> where it is."""
    config = read_yaml(ROOT / "recipes/scales/tiny.yaml")["model"]["config"]
    fomo_clip.save(fomo_clip.new(config, seed=0), folder)
    return str(folder)


def world(path: Path, taught: Sequence[Domain] = ALL_DOMAINS, known: str = "base") -> str:
    """A data file that teaches domains of the rendered world and replays another; -> where it is."""
    sets = {d.name: {"source": "world", "domain": d.name, "train": 8, "test": 4} for d in taught}
    pool = [{"source": "world", "domain": known, "style": "mixed", "per_concept": 20}]
    kept = {"noisy": {"source": "world", "domain": known, "style": "noisy", "test": 4}}
    path.write_text(yaml.safe_dump({"pretraining": pool, "adaptation": sets, "evaluation": kept}))
    return str(path)


def child(folder: Path, said: dict) -> list[dict]:
    """The lines of held.jsonl of a life in another process."""
    command = [sys.executable, __file__, "--life", json.dumps(said), "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{said}: {done.stderr.strip().splitlines()[-1]}")
    return read_lines(folder / "held.jsonl")


def memory_figure(lives: dict[tuple[int, str], list[dict]]) -> Figure:
    """(T, weights kept) -> its lines of held.jsonl."""
    figure, (memory, folder) = new_figure(height=4.8, rows=2, sharex=True)
    for index, ((updates, keep), rows) in enumerate(lives.items()):
        style = {"color": line_style(index, 1)["color"], "linewidth": 1, "marker": "o", "markersize": 4}
        x, held, kept = (np.array([row[key] for row in rows[1:]]) for key in ("update", "resident", "folder"))
        memory.plot(x, held / MB, markevery=[-1], **style)
        if keep != "null":
            place = {"textcoords": "offset points", "ha": "center", "color": style["color"]}
            memory.annotate(f"T = {updates}", (x[-1], held[-1] / MB), (0, 12), **place)
        name = "all weights kept" if keep == "null" else f"the last {keep}"
        longest = updates == max(lives)[0]
        folder.plot(x, kept / MB, markevery=[-1], label=name if longest else None, **style)
    memory.set_title("resident memory, MB")
    memory.set_ylim(0, 1.15 * memory.get_ylim()[1])
    folder.set_title("run folder, MB")
    folder.set(yscale="log", xscale="log", xlabel="update")
    folder.set_xticks([1, 2, 5, 10, 20, 50, 100, 200])
    folder.minorticks_off()
    folder.xaxis.set_major_formatter("{x:g}")
    folder.yaxis.set_major_formatter("{x:,g}")
    legend_below(folder)
    return figure


def told(updates: int, keep: str, rows: list[dict]) -> str:
    """A line about a life: after its first update and after its last."""
    first, last = rows[1], rows[-1]
    memory = "resident {:,.0f} -> {:,.0f} MB".format(*(row["resident"] / MB for row in (first, last)))
    folder = "folder {:,.0f} -> {:,.0f} MB".format(*(row["folder"] / MB for row in (first, last)))
    peaks = "peak {:,.0f} -> {:,.0f} MB".format(*(row["peak"] / MB for row in (first, last)))
    return f"T = {updates:3}, keep_weights {keep:4}: {memory}, {peaks}, {folder}"


def main(updates: list[int], plot: Path | None) -> None:
    """Every T with the last three weights kept, the longest with all of them, too."""
    lives = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        said = {"model": random_tiny(place / "model"), "data": world(place / "world.yaml")}
        for count, keep in [*((count, "3") for count in updates), (max(updates), "null")]:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                overrides = settings(count, keep)
                lives[count, keep] = child(Path(folder) / "run", {**said, "overrides": overrides})
            print(told(count, keep, lives[count, keep]), flush=True)
    if plot:
        write_figure(plot, memory_figure, lives)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[2, 5, 50, 200])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--life", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life:
        live(options.folder, options.life)
    else:
        main(options.updates, options.plot)
