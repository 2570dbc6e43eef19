"""Is what is chosen on validation better than what was fixed? KA, ZS and GM of updates on one's own data.

    OMP_NUM_THREADS=1 python benchmarks/own_data.py DIR... [--seeds 0 1 2] [--scale tiny]

Each DIR is what `update --data DIR` takes. `fixed` is what `update` did before: ten passes and `keep` 0.5, also on
the validation pictures; `chosen` is what it does. Neither knows the sets of ZS, the held-out sets of the rendered
world: nothing but DIR is given. Scores are those of whole test sets.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fomo.clip import load as load_model  # noqa: E402
from fomo.datasets import datafile  # noqa: E402
from fomo.datasets.stream import concepts_of  # noqa: E402
from fomo.devices import pick_device  # noqa: E402
from fomo.eval.zero_shot import Scores, evaluate_data  # noqa: E402
from fomo.runs.lineage import start_run  # noqa: E402
from fomo.runs.logs import evaluations  # noqa: E402
from fomo.update import run_recipe  # noqa: E402

PASSES, KEEP = 10, 0.5  # of `fixed`
VARIANTS = ("untouched", "fixed", "chosen")


def updated(data: str, seed: int, fixed: bool, folder: Path, scale: str) -> tuple[Path, str]:
    """-> the run, and what was chosen in it."""
    said = {"scale": scale, "seed": seed, "overrides": ["evaluation.frozen=false", "evaluation.keeps=[]"]}
    recipe, _ = start_run(None, data, str(folder), True, False, **said)
    if fixed:
        steps = math.ceil(PASSES * pictures(folder / "data.yaml") / recipe.optimizer.batch_size)
        said["overrides"] += [f"budget.steps={steps}", f"method.keep={KEEP}"]
        recipe, _ = start_run(None, data, str(folder), True, False, **said)
    run_recipe(recipe, folder, resume=True, device="cpu")
    *_, last = evaluations(folder)
    chosen = last.get("choice", {}).get("chosen")
    return folder, f"keep {chosen['keep']:g}, step {chosen['step']}" if chosen else ""


def pictures(file: Path) -> int:
    return sum(concepts_of(datafile.read(file))[1])


def score(run: Path, update: int, place: Path) -> Scores:
    """On the test split of the run's data and the held-out sets of the rendered world."""
    world = datafile.content(datafile.read(ROOT / "recipes/data/world.yaml"))
    learnt = datafile.content(datafile.read(run / "data.yaml"))["adaptation"]
    place.write_text(
        yaml.safe_dump({"adaptation": learnt, "evaluation": world["evaluation"]}, sort_keys=False)
    )
    clip = load_model(None, str(run / f"weights/update_{update:03d}.safetensors"))
    return evaluate_data(clip, place, pick_device("cpu", 1))


def main(folders: list[str], seeds: list[int], scale: str) -> None:
    found: dict[tuple[str, int], dict[str, Scores]] = {}
    for data in folders:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as place:
                old, _ = updated(data, seed, True, Path(place) / "fixed", scale)
                new, what = updated(data, seed, False, Path(place) / "chosen", scale)
                runs = zip(VARIANTS, (old, old, new), (0, 1, 1), strict=True)
                scores = {name: score(run, n, Path(place) / "test.yaml") for name, run, n in runs}
            found[Path(data).name, seed] = scores
            shown = ", ".join(f"{name} {s.ka:.1f} / {s.zs:.1f} / {s.gm:.1f}" for name, s in scores.items())
            print(f"{Path(data).name}, seed {seed}: {shown}; {what}", flush=True)
    print("\n| set | KA / ZS / GM: " + " | ".join((*VARIANTS, "gain in GM")) + " |\n" + "|---" * 5 + "|")
    for name in dict.fromkeys(name for name, _ in found):
        of_set = [scores for (other, _), scores in found.items() if other == name]
        means = [
            [statistics.fmean(s[v].means[k] for s in of_set) for k in ("ka", "zs", "gm")] for v in VARIANTS
        ]
        cells = [" / ".join(f"{mean:.1f}" for mean in row) for row in means]
        print(f"| {name} | {' | '.join(cells)} | {spread([gain(s) for s in of_set])} |")
    by_seed = [statistics.fmean(gain(s) for (_, n), s in found.items() if n == seed) for seed in seeds]
    print(f"| mean of {len(folders)} sets | | | | {spread(by_seed)} |")


def gain(scores: dict[str, Scores]) -> float:
    return scores["chosen"].gm - scores["fixed"].gm


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", default="tiny")
    arguments = parser.parse_args()
    main(arguments.folders, arguments.seeds, arguments.scale)
