"""What a life costs: CPU seconds over the number of updates, training pictures, concepts, and pool entries.

    OMP_NUM_THREADS=1 python benchmarks/cost.py [--of updates pictures concepts pool] [--plot docs/cost.png]
    OMP_NUM_THREADS=1 python benchmarks/cost.py --share

Target: nothing above linear. EMA-merge at `tiny`, two steps an update; what is not varied is small. Each life runs
in a process of its own, and counts what its decoding processes take. Pictures, captions and pools are synthetic
(benchmarks/data.py), the model's weights random: the work is the same for any. Those of a training set are decoded
into the pixel cache, those of a pool are not. Concepts come in sets of 1,000, each with two test pictures.

--share: the parts of the scale's own merge run, from the cached base model; evaluation is one of them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import life  # noqa: E402
from data import MANY, Imagined  # noqa: E402

from fomo.datasets import datafile  # noqa: E402
from fomo.report.figures import COLOURS, new_figure, write_figure  # noqa: E402
from fomo.report.page import write_report  # noqa: E402
from fomo.runs.logs import read_lines  # noqa: E402

SIZES = {
    "updates": [5, 20, 50, 200],
    "pictures": [2_000, 20_000, 200_000],
    "concepts": [200, 2_000, 20_000],
    "pool": [10_000, 1_000_000, MANY],
}
SET = 1000  # concepts of a dataset
PARTS = ("opening", *life.PARTS, "report")


def synthetic(path: Path, pictures: int, concepts: int, pool: int) -> str:
    """A data file; -> where it is."""
    sets = {}
    for start in range(0, concepts, SET):
        count = min(SET, concepts - start)
        own = {"concepts": count, "train": pictures * count // concepts, "test": 2 * count}
        sets[f"set {start // SET}"] = {"source": "imagined", **own}
    cache = "always" if pictures > 2 * concepts else "never"
    content = {"cache": cache, "pretraining": [{"source": "imagined", "pictures": pool}], "adaptation": sets}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def case(what: str, size: int, place: Path) -> dict:
    """What `recipe.load` takes for a life of which one thing is large."""
    path, updates = place / f"{what}-{size}.yaml", size if what == "updates" else 2
    if what == "updates":
        data = life.world(path)
    else:
        concepts = size if what == "concepts" else 20
        pictures = size if what == "pictures" else 2 * concepts
        data = synthetic(path, pictures, concepts, size if what == "pool" else 1000)
    return {"data": data, "overrides": life.settings(updates, "3")}


def cpu_seconds() -> float:
    """Of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measured(folder: Path, said: dict) -> dict:
    """A life in this process with its report: CPU seconds of the whole and by part; bytes of peak memory."""
    datafile.SOURCES["imagined"] = Imagined
    datafile.TYPES["source"] = str  # else it is one of those that are there by themselves
    life.live(folder, said)
    lived, began = cpu_seconds(), time.process_time()
    write_report([folder])
    held = read_lines(folder / "held.jsonl")[-1]
    parts = {key: held[key] for key in life.PARTS}
    opening, report = lived - sum(parts.values()), time.process_time() - began
    return {
        "whole": cpu_seconds(),
        "opening": opening,
        **parts,
        "report": report,
        "peak": life.status("VmHWM"),
    }


def child(place: Path, said: dict) -> dict:
    """`measured` in another process."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, __file__, "--life", json.dumps(said), "--folder", f"{folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{said}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def told(size: int | str, row: dict) -> str:
    parts = "  ".join(f"{part} {row[part]:6.1f}" for part in PARTS)
    return f"{size:>10}  whole {row['whole']:6.1f} s  {parts}  peak {row['peak'] / life.MB:6,.0f} MB"


def short(size: int) -> str:
    """15,000,000 as 15 M."""
    return f"{size / 1e6:g} M" if size >= 1e6 else f"{size:,}"


def cost_figure(rows: dict[str, list[tuple[int, dict]]]) -> Figure:
    """What is varied -> (size, seconds by part). The dotted line is proportional to the size."""
    figure, panels = new_figure(height=0.5 + 1.45 * len(rows), rows=len(rows))
    figure.suptitle("CPU seconds of a whole run (dotted: proportional) by", fontsize=10)
    titles = {"pictures": "training pictures", "pool": "entries of the pretraining pool"}
    for axes, (what, measurements) in zip(panels, rows.items(), strict=True):
        x = np.array([size for size, _ in measurements])
        y = np.array([row["whole"] for _, row in measurements])
        axes.plot(x, y[-1] * x / x[-1], color="#777777", linestyle=":", linewidth=1.2)
        axes.plot(x, y, color=COLOURS[0], marker="o")
        for place in zip(x, y, strict=True):
            axes.annotate(f"{place[1]:.0f}", place, (0, 7), textcoords="offset points", ha="center")
        axes.set(xscale="log", yscale="log", ylim=(y.min() / 3, 3 * y.max()))
        axes.set_title(titles.get(what, what))
        axes.set_xticks(x, [short(size) for size in x])
        axes.set_yticks([])
        axes.minorticks_off()
    return figure


def main(chosen: list[str], plot: Path | None) -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        os.environ["FOMO_CACHE"] = str(place / "cache")
        model = life.random_tiny(place / "model")
        child(
            place, {"model": model, **case("updates", 1, place)}
        )  # what is counted once is in the cache now
        for what in chosen:
            print(what)
            rows[what] = []
            for size in SIZES[what]:
                rows[what].append((size, child(place, {"model": model, **case(what, size, place)})))
                print(told(f"{size:,}", rows[what][-1][1]), flush=True)
    if plot:
        write_figure(plot, cost_figure, rows)


def share() -> None:
    """The parts of the run that `tiny` is, in percent."""
    with tempfile.TemporaryDirectory() as scratch:
        row = child(Path(scratch), {})
    print(told("tiny", row))
    print(", ".join(f"{part} {row[part] / row['whole']:.1%}" for part in PARTS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--of", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--share", action="store_true")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--life", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.life is not None:
        print(json.dumps(measured(options.folder, options.life)))
    elif options.share:
        share()
    else:
        main(options.of, options.plot)
