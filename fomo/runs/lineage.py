"""The history of a model over several runs: the first update, the next, what was, and the way back.

    start_run      the recipe and the folder of a first run
    continue_run   a child run that goes on from the update which its parent has deployed
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
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import yaml
from safetensors.torch import load_file

from fomo.atomic import staged_folder, write_atomically
from fomo.clip import load as load_model
from fomo.datasets import datafile
from fomo.datasets.datafile import DataFile, Entry
from fomo.datasets.infer import as_data_file, is_data_file, recipe_for
from fomo.datasets.stream import concepts_of
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.recipe import Recipe
from fomo.runs.folder import (
    Position,
    Run,
    file_hash,
    kept_updates,
    link_or_copy,
    lock,
    read_checkpoint,
    read_json,
    refuse_used,
    update_of,
)
from fomo.runs.logs import evaluations, read_lines
from fomo.schema import read_yaml

SHOWN = 12  # concepts of either kind in a comparison


def head_of(folder: Path) -> int:
    """The update that a finished run has deployed: its last, or what `rollback` said."""
    kept = kept_updates(folder / "state")
    if not kept:
        raise UserError(f"{folder}: no finished update; expected the folder of a run")
    if (folder / "state/head").exists():
        return json.loads((folder / "state/head").read_text())["update"]
    updates = len(Run(folder).stream()["updates"])
    done = update_of(kept[-1])
    if done < updates:
        raise UserError(f"{folder}: has finished {done} of {updates} updates; go on with --resume first")
    return done


def state_after(folder: Path, update: int) -> dict:
    """The checkpoint that keeps an update."""
    found = sorted((folder / "state").glob(f"update_{update:03d}-*.pt"))
    checkpoint = read_checkpoint(found[-1]) if found else None
    if checkpoint is None:
        kept = dict.fromkeys(map(update_of, kept_updates(folder / "state")))
        problem = "is damaged" if found else "is not kept"
        raise UserError(f"{folder}: update {update} {problem}, kept: {', '.join(map(str, kept)) or 'none'}")
    return checkpoint


# --- the first update ------------------------------------------------------------------------------------


def start_run(
    recipe_path: str | Path, data: str | None, out: str | None, resume: bool, dry_run: bool, **options
) -> tuple[Recipe, Path]:
    """The recipe and the run folder of `update`; for a folder of pictures, with a data file inferred into it.

    options: scale, model, seed, overrides, as load_recipe.load takes them. A dry run leaves nothing behind.
    """
    if data is None or is_data_file(data):
        recipe = load(recipe_path, data=data, **options)
        return recipe, Path(out) if out else default_folder(recipe_path, recipe, data)
    folder = Path(out) if out else Path("runs") / Path(data).resolve().stem
    place = folder
    if dry_run:
        place = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, place)
    refuse_used(place, resume)
    file = place / "data.yaml"
    if not (resume and file.exists()):  # else it may have been edited
        as_data_file(data, place)
    return load(recipe_path, data=str(file), fitted=recipe_for(file), **options), folder


def default_folder(recipe_path: str | Path, recipe: Recipe, data: str | None) -> Path:
    parts = [Path(recipe_path).stem, Path(recipe.scale).stem, *([Path(data).stem] if data else [])]
    return Path("runs") / "-".join([*parts, f"seed{recipe.seed}"])


# --- the next update -------------------------------------------------------------------------------------


def continue_run(parent: Path, data: str, out: str | None, skip_bad: bool = False) -> tuple[Recipe, Path]:
    """Make the child run that teaches `data` (a data file, or what infer.py takes) in one update.

    -> its recipe and folder, to be run with `resume`.
    """
    update = head_of(parent)
    checkpoint = state_after(parent, update)
    folder = Path(out) if out else child_folder(parent, update + 1)
    if folder.exists():
        raise UserError(f"--out {folder}: exists already")
    with staged_folder(folder) as staging:
        new = datafile.read(data if is_data_file(data) else as_data_file(data, staging), skip_bad)
        old = datafile.read(parent / "data.yaml")
        names = free_names(new.adaptation, {**old.adaptation, **old.evaluation})
        write_yaml(staging / "data.yaml", both_contents(old, new, names))
        record = Run(parent).stream()
        fresh = [[names[c.dataset], c.label, names.get(c.name, c.name)] for c in concepts_of(new)[0]]
        recipe = next_recipe(load(parent / "recipe.yaml"), folder, update + 1, len(record["updates"]))
        write_yaml(staging / "recipe.yaml", dataclasses.asdict(recipe))
        record["updates"] = [*record["updates"][:update], fresh]
        (staging / "stream.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        origin = {"run": str(parent.resolve()), "update": update, "weights": weights_hash(parent, update)}
        write_yaml(staging / "parent.yaml", origin)
        copy_state(parent, staging, checkpoint, update + 1)
    return recipe, folder


def child_folder(parent: Path, update: int) -> Path:
    """photos -> photos-update2, photos-update2-b, ...; photos-update2 -> photos-update3."""
    stem = re.sub(r"-update\d+(-[b-z])?$", "", parent.resolve().name)
    names = [
        f"{stem}-update{update}{suffix}" for suffix in ("", *(f"-{c}" for c in "bcdefghijklmnopqrstuvwxyz"))
    ]
    free = [name for name in names if not (parent.resolve().parent / name).exists()]
    if not free:
        raise UserError(f"{parent}: has {len(names)} children already; name the next with --out")
    return parent.resolve().parent / free[0]


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


def ancestry(folder: Path) -> list[tuple[Path, int]]:
    """The runs from the first to this one, each with the update up to which it belongs to this history."""
    runs = [(folder, head_of(folder))]
    while (runs[0][0] / "parent.yaml").exists():
        origin = read_yaml(runs[0][0] / "parent.yaml")
        parent = Path(origin["run"])
        if not (parent / "metrics.jsonl").exists():
            raise UserError(f"{runs[0][0] / 'parent.yaml'}: run: {parent} is not there")
        runs.insert(0, (parent, origin["update"]))
    return runs


def history(folder: Path) -> str:
    """A line per update that led to what this run has deployed, the untouched model first."""
    lines = [
        f"{'update':>6} {'KA':>6} {'ZS':>6} {'steps':>8}  {'weights':16}  run: what it taught (concepts)"
    ]
    newest = -1
    for run, last in ancestry(folder):
        updates = Run(run).stream()["updates"]
        for line in evaluations(run):
            number = line["update"]
            if not newest < number <= last:
                continue  # rolled back; or a child's first, which its parent has a line of
            newest = number
            sets = Counter(dataset for dataset, _, _ in updates[number - 1]) if number else {}
            taught = ", ".join(f"{name} ({count})" for name, count in sets.items()) or "the untouched model"
            scores = f"{number:6} {percent(line['ka']):>6} {percent(line['zs']):>6} {line['steps']:8,}"
            lines.append(f"{scores}  {weights_hash(run, number):16}  {run.name}: {taught}")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1f}"


def weights_hash(folder: Path, update: int) -> str:
    path = folder / f"weights/update_{update:03d}.safetensors"
    return file_hash(path) if path.exists() else "not kept"


def roll_back(folder: Path, update: int) -> str:
    """Deploy an earlier update: `model/` holds it and `continue` starts from it. Nothing is deleted."""
    with lock(folder / "lock"):
        state_after(folder, update)
        weights = folder / f"weights/update_{update:03d}.safetensors"
        if not weights.exists():
            raise UserError(f"{weights}: not kept, see evaluation.keep_weights")
        clip = load_model(None, str(Run(folder).model))
        clip.model.load_state_dict(load_file(weights))
        Run(folder).save_model(clip)
        write_atomically(folder / "state/head", json.dumps({"update": update}).encode())
    return f"{folder}: update {update} is deployed in {folder / 'model'}"


def compare(folder: Path, a: int, b: int) -> str:
    """The concepts whose accuracy changed most from update a to update b, both directions."""
    then, now = (concept_scores(folder, update) for update in (a, b))
    changes = sorted((now[key] - then[key], key) for key in then.keys() & now.keys())
    if not changes:
        raise UserError(f"{folder}: updates {a} and {b} were not scored on any common concept")
    better = [row for row in reversed(changes) if row[0] > 0]
    worse = [row for row in changes if row[0] < 0]
    lines = [
        f"of {len(changes)} concepts {len(better)} got better and {len(worse)} worse from update {a} to {b}"
    ]
    for title, rows in (("better", better), ("worse", worse)):
        lines += ["", f"{title}, of {len(rows)}:"] if rows else []
        for change, (dataset, concept) in rows[:SHOWN]:
            key = (dataset, concept)
            lines.append(f"{change:+7.1f}  {then[key]:5.1f} -> {now[key]:5.1f}  {dataset}: {concept}")
    return "\n".join(lines)


def concept_scores(folder: Path, update: int) -> dict[tuple[str, str], float]:
    """(dataset, class name) -> percent, from the run of this history that scored the update last."""
    for run, last in reversed(ancestry(folder)):
        for line in read_lines(run / "concepts.jsonl"):
            if line["update"] == update and update <= last:
                classes = read_json(run / "run.json")["classes"]
                return {
                    (dataset, name): score
                    for dataset, scores in line["datasets"].items()
                    for name, score in zip(classes[dataset], scores, strict=True)
                    if score is not None
                }
    raise UserError(f"{folder}: update {update} was not scored")
