"""What run folders say, for reports: runs of one recipe that differ only in the seed are a group.

    read_run(folder) -> Record -> group_runs -> Group

Runs may be unfinished: what is there is read.

Shapes: R runs of a group, U updates that all of them have reached.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fomo.errors import UserError
from fomo.eval.meaning import in_words
from fomo.eval.transfer import row_of_sets
from fomo.report.columns import deviation
from fomo.report.figures import SCORES, Curve, Periods, Within
from fomo.runs.logs import read_lines, read_text, refuse_missing
from fomo.schedules import RateCurve, Schedule
from fomo.schema import build, read_yaml

SCORE_OF = {"ka": "adaptation", "zs": "evaluation"}  # the role of the sets that a score is the mean over
LIMITS = {"mafs": "MAFs", "seconds": "seconds", "steps": "steps"}  # of a budget, the strictest first


@dataclass(frozen=True)
class Record:
    """What a run folder says, as far as the run has got."""

    folder: Path  # as it was named
    recipe: dict
    recipe_text: str
    constants: dict  # "roles", "stream", "allowed"
    evaluations: dict[int, dict]  # update -> its line of metrics.jsonl; update 0 is the untouched model
    within: dict[tuple[int, int], dict]  # (updates, steps of the next one) that were done -> its line
    training: list[dict]  # lines of train.jsonl

    def by_class(self, update: int) -> dict[str, list[float | None]]:
        """dataset -> percent of each class after an update; nothing in older runs.

        A file has a line for each evaluation, of which some have a number for thousands of classes.
        """
        path = self.folder / "concepts.jsonl"
        lines = read_text(path).splitlines() if path.exists() else []
        place = list(self.evaluations).index(update)
        try:
            line = json.loads(lines[place]) if place < len(lines) else {}
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {place + 1} is not JSON: {error}") from None
        return line["datasets"] if line.get("update") == update else {}

    @property
    def name(self) -> str:
        return self.folder.resolve().name  # resolved, because the name of "." is empty


def read_run(folder: Path) -> Record:
    """Read what a report needs of a run folder."""
    folder = Path(folder)
    refuse_missing(folder)
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, the run has not been evaluated yet")
    training = folder / "train.jsonl"
    return Record(
        folder=folder,
        recipe=read_yaml(folder / "recipe.yaml"),
        recipe_text=read_text(folder / "recipe.yaml"),
        constants=read_constants(folder / "run.json", lines[0]),
        evaluations={line["update"]: line for line in lines if "step" not in line},
        within={(line["update"], line["step"]): line for line in lines if "step" in line},
        training=read_lines(training) if training.exists() else [],
    )


def read_constants(path: Path, first: dict) -> dict:
    """What is constant over a run; older runs have it in the first line of metrics.jsonl."""
    if not path.exists():
        return first
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


# --- runs that differ only in the seed -------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in the seed."""

    label: str
    records: list[Record]

    @property
    def names(self) -> str:
        return ", ".join(record.name for record in self.records)

    @property
    def updates(self) -> list[int]:
        """The updates that every run has reached: a mean over changing runs would jump."""
        return sorted(set.intersection(*(set(record.evaluations) for record in self.records)))

    @property
    def lines(self) -> list[list[dict]]:
        """The evaluations after these updates, (R, U)."""
        return [[record.evaluations[update] for update in self.updates] for record in self.records]

    def values(self, *path: str) -> np.ndarray:
        """One number of the evaluations' lines, by its key or path of keys, (R, U); NaN where there is none."""
        return np.array([[look_up(line, path) for line in of_run] for of_run in self.lines], dtype=float)

    def curve(self, joint: bool = False) -> Curve:
        values = {key: self.values(key) for key in SCORES}
        frozen = self.frozen()
        return Curve(
            label=f"joint upper bound: {self.label}" if joint else self.label,
            updates=self.updates,
            mean={key: scores.mean(axis=0) for key, scores in values.items()},
            spread={key: deviation(scores) for key, scores in values.items()},
            frozen=None if frozen is None else frozen.mean(axis=0),
            joint=joint,
            within=self.within(),
        )

    def within(self) -> Within:
        """The evaluations within updates that every run has, as far as every run's evaluations after them go."""
        common = set.intersection(*(set(record.within) for record in self.records))
        places = sorted(place for place in common if place[0] < self.updates[-1])
        lines = [[record.within[place] for place in places] for record in self.records]
        scores = {key: [[look_up(line, (key,)) for line in of_run] for of_run in lines] for key in SCORES}
        return Within(
            positions=np.array([update + step / self.steps for update, step in places]),
            mean={key: np.array(values, dtype=float).mean(axis=0) for key, values in scores.items()},
        )

    def frozen(self) -> np.ndarray | None:
        """KA of the frozen baseline at each of the group's updates, (R, U)."""
        known = [of_run[0].get("frozen") for of_run in self.lines]
        if not all(known):
            return None
        return np.array([[of_run[update] for update in self.updates] for of_run in known])

    def words(self, score: str) -> str:
        """What KA or ZS is the mean over; nothing in older runs, which do not say it."""
        constants = self.records[0].constants
        tasks, tested, role = constants.get("tasks"), constants.get("tested"), SCORE_OF[score]
        sets = [(n, tasks[n], tested[n]) for n, its in constants["roles"].items() if its == role and tested]
        return in_words(sets) if sets else ""

    @property
    def whole(self) -> bool:
        """Whether the first and the last scores exist for the whole test sets, beside the subset's."""
        return all(of_run[i].get("full") for of_run in self.lines for i in (0, -1))

    def ends(self, *path: str) -> np.ndarray:
        """The first and the last such number of each run, (R, 2), on the whole test sets if both are there."""
        whole = ("full",) if self.whole else ()
        ends = [[of_run[0], of_run[-1]] for of_run in self.lines]
        return np.array([[look_up(line, whole + path) for line in pair] for pair in ends], dtype=float)

    def datasets(self) -> list[tuple[str, str, np.ndarray]]:
        """(name, role, scores before and after (R, 2)), from the largest gain to the largest loss."""
        roles = self.records[0].constants["roles"]
        rows = [(name, role, self.ends("datasets", name)) for name, role in roles.items()]
        return sorted(rows, key=lambda row: -np.diff(row[2]).mean())

    def allowed(self, what: str) -> np.ndarray:
        """What each run's budget allows an update, (R, 1): "steps", "mafs", "seconds"; NaN if it is no limit."""
        constants = [record.constants for record in self.records]
        return np.array([[look_up(of_run, ("allowed", what))] for of_run in constants], dtype=float)

    def spent(self) -> tuple[str, list[int], np.ndarray] | None:
        """(unit, updates, percent of the allowed that was spent since the evaluation before), mean over runs."""
        for what, unit in LIMITS.items():
            allowed = np.diff(self.updates) * self.allowed(what)  # (R, U-1)
            shares = 100 * np.diff(self.values(what)) / allowed
            if shares.size and np.isfinite(shares).all():
                return unit, self.updates[1:], shares.mean(axis=0)
        return None

    def keep_curve(self) -> dict[float, dict[str, np.ndarray]] | None:
        """keep -> score -> (R,): between the weights tuned by the last update (0) and those before it (1)."""
        known = [of_run[-1].get("keeps") for of_run in self.lines]
        if not all(known):
            return None
        before = [{key: of_run[-2][key] for key in SCORES} for of_run in self.lines]
        curve = {row["keep"]: [of_run[i] for of_run in known] for i, row in enumerate(known[0])}
        points = sorted({**curve, 1.0: before}.items())
        return {
            keep: {key: np.array([row[key] for row in rows], float) for key in SCORES}
            for keep, rows in points
        }

    def periods(self) -> Periods | None:
        """The KA of each period after each update, mean over runs, where updates are periods of time."""
        first = self.records[0]
        stream = first.constants.get("stream")
        if not (stream and first.recipe["stream"].get("every")):
            return None
        scores = [[row_of_sets(line, stream).scores for line in of_run] for of_run in self.lines]
        names = [next(iter(sets)).rpartition("/")[2] for sets in stream]
        return Periods(names, self.updates, np.array(scores, dtype=float).mean(axis=0))

    @property
    def deployed_keep(self) -> float | None:
        """Where on that curve the deployed model is; None of a merge that is not on it."""
        method = self.records[0].recipe["method"]
        if method["name"] != "merge":
            return 0.0
        chosen = [of_run[-1].get("choice", {}).get("chosen", method) for of_run in self.lines]
        keep, *others = {row.get("keep") for row in chosen}
        return keep if self.interpolates and isinstance(keep, int | float) and not others else None

    @property
    def choice(self) -> dict | None:
        """What the first run chose in its last update on validation pictures, and all that was tried there."""
        return self.lines[0][-1].get("choice")

    @property
    def interpolates(self) -> bool:
        """Whether each update ends with the interpolation that `method.keep` is the share of."""
        usual = {"name": "merge", "rule": "interpolate", "first_ema": "merged"}
        usual |= dict.fromkeys(("init", "deploy", "partner"), "ema")
        method = self.records[0].recipe["method"]
        return all(method.get(field, value) == value for field, value in usual.items())

    @property
    def planned(self) -> int:
        """T, the number of updates."""
        return self.records[0].recipe["stream"]["updates"]

    @property
    def taught(self) -> Counter | None:
        """dataset -> concepts that the whole stream teaches; None in older runs."""
        stream = self.records[0].constants.get("stream")
        return sum(map(Counter, stream), Counter()) if stream else None

    @property
    def steps(self) -> int:
        """N of each update; as done, where the budget came to no number before training."""
        first = self.records[0]
        planned = look_up(first.constants, ("allowed", "steps"))
        return planned or 1 + max(line["step"] for line in first.training)

    def rate_curve(self) -> RateCurve:
        """The learning rate as planned."""
        recipe = self.records[0].recipe
        schedule = build(Schedule, recipe["schedule"], "schedule")
        return RateCurve(self.label, schedule, recipe["optimizer"]["lr"], self.planned, self.steps)


def look_up(line: dict, path: tuple[str, ...]) -> float | None:
    """What nested dicts have under a path of keys; older runs, and first updates, lack some."""
    value: Any = line
    for key in path:
        value = (value or {}).get(key)
    return value


def group_runs(records: Iterable[Record]) -> list[Group]:
    """Group runs by their recipe without the seed, in order of appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        recipe = {**record.recipe, "seed": None}
        groups.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(record)
    labels = [group_label([record.name for record in members]) for members in groups.values()]
    if len(set(labels)) < len(labels):  # other recipes in folders of the same name
        labels = [f"{label} #{i}" for i, label in enumerate(labels, start=1)]
    return [Group(label, members) for label, members in zip(labels, groups.values(), strict=True)]


def group_label(names: list[str]) -> str:
    """merge-s0, merge-s1, merge-s2 -> merge (3 runs)."""
    if len(names) == 1:
        return names[0]
    stems = {re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d+$", "", name) for name in names}
    return f"{stems.pop() if len(stems) == 1 else names[0]} ({len(names)} runs)"
