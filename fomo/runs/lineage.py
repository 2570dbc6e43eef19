"""The history of a model over several runs: the first update, the next, what was, and the way back.

    start_run      the recipe and the folder of a first run
    child_run      a child run that goes on from the update which its parent has deployed
    history        every update from the first run on, as text
    roll_back      deploy an earlier update; nothing is deleted
    compare        which concepts got better and worse between two updates

A child is a run folder like any other. It begins with its parent's state and stream, its data file names the
parent's data and the new data, and parent.yaml says where it comes from. Two children of one update are siblings.
"""

import atexit
import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from safetensors.torch import load_file

from fomo.atomic import staged_folder, write_atomically
from fomo.clip import load as load_model
from fomo.datasets import datafile
from fomo.datasets.datafile import DataFile, Entry
from fomo.datasets.infer import as_data_file, is_data_file, recipe_for
from fomo.datasets.periods import as_recorded
from fomo.datasets.stream import concepts_of
from fomo.distributed import Ranks
from fomo.errors import Interrupted, UserError
from fomo.load_recipe import ROOT, load
from fomo.recipe import Recipe
from fomo.runs.folder import (
    Position,
    Run,
    file_hash,
    is_run,
    kept_updates,
    link_or_copy,
    lock,
    read_checkpoint,
    read_json,
    refuse_used,
    size_of,
    update_of,
    way_on,
)
from fomo.runs.logs import evaluations, is_same_set, refuse_missing, scored_sets
from fomo.schema import read_yaml
from fomo.text import plural

GUIDE = ROOT / "guide.yaml"  # what `update` does where no recipe is named
SHOWN = 12  # concepts of either kind in a comparison


def head_of(folder: Path) -> int:
    """The update that a finished run has deployed: its last, or what `rollback` said."""
    refuse_missing(folder)
    kept = kept_updates(folder / "state")
    if not kept:
        advice = f"first go on with: {way_on(folder)}" if is_run(folder) else "expected the folder of a run"
        raise UserError(f"{folder}: no finished update is kept; {advice}")
    if (folder / "state/head").exists():
        return json.loads((folder / "state/head").read_text())["update"]
    updates = len(Run(folder).stream()["updates"])
    done = update_of(kept[-1])
    if done < updates:
        progress = f"has finished {done} of {plural(updates, 'update')}"
        raise UserError(f"{folder}: {progress}; first go on with: {way_on(folder)}")
    return done


def kept_after(folder: Path, update: int) -> list[Path]:
    """The checkpoint that keeps an update, if there is one; killed attempts may have left older ones."""
    return sorted((folder / "state").glob(f"update_{update:03d}-*.pt"))


def weights_after(folder: Path, update: int) -> Path:
    return folder / f"weights/update_{update:03d}.safetensors"


def state_after(folder: Path, update: int) -> dict:
    """The content of that checkpoint."""
    found = kept_after(folder, update)
    checkpoint = read_checkpoint(found[-1]) if found else None
    if checkpoint is None:
        kept = dict.fromkeys(map(update_of, kept_updates(folder / "state")))
        problem = "is damaged" if found else "is not kept"
        raise UserError(f"{folder}: update {update} {problem}, kept: {', '.join(map(str, kept)) or 'none'}")
    return checkpoint


# --- the first update ------------------------------------------------------------------------------------


def start_run(
    recipe_path: str | Path | None,
    data: str | None,
    out: str | None,
    resume: bool,
    dry_run: bool,
    one_class: bool = False,
    **options,
) -> tuple[Recipe, Path]:
    """The recipe and the run folder of `update`; for a folder of pictures, with a data file inferred into it.

    options: scale, model, seed, overrides, as load_recipe.load takes them. A dry run leaves nothing behind.
    """
    named = recipe_path or options.get("scale") or any(o.startswith("scale=") for o in options["overrides"])
    recipe_path = recipe_path or GUIDE
    if data is None or is_data_file(data):
        fitted = data is not None and not named
        recipe = load_fitted(recipe_path, data, fitted, **options)
        return recipe, Path(out) if out else default_folder(recipe_path, recipe, data)
    folder = Path(out) if out else Path("runs") / Path(data).resolve().stem
    place = folder
    if dry_run:
        place = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, place)
    refuse_used(place, resume)
    file = place / "data.yaml"
    if not (resume and file.exists()):  # else it may have been edited
        as_data_file(data, place, one_class)
    return load_fitted(recipe_path, str(file), fitted=True, **options), folder


def load_fitted(path: str | Path, data: str | None, fitted: bool, **options) -> Recipe:
    """A recipe, if so fitted to the data, or to those of an update if there are several by `stream.every`."""
    if not fitted:
        return load(path, data=data, **options)
    recipe = load(path, data=data, fitted=recipe_for(Path(data)), **options)
    if recipe.stream.every:
        recipe = load(path, data=data, fitted=recipe_for(Path(data), recipe.stream.updates), **options)
    return recipe


def default_folder(recipe_path: str | Path, recipe: Recipe, data: str | None) -> Path:
    parts = [Path(recipe_path).stem, Path(recipe.scale).stem, *([Path(data).stem] if data else [])]
    return Path("runs") / "-".join([*parts, f"seed{recipe.seed}"])


# --- the next update -------------------------------------------------------------------------------------


@contextmanager
def child_run(
    parent: Path, data: str, out: str | None, ranks: Ranks, **accepted: bool
) -> Iterator[tuple[Recipe, Path]]:
    """The recipe and the folder of a new child run, to be run with `resume`.

    If that fails before anything was scored, the folder goes, and its name is free again. An interruption has
    told the way on, so it stays.
    """
    recipe, folder = ranks.broadcast_object(lambda: continue_run(parent, data, out, **accepted))
    try:
        yield recipe, folder
    except Interrupted:
        raise
    except BaseException:
        if ranks.first and not size_of(folder / "metrics.jsonl"):
            with suppress(UserError, OSError), lock(folder / "lock"):  # unless another process works on it
                shutil.rmtree(folder)
        raise


def continue_run(
    parent: Path, data: str, out: str | None, one_class: bool = False, skip_bad: bool = False
) -> tuple[Recipe, Path]:
    """Make the child run that teaches `data` (a data file, or what infer.py takes) in one update.

    Of a run in periods (`stream.every`) the periods stay, and what is new is one update, whatever its dates.
    -> its recipe and folder, to be run with `resume`.
    """
    update = head_of(parent)
    checkpoint = state_after(parent, update)
    folder = Path(out) if out else child_folder(parent, update + 1)
    if is_untrained(folder):
        print(f"{folder}: nothing had been trained there, it begins anew", file=sys.stderr)
    else:
        refuse_used(folder, resume=False)
    with staged_folder(folder) as staging:
        file = data if is_data_file(data) else as_data_file(data, staging, one_class)
        new = datafile.read(file, skip_bad)
        old, record = datafile.read(parent / "data.yaml"), Run(parent).stream()
        names = free_names(new.adaptation, {**old.adaptation, **old.evaluation})
        if every_of(parent):
            old = as_recorded(old, recorded_sets(parent, record))
            note = "in periods so far (stream.every); the new data is one update, whatever its dates"
            print(f"{parent}: {note}", file=sys.stderr)
        write_yaml(staging / "data.yaml", both_contents(old, new, names))
        fresh = [[names[c.dataset], c.label, names.get(c.name, c.name)] for c in concepts_of(new)[0]]
        before = load(parent / "recipe.yaml", overrides=["stream.every=null"])
        recipe = next_recipe(before, folder, update + 1, len(record["updates"]))
        write_yaml(staging / "recipe.yaml", dataclasses.asdict(recipe))
        record["updates"] = [*record["updates"][:update], fresh]
        (staging / "stream.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        origin = {"run": str(parent.resolve()), "update": update, "weights": weights_hash(parent, update)}
        write_yaml(staging / "parent.yaml", origin)
        copy_state(parent, staging, checkpoint, update + 1)
    return recipe, folder


def every_of(run: Path) -> str | int | None:
    """What makes the updates of a run, where periods of time do."""
    return read_yaml(run / "recipe.yaml").get("stream", {}).get("every")


def recorded_sets(run: Path, record: dict) -> list[str]:
    """The sets that a run learns from and those that it only tests on, its periods."""
    learnt = [name for name, role in constants_of(run)["roles"].items() if role == "adaptation"]
    return list(dict.fromkeys([*record["sources"], *learnt]))


def is_untrained(folder: Path) -> bool:
    """Whether it is a child that has not trained a step, as an error or a kill left it, and nobody works on it."""
    names = ("parent.yaml", "lock")  # without a lock it is being made just now
    if size_of(folder / "train.jsonl") or not all((folder / name).exists() for name in names):
        return False
    try:
        lock(folder / "lock").close()
        return True
    except UserError:
        return False


def child_folder(parent: Path, update: int) -> Path:
    """photos -> photos-update2, photos-update2-b, ...; photos-update2 -> photos-update3."""
    stem = re.sub(r"-update\d+(-[b-z])?$", "", parent.resolve().name)
    names = [
        f"{stem}-update{update}{suffix}" for suffix in ("", *(f"-{c}" for c in "bcdefghijklmnopqrstuvwxyz"))
    ]
    folders = [parent.resolve().parent / name for name in names]
    free = next((folder for folder in folders if not folder.exists() or is_untrained(folder)), None)
    if free is None:
        raise UserError(f"{parent}: has {len(names)} children already; name the next with --out")
    return free


def free_names(new: dict[str, Entry], taken: dict[str, Entry]) -> dict[str, str]:
    """A name for each new set that no older one has: photos, then photos-2."""
    names: dict[str, str] = {}
    for name in new:
        numbered = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        names[name] = next(n for n in numbered if n not in taken and n not in names.values())
    return names


def both_contents(old: DataFile, new: DataFile, names: dict[str, str]) -> dict:
    """The content of a data file with what both teach, keep and replay; new sets under their `names`."""
    older, newer = datafile.content(old), datafile.content(new)
    learnt = older["adaptation"] | {names[name]: spec for name, spec in newer["adaptation"].items()}
    kept = newer["evaluation"] | older["evaluation"]
    pool = older["pretraining"] + [s for s in newer["pretraining"] if s not in older["pretraining"]]
    kept = {name: spec for name, spec in kept.items() if name not in learnt}
    skip_bad = old.skip_bad or new.skip_bad
    return {**older, "skip_bad": skip_bad, "pretraining": pool, "adaptation": learnt, "evaluation": kept}


def next_recipe(before: Recipe, folder: Path, updates: int, planned: int) -> Recipe:
    """The parent's recipe with its budget of an update for the new one."""
    budget, total = before.budget, before.budget.gflops
    if total is not None:
        budget = dataclasses.replace(budget, gflops=total * updates / planned)
    stream = dataclasses.replace(before.stream, updates=updates)
    data = str(folder.resolve() / "data.yaml")
    return dataclasses.replace(before, data=data, stream=stream, budget=budget)


def copy_state(parent: Path, child: Path, checkpoint: dict, updates: int) -> None:
    """What training goes on from: the checkpoint, experts that a merge keeps on disk, the model's shape."""
    content = {k: v for k, v in checkpoint.items() if k not in ("format", "logs", "position")}
    began = {"updates": updates, "evaluated": False, "began": checkpoint["position"]["seconds"]}
    (child / "state").mkdir()
    Run(child, Position(**{**checkpoint["position"], **began})).save_checkpoint(**content)
    shutil.copytree(Run(parent).model, child / "model")
    if (parent / "experts").exists():
        shutil.copytree(parent / "experts", child / "experts", copy_function=link_or_copy)


def write_yaml(path: Path, content: dict) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")


# --- looking back ----------------------------------------------------------------------------------------


def origin_of(folder: Path) -> tuple[Path, int] | None:
    """The parent of a child run, and the update that the child went on from; None of a first run."""
    if not (folder / "parent.yaml").exists():
        return None
    origin = read_yaml(folder / "parent.yaml")
    return Path(origin["run"]), origin["update"]


def ancestry(folder: Path, last: float) -> list[tuple[Path, float]]:
    """The runs from the first to this one, each with the update up to which it belongs to this history.

    last: of this run.
    """
    runs = [(folder, last)]
    while origin := origin_of(runs[0][0]):
        parent, update = origin
        if not (parent / "metrics.jsonl").exists():
            raise UserError(f"{runs[0][0] / 'parent.yaml'}: run: {parent} is not there")
        runs.insert(0, (parent, min(update, runs[0][1])))
    return runs


def history(folder: Path) -> str:
    """A line per update that led to what this run has deployed, the untouched model first.

    Scores compare below one heading, which names the test sets. Where a child has others than its parent, the
    model that it began with stands below both.
    """
    titles = f"{'update':>6} {'KA':>6} {'ZS':>6} {'steps':>8}  {'weights':16}"
    lines, newest, sets = [f"{titles}  run: what it taught (concepts)"], -1, {}
    for run, last in ancestry(folder, head_of(folder)):
        updates, tested = Run(run).stream()["updates"], scored_sets(constants_of(run))
        others = [name for name in {**sets, **tested} if not is_same_set(sets.get(name), tested.get(name))]
        for line in evaluations(run):
            number = line["update"]
            if not newest <= number <= last or (number == newest and not others):
                continue  # rolled back; or a child's first, which its parent has a line of
            if others:
                lines.append(heading(tested, [name for name in others if name in sets and name in tested]))
            what = "the same model, on these sets" if number == newest else taught(updates, number)
            scores = f"{number:6} {percent(line['ka']):>6} {percent(line['zs']):>6} {line['steps']:8,}"
            lines.append(f"{scores}  {weights_hash(run, number):16}  {run.name}: {what}")
            newest, sets, others = number, tested, []
    return "\n".join(lines)


def constants_of(run: Path) -> dict:
    """What run.json says; older runs have it in their first line."""
    return read_json(run / "run.json") or evaluations(run)[0]


def heading(sets: dict[str, tuple], changed: list[str]) -> str:
    """What the scores below it are means over. changed: sets that were others under the same names above."""
    of_role = {
        role: [n for n, found in sets.items() if found[0] == role] for role in ("adaptation", "evaluation")
    }
    ka, zs = (", ".join(names) or "no set" for names in of_role.values())
    return f"KA over {ka}; ZS over {zs}" + (f" (not as above: {', '.join(changed)})" if changed else "")


def taught(updates: list[list], number: int) -> str:
    if not number:
        return "the untouched model"
    sets = Counter(dataset for dataset, _, _ in updates[number - 1])
    return ", ".join(f"{name} ({count})" for name, count in sets.items())


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def weights_hash(folder: Path, update: int) -> str:
    path = weights_after(folder, update)
    return file_hash(path) if path.exists() else "not kept"


def roll_back(folder: Path, update: int) -> str:
    """Deploy an earlier update: `model/` holds it and `continue` starts from it. Nothing is deleted."""
    refuse_missing(folder)
    with lock(folder / "lock"):
        owner = owner_of(folder, update)
        try:
            refuse_missing(owner)
            state_after(owner, update)
            weights = weights_after(owner, update)
            if not weights.exists():
                raise UserError(f"{weights}: not kept, see evaluation.keep_weights")
        except UserError as error:
            if owner == folder:
                raise
            raise UserError(
                f"{folder}: update {update} is of {owner}, roll back that instead: {error}"
            ) from None
        for path in (weights, *kept_after(owner, update)):
            if not (folder / path.relative_to(owner)).exists():
                link_or_copy(path, folder / path.relative_to(owner))
        clip = load_model(None, str(Run(folder).model))
        clip.model.load_state_dict(load_file(weights))
        Run(folder).save_model(clip)
        write_atomically(folder / "state/head", json.dumps({"update": update}).encode())
    return f"{folder}: update {update} is deployed in {folder / 'model'}"


def owner_of(folder: Path, update: int) -> Path:
    """The run of this history that an update is of: those before a child's first are its parent's, or older."""
    while (origin := origin_of(folder)) and update <= origin[1] and not kept_after(folder, update):
        folder = origin[0]
    return folder


def compare(folder: Path, a: int, b: int) -> str:
    """The concepts whose accuracy changed most from update a to update b, both directions."""
    refuse_missing(folder)
    then, now = (concept_scores(folder, update) for update in (a, b))
    changes = sorted((now[key] - then[key], key) for key in then.keys() & now.keys())
    if not changes:
        raise UserError(f"{folder}: updates {a} and {b} were not scored on any common concept")
    better = [row for row in reversed(changes) if row[0] > 0]
    worse = [row for row in changes if row[0] < 0]
    got = f"{len(better)} got better and {len(worse)} worse from update {a} to {b}"
    lines = [f"of {plural(len(changes), 'concept')} {got}"]
    for title, rows in (("better", better), ("worse", worse)):
        lines += ["", f"{title}, of {len(rows)}:"] if rows else []
        for change, (dataset, concept) in rows[:SHOWN]:
            key = (dataset, concept)
            lines.append(f"{change:+7.1f}  {then[key]:5.1f} -> {now[key]:5.1f}  {dataset}: {concept}")
    return "\n".join(lines)


def concept_scores(folder: Path, update: int) -> dict[tuple[str, str], float]:
    """(dataset, class name) -> percent, from the run of this history that scored the update last.

    Also of an update that was rolled back.
    """
    scored = set()
    for run, last in reversed(ancestry(folder, math.inf)):
        for line in Run(run).lines("concepts.jsonl"):
            if line["update"] == update and update <= last:
                classes = constants_of(run)["classes"]
                return {
                    (dataset, name): score
                    for dataset, scores in line["datasets"].items()
                    for name, score in zip(classes[dataset], scores, strict=True)
                    if score is not None
                }
            scored |= {line["update"]} if line["update"] <= last else set()
    known = ", ".join(map(str, sorted(scored))) or "none"
    raise UserError(f"{folder}: update {update} was not scored, scored: {known}")
