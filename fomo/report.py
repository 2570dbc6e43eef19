"""Reports: what runs learned and what they kept, as one HTML page and one picture.

    read_run(folder) -> Record -> group_runs -> Group -> tables, and figures.py -> report.html, plane.png

Runs of one recipe that differ only in the seed form a group, drawn as one curve: their mean, with the sample
standard deviation as spread. Runs may be unfinished: what is there is shown. The page embeds its figures as
SVG and fetches nothing; the same input gives the same bytes.

Shapes: R runs of a group, U updates that all of them have reached.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fomo.errors import UserError
from fomo.fields import read_yaml
from fomo.figures import (
    SCORES,
    Curve,
    datasets_figure,
    plane_figure,
    render,
    scores_figure,
    training_figure,
)
from fomo.files import write_atomically

SCORED = "the test samples scored during the run"  # a subset, unless the recipe or small sets say otherwise
COSTS = {  # name in metrics.jsonl -> (title, unit, format)
    "drift": ("drift", 1, ".3f"),
    "steps": ("steps", 1, ",.0f"),
    "samples": ("samples", 1, ",.0f"),
    "gflops": ("GFLOPs", 1, ",.0f"),
    "mafs": ("MAFs", 1, ",.0f"),
    "seconds": ("seconds", 1, ",.0f"),
    "peak_memory": ("peak GiB", 2**30, ".2f"),
}
UNKNOWN = "n/a"

CSS = """
body { margin: 0; background: #F3F3F0; color: #222; font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 8px 16px; overflow-wrap: anywhere; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.card { background: #FFF; color: #222; border: 1px solid #DDD; border-radius: 8px; padding: 12px; }
.card, .grid { margin: 16px 0; } .grid .card { margin: 0; min-width: 0; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 40px; } .tiles b { display: block; font-size: 1.4rem; }
.quiet { color: #666; font-size: .875rem; margin: .5rem 0 0; }
svg { display: block; width: 100%; max-width: 560px; height: auto; }
svg text { font-family: system-ui, "Segoe UI", Roboto, sans-serif !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .875rem; }
td, th { padding: 3px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid #EEE; }
td:first-child, th:first-child { text-align: left; }
pre { overflow-x: auto; font-size: .8rem; } summary { cursor: pointer; font-weight: 600; }
@media (prefers-color-scheme: dark) { body { background: #17191C; color: #EEE; } }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><main><h1>What was learned, what was kept</h1>
{body}
</main></body></html>
"""


# --- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a run folder says, as far as the run has got."""

    name: str
    recipe: dict
    recipe_text: str
    evaluations: dict[int, dict]  # update -> its line of metrics.jsonl; update 0 is the untouched model
    training: list[dict]  # lines of train.jsonl


def read_run(folder: Path) -> Record:
    """Read what a report needs of a run folder."""
    folder = Path(folder)
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, the run has not been evaluated yet")
    training = folder / "train.jsonl"
    return Record(
        name=folder.resolve().name,  # resolved, because the name of "." is empty
        recipe=read_yaml(folder / "recipe.yaml"),
        recipe_text=read_text(folder / "recipe.yaml"),
        evaluations={line["update"]: line for line in lines},
        training=read_lines(training) if training.exists() else [],
    )


def read_lines(path: Path) -> list[dict]:
    """Parse a file of JSON lines; a last line that is still being written is left out."""
    lines = read_text(path).splitlines()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON: {error}") from None
    return parsed


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the folder of a run") from None


# --- runs that differ only in the seed -------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in the seed."""

    label: str
    records: list[Record]

    @property
    def updates(self) -> list[int]:
        """The updates that every run has reached: a mean over changing runs would jump."""
        return sorted(set.intersection(*(set(record.evaluations) for record in self.records)))

    @property
    def lines(self) -> list[list[dict]]:
        """The evaluations after these updates, (R, U)."""
        return [[record.evaluations[update] for update in self.updates] for record in self.records]

    def values(self, key: str) -> np.ndarray:
        """One score or cost over the updates, (R, U); NaN where a run does not have it."""
        return np.array([[line.get(key) for line in of_run] for of_run in self.lines], dtype=float)

    def curve(self) -> Curve:
        values = {key: self.values(key) for key in SCORES}
        return Curve(
            label=self.label,
            updates=self.updates,
            mean={key: scores.mean(axis=0) for key, scores in values.items()},
            spread={key: deviation(scores) for key, scores in values.items()},
            frozen=self.frozen(),
        )

    def frozen(self) -> np.ndarray | None:
        """KA of the frozen baseline at each of the group's updates, mean over runs."""
        known = [of_run[0].get("frozen") for of_run in self.lines]
        if not all(known):
            return None
        return np.array([[of_run[update] for update in self.updates] for of_run in known]).mean(axis=0)

    @property
    def whole(self) -> bool:
        """Whether the first and the last scores exist for the whole test sets, beside the subset's."""
        return all(of_run[i].get("full") for of_run in self.lines for i in (0, -1))

    def ends(self, key: str, dataset: str | None = None) -> np.ndarray:
        """The first and the last value of each run, (R, 2); under some keys there is one for each dataset."""
        pairs = [[of_run[0], of_run[-1]] for of_run in self.lines]
        if self.whole:
            pairs = [[line["full"] for line in pair] for pair in pairs]
        found = [[line.get(key) for line in pair] for pair in pairs]
        if dataset is not None:
            found = [[(values or {}).get(dataset) for values in pair] for pair in found]
        return np.array(found, dtype=float)

    def datasets(self) -> list[tuple[str, str, np.ndarray]]:
        """(name, role, scores before and after (R, 2)), from the largest gain to the largest loss."""
        roles = self.records[0].evaluations[0]["roles"]
        rows = [(name, role, self.ends("datasets", name)) for name, role in roles.items()]
        return sorted(rows, key=lambda row: -np.diff(row[2]).mean())


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


def deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over runs, (R, ...) -> (...); a single run has no spread."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


# --- the page --------------------------------------------------------------------------------------------


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of the runs, and plane.png beside it; return the report's path."""
    once = {Path(folder).resolve(): folder for folder in folders}  # a run named twice would hide the spread
    groups = group_runs([read_run(folder) for folder in once.values()])
    curves = [group.curve() for group in groups]
    note = f"One point per update, on {SCORED}."
    overview = card("Learned (up) against kept (right)", picture(plane_figure, curves), note)
    overview += card("Scores over updates", picture(scores_figure, curves), note)
    body = [headline(group) for group in groups] + [f'<div class="grid">{overview}</div>']
    body += [details(group) for group in groups]
    title = escape(", ".join(group.label for group in groups))
    out = Path(out) if out else Path(folders[0]) / "report.html"
    write(out, PAGE.format(css=CSS, title=title, body="\n".join(body)).encode())
    write(out.with_name("plane.png"), render(plane_figure, curves, "png"))
    return out


def write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def headline(group: Group) -> str:
    """KA, ZS and GM before and after, and how far the run has got."""
    tiles = ""
    for key, title in SCORES.items():
        before, after = group.ends(key).T
        tile = f"<b>{number(before)} → {number(after)}</b>{number(after - before, '+.1f')}"
        tiles += f"<div>{title} ({key.upper()}){tile}</div>"
    done, planned = group.updates[-1], group.records[0].recipe["stream"]["updates"]
    progress = f"after {done} of {planned} updates" + ("" if done == planned else ", unfinished")
    note = f"Percent on {test_sets(group)}, {progress}."
    if len(group.records) > 1:
        note += " Mean ± standard deviation of " + ", ".join(record.name for record in group.records) + "."
    return card(group.label, f'<div class="tiles">{tiles}</div>', note)


def details(group: Group) -> str:
    """What concerns one recipe: its datasets, its training, the tables, the recipe itself."""
    label, first = group.label, group.records[0]
    note = f"From the untouched model to the last update, percent, on {test_sets(group)}."
    pictures = ""
    if len(group.updates) > 1:
        changes = [(name, role, np.diff(scores).mean()) for name, role, scores in group.datasets()]
        pictures += card(f"{label}: change per dataset", picture(datasets_figure, changes, salt=label), note)
    training = [record.training for record in group.records if record.training]
    if training:
        pictures += card(f"{label}: learning rate and loss", picture(training_figure, training, salt=label))
    tables = card(f"{label}: updates", updates_table(group), f"Percent, on {SCORED}.")
    tables += card(f"{label}: datasets", datasets_table(group), note)
    recipe = f"<summary>{escape(label)}: recipe</summary><pre>{escape(first.recipe_text)}</pre>"
    return f'<div class="grid">{pictures}</div>{tables}<details class="card">{recipe}</details>'


def test_sets(group: Group) -> str:
    return "the whole test sets" if group.whole else SCORED


def updates_table(group: Group) -> str:
    """A row per update: the scores, and what they cost, as a mean without its spread."""
    columns = {"update": [str(update) for update in group.updates]}
    for key in SCORES:
        columns[key.upper()] = [number(of_runs) for of_runs in group.values(key).T]
    for key, (title, unit, form) in COSTS.items():
        columns[title] = [number(of_runs.mean() / unit, form) for of_runs in group.values(key).T]
    return table(columns)


def datasets_table(group: Group) -> str:
    """A row per dataset; the standard error is that of sampling test pictures, which a seed does not change."""
    names, roles, scores = zip(*group.datasets(), strict=True)
    stderr = [group.ends("stderr", name)[:, 1].mean() for name in names]
    columns = {
        "dataset": names,
        "role": roles,
        "before": [number(of_runs[:, 0]) for of_runs in scores],
        "after": [number(of_runs[:, 1]) for of_runs in scores],
        "stderr of after": [number(error) for error in stderr],
        "change": [number(np.diff(of_runs)[:, 0], "+.1f") for of_runs in scores],
    }
    return table(columns)


def number(of_runs: np.ndarray | float, form: str = ".1f") -> str:
    """The mean over runs (R,), with the spread if there are several; n/a where a run has no value."""
    values = np.atleast_1d(of_runs)
    if not np.isfinite(values).all():
        return UNKNOWN
    text = f"{values.mean():{form}}"
    return f"{text} ± {deviation(values):{form.lstrip('+')}}" if len(values) > 1 else text


def table(columns: dict[str, Sequence[str]]) -> str:
    """Columns under their titles, without those of which nothing is known."""
    known = {title: cells for title, cells in columns.items() if set(cells) != {UNKNOWN}}
    head = "".join(f"<th>{escape(title)}</th>" for title in known)
    rows = zip(*known.values(), strict=True)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def card(title: str, content: str, note: str = "") -> str:
    """A white box; `content` is HTML, title and note are text."""
    note = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>\n{content}{note}</section>\n'


def picture(draw: Callable[[Any], Figure], what: Any, salt: str = "") -> str:
    """A figure as inline SVG, without the XML header, which HTML does not have."""
    svg = render(draw, what, "svg", salt).decode()
    return re.sub('<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])  # ids of groups repeat in each figure
