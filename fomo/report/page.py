"""Reports: what runs learned and what they retained, as one HTML page, and as files for slides and spreadsheets.

    read_run(folder) -> group_runs -> Group -> Plot, Table -> FILE.html, plane.png; FILE_files/*.png, .svg, .csv

Runs of one recipe that differ only in the seed are drawn as one curve: their mean, with the sample standard
deviation as spread. The page embeds its figures as SVG and fetches nothing; the same input gives the same bytes.

Shapes: R runs of a group, U updates that all of them have reached.
"""

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from fomo.atomic import write_atomically
from fomo.errors import UserError
from fomo.report.classes import classes_table, confusions_table, examples, not_shown, taken
from fomo.report.columns import Columns, Values, as_csv, as_rows, folded, number
from fomo.report.common_sets import comparable
from fomo.report.figures import (
    SCORES,
    Training,
    budget_figure,
    choice_figure,
    datasets_figure,
    periods_figure,
    plane_figure,
    render,
    scores_figure,
    stream_figure,
    training_figure,
    worth_figure,
)
from fomo.report.run_records import Group, group_runs, read_run
from fomo.report.worth import in_choice, verdict, worth_table
from fomo.text import plural

SCORED = "the test samples scored during the run"  # a subset, unless the recipe or small sets say otherwise
COSTS = {  # name in metrics.jsonl -> (title, unit, format)
    "steps": ("steps", 1, ",.0f"),
    "samples": ("samples", 1, ",.0f"),
    "gflops": ("GFLOPs", 1, ",.0f"),
    "mafs": ("MAFs", 1, ",.0f"),
    "seconds": ("seconds", 1, ",.0f"),
    "peak_memory": ("peak GiB", 2**30, ".2f"),
}
SUMMARY = (
    "Percent after the last update, and the change from the model that a run began with; mean ± standard "
    "deviation over runs. On whole test sets where all ends were scored on them, else on the subset scored during "
    "the run."
)
WORTH = "Interpolations between the weights of the last update before any merge (0) and those before it (1)."
PERIODS = (
    "KA on the test pictures of each period after each update; framed is the period that it taught, left of it "
    "those before, right of it those to come. Update 0: the untouched model."
)
TRANSFER = (
    "Forward: what concepts not yet taught gained; backward: how those taught have changed since; forgetting: "
    "their loss against their best. Drift: mean cosine between an image's features now and at first (1: none)."
)

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)

# --- the page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A white box of a page, see page.html."""

    title: str
    note: str = ""
    lead: str = ""  # what comes first, a sentence
    command: str = ""  # that follows from it
    tiles: Sequence[tuple[str, str, str]] = ()  # (what, its values, their change)
    figures: Sequence[Markup] = ()
    tables: Sequence[list[list[str]]] = ()  # rows of cells, the first is the head
    pictures: Sequence[tuple[str, list[tuple[str, str]]]] = ()  # (heading, [(URI of a picture, what it is)])
    folded: str = ""  # a text that is shown when asked for

    def card(self) -> "Card":
        return self

    def files(self) -> dict[str, bytes]:
        return {}


def html_page(title: str, rows: list[list[Card]], *, prose: bool = False) -> bytes:
    """A page of cards, those of a row beside each other; `prose`: the cells of tables are sentences."""
    return TEMPLATES.get_template("page.html").render(title=title, rows=rows, prose=prose).encode()


def picture(draw: Callable[[Any], Figure], what: Any, title: str, salt: str = "") -> Markup:
    """A figure as part of a page."""
    return inline(render(draw, what, "svg", salt), title)


def inline(svg: bytes, title: str) -> Markup:
    """An SVG file without the XML header, which HTML does not have, and without ids that repeat in each figure.

    title: what a screen reader says instead.
    """
    text = svg.decode()
    head, body = text[text.index("<svg") :].split(">", 1)
    body = re.sub(r'(<\w+) id="[\w.]+_\d+"', r"\1", body)
    return Markup(f'{head} role="img"><title>{escape(title)}</title>{body}')


@dataclass(frozen=True)
class Plot:
    """A figure with its place on the page and its files."""

    name: str  # of its files; unique on the page
    title: str
    draw: Callable[[Any], Figure]
    what: Any
    note: str = ""

    @cached_property
    def svg(self) -> bytes:
        return render(self.draw, self.what, "svg", self.name)

    @cached_property
    def png(self) -> bytes:
        return render(self.draw, self.what, "png")

    def card(self) -> Card:
        return Card(self.title, self.note, figures=[inline(self.svg, self.title)])

    def files(self) -> dict[str, bytes]:
        return {f"{self.name}.svg": self.svg, f"{self.name}.png": self.png}


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    columns: Columns
    note: str = ""
    ends: int | None = None  # the page has so many rows from either end, the file all

    def card(self) -> Card:
        rows = as_rows(self.columns)
        return Card(self.title, self.note, tables=[folded(rows, self.ends) if self.ends else rows])

    def files(self) -> dict[str, bytes]:
        return {f"{self.name}.csv": as_csv(self.columns).encode()}


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of the runs, and plane.png beside it if there is a plane; return the report's path.

    With `out`, its figures and tables are files in a folder beside it, too.
    """
    once = {Path(folder).resolve(): folder for folder in folders}  # a run named twice would hide the spread
    groups = group_runs([read_run(folder) for folder in once.values()])
    compared, left_out = comparable(groups)
    if left_out:
        print(left_out, file=sys.stderr)
    overview = compare(compared, left_out)
    if len(groups) == 1:
        (group,) = groups
        rows = [[headline(group)], worth_of(group, ""), overview]
        rows += [classes_of(group, ""), *details_of(group, "")]
    else:
        note = f"{SUMMARY} {left_out}".strip()
        rows = [[Table("summary", "Before and after", summary_table(compared), note)], overview]
    for i, group in enumerate(groups if len(groups) > 1 else [], 1):
        prefix = f"{i}-{re.sub('[^0-9A-Za-z]+', '-', group.label).strip('-')}-"
        lead, command = verdict(group)
        rows += [[Card(group.label, lead=lead, command=command)]] if lead else []
        rows += [worth_of(group, prefix), classes_of(group, prefix), *details_of(group, prefix)]
    page = Path(out) if out else Path(folders[0]) / "report.html"
    title = ", ".join(group.label for group in groups)
    write(page, html_page(title, [[part.card() for part in row] for row in rows if row]))
    for plane in [part for part in overview if part.name == "plane"]:
        write(page.with_name("plane.png"), plane.png)
    for part in itertools.chain(*rows) if out else []:
        for name, content in part.files().items():
            write(page.with_name(f"{page.stem}_files") / name, content)
    return page


def write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def compare(groups: list[Group], left_out: str = "") -> list[Plot]:
    """All groups in one plane, and their scores. One that learned at once what others do in turn bounds them.

    Of one update nothing is drawn that its two numbers do not say.
    """
    longer = [group.taught for group in groups if group.planned > 1]
    curves = [
        group.curve(joint=group.planned == group.updates[-1] == 1 and group.taught in longer)
        for group in groups
    ]
    within = any(len(curve.within.positions) for curve in curves)
    small = ", small ones within updates" if within else ""
    note = f"One point per update{small}, on {SCORED}. {left_out}".strip()
    plots = []
    if len({point for curve in curves for point in curve.points}) > 1:
        plots.append(Plot("plane", "Learned (up) against kept (right)", plane_figure, curves, note))
    if any(curve.known and (len(curve.updates) > 2 or within) for curve in curves):
        plots.append(Plot("scores", "Scores over updates", scores_figure, curves, note))
    return plots


def worth_of(group: Group, prefix: str) -> list[Plot | Table]:
    """What else could have been done: the curve, and the table beside it."""
    curve, title = group.keep_curve(), f"{group.label}: was the last update worth it?"
    chosen = [choice_of(group, prefix)] if group.choice else []
    if curve is None:
        return chosen
    rows = [{"keep": keep, **{k: v.mean() for k, v in scores.items()}} for keep, scores in curve.items()]
    plot = Plot(prefix + "worth", title, worth_figure, (rows, group.deployed_keep), WORTH)
    return [plot, Table(prefix + "worth", title, worth_table(group), f"Percent, on {SCORED}."), *chosen]


def choice_of(group: Group, prefix: str) -> Plot:
    """How the last update was chosen."""
    choice, name = group.choice, group.records[0].name
    note = f"{name}: {in_choice(choice)}. GM of KA and ZS on validation pictures, which no other score is of."
    return Plot(f"{prefix}choice", f"{group.label}: what was chosen", choice_figure, choice, note)


def classes_of(group: Group, prefix: str) -> list[Table | Card]:
    """What became of the classes; confusions of the first run, and pictures where it is alone on the page."""
    first, row = group.records[0], []
    note = f"Percent of the n pictures of a class among {SCORED}. {not_shown(first)}".strip()
    if classes := classes_table(group):
        row.append(Table(prefix + "classes", f"{group.label}: classes", classes, note, ends=20))
    pictures = taken(first)
    shown, missing = examples(first, [] if prefix else pictures)
    if shown:
        note = "What a picture shows, and what it was taken for before or is taken for now."
        title = f"{first.name}: pictures that were won and lost"
        row.append(Card(title, f"{note} {missing}".strip(), pictures=shown))
    if confusions := confusions_table(pictures):
        title, note = f"{first.name}: confusions that grew most", "Numbers of test pictures before and after."
        row.append(Table(prefix + "confusions", title, confusions, note))
    return row


def details_of(group: Group, prefix: str) -> list[list[Plot | Table | Card]]:
    """A row of figures, a row for each table, and the recipe."""
    tables = [[table] for table in tables_of(group, prefix)]
    return [plots_of(group, prefix), *tables, [recipe_of(group)]]


def plots_of(group: Group, prefix: str) -> list[Plot]:
    """One recipe's datasets, training, stream and budget, as far as the runs say them and there are several."""
    first, found, several = group.records[0], [], len(group.updates) > 2
    changes = [(name, role, np.diff(scores).mean()) for name, role, scores in group.datasets()]
    if len(group.updates) > 1 and len(changes) > 1:
        found.append(("changes", "change per dataset", datasets_figure, changes, before_and_after(group)))
    runs = [record.training for record in group.records if record.training]
    if runs:
        training = Training(group.rate_curve(), runs)
        found.append(("training", "learning rate and loss", training_figure, training))
    stream = first.constants.get("stream") or []
    if len(stream) > 1:
        note = f"The order of {first.name}." if len(group.records) > 1 else ""
        found.append(("stream", "which dataset feeds which update", stream_figure, stream, note))
    if periods := group.periods():
        found.append(("periods", "what each update knows of each period", periods_figure, periods, PERIODS))
    if several and (spent := group.spent()):
        found.append(("budget", "what each update spent", budget_figure, spent))
    return [Plot(prefix + name, f"{group.label}: {title}", *rest) for name, title, *rest in found]


def tables_of(group: Group, prefix: str) -> list[Table]:
    scored, note = f"Percent, on {SCORED}.", before_and_after(group)
    found = [
        ("updates", "updates", updates_table(group), scored),
        ("transfer", "transfer and drift", transfer_table(group), f"{scored} {TRANSFER}"),
        ("costs", "spent so far", costs_table(group), ""),
        ("datasets", "datasets", datasets_table(group), note),
        ("measures", "datasets, further measures", measures_table(group), note),
    ]
    return [
        Table(prefix + name, f"{group.label}: {title}", columns, note)
        for name, title, columns, note in found
        if any(isinstance(column, Values) and column.known for column in columns.values())
    ]


def headline(group: Group) -> Card:
    """Whether it was worth it; KA, ZS and GM, if known, before and after; and how far the run has got."""
    tiles = []
    for key, title in SCORES.items():
        before, after = group.ends(key).T
        if not np.isfinite([before, after]).any():
            continue
        values, change = f"{number(before)} → {number(after)}", number(after - before, "+.1f")
        tiles.append((f"{title} ({key.upper()})", values, change))
    done, planned = group.updates[-1], group.planned
    progress = f"after {done} of {plural(planned, 'update')}" + ("" if done == planned else ", unfinished")
    note = f"Percent on {test_sets(group)}, {progress}."
    words = {key.upper(): group.words(key) for key in ("ka", "zs")}
    note += "".join(f" {score}: {of}." for score, of in words.items() if of)
    if len(group.records) > 1:
        note += f" Mean ± standard deviation of {group.names}."
    lead, command = verdict(group)
    return Card(group.label, note, lead=lead, command=command, tiles=tiles)


def summary_table(groups: list[Group]) -> Columns:
    """A row per recipe."""
    columns: dict[str, Any] = {"recipe": [group.label for group in groups]}
    for key in SCORES:
        ends = [group.ends(key) for group in groups]
        columns[key.upper()] = Values([of_runs[:, 1] for of_runs in ends])
        columns[f"change of {key.upper()}"] = Values(
            [of_runs[:, 1] - of_runs[:, 0] for of_runs in ends], "+.1f"
        )
    columns["updates"] = [f"{group.updates[-1]} of {group.planned}" for group in groups]
    columns["test sets"] = ["whole" if group.whole else "subset" for group in groups]
    return columns


def recipe_of(group: Group) -> Card:
    return Card(f"{group.label}: recipe of {group.names}", folded=group.records[0].recipe_text)


def test_sets(group: Group) -> str:
    return "the whole test sets" if group.whole else SCORED


def before_and_after(group: Group) -> str:
    first = group.updates[0]
    start = f"its parent's model (update {first})" if first else "the untouched model"
    return f"From {start} to the last update, percent, on {test_sets(group)}."


def updates_table(group: Group) -> Columns:
    """A row per update: means over datasets, and over concepts (where a set of many classes weighs more)."""
    means = {key.upper(): Values(group.values(key).T) for key in SCORES}
    by_concept = {
        f"{key.upper()} by concept": Values(group.values("concept_means", key).T) for key in ("ka", "zs")
    }
    return {"update": [str(update) for update in group.updates], **means, **by_concept}


def transfer_table(group: Group) -> Columns:
    """A row per update: what the updates did to what was taught before and after them."""
    kinds = {kind: Values(group.values("transfer", kind).T, "+.1f") for kind in ("forward", "backward")}
    mtil = {kind: Values(group.values("mtil", kind).T) for kind in ("transfer", "average", "last")}
    tic = {kind: Values(group.values("tic", kind).T) for kind in ("in_domain", "backward", "forward")}
    return {
        "update": [str(update) for update in group.updates],
        **kinds,
        "forgetting": Values(group.values("transfer", "forgetting").T),
        "drift": Values(group.values("drift").T, ".3f"),
        **{f"MTIL {kind}": v for kind, v in mtil.items() if v.known and group.planned > 1},
        **{f"TiC-CLIP {kind.replace('_', '-')}": v for kind, v in tic.items() if v.known},
    }


def costs_table(group: Group) -> Columns:
    """A row per update: what the run has cost so far, and what it might have; of several runs the mean."""
    columns: dict[str, Any] = {"update": [str(update) for update in group.updates]}
    for key, (title, unit, form) in COSTS.items():
        allowed = group.allowed(key) * group.updates
        columns[title] = Values(group.values(key).mean(axis=0)[:, None] / unit, form)
        columns[f"{title} allowed"] = Values(allowed.mean(axis=0)[:, None], form)
    return columns


def datasets_table(group: Group) -> Columns:
    """A row per dataset; the standard error is that of sampling test pictures, which a seed does not change."""
    names, roles, scores = zip(*group.datasets(), strict=True)
    both = np.stack(scores)  # (datasets, R, 2)
    stderr = np.array([[group.ends("stderr", name)[:, 1].mean()] for name in names])
    return {
        "dataset": names,
        "role": roles,
        "before": Values(both[..., 0]),
        "after": Values(both[..., 1]),
        "stderr of after": Values(stderr),
        "change": Values(both[..., 1] - both[..., 0], "+.1f"),
        "recall@1 after": Values([group.ends("details", name, "recall@1")[:, 1] for name in names]),
    }


def measures_table(group: Group) -> Columns:
    """A row per dataset: what else was measured after the last update; datasets differ in what that is."""
    names = [name for name, _, _ in group.datasets()]
    details = group.lines[0][-1].get("details") or {}
    measures = dict.fromkeys(measure for name in names for measure in details.get(name, {}))
    after = {m: [group.ends("details", name, m)[:, 1] for name in names] for m in measures}
    return {"dataset": names, **{m.replace("_", " "): Values(np.array(rows)) for m, rows in after.items()}}


def report_run(folder: Path) -> str:
    """Write the report of a run; -> what came of it: the scores in words, what is better, the model, the page."""
    page = write_report([folder])
    (group,) = group_runs([read_run(folder)])
    first, *_, last = group.lines[0]
    updates = plural(last["update"] - first["update"], "update")
    changes = []
    for key in [key for key in ("ka", "zs") if first[key] is not None]:
        change = f"{key.upper()} {first[key]:.1f} -> {last[key]:.1f} in {updates}"
        changes.append(": ".join(filter(None, [change, group.words(key)])))
    changes = changes or [f"no scores in {updates}"]
    sentence, command = verdict(group)
    lines = [*changes, sentence, command and f"  {command}", f"model: {folder / 'model'}", f"report: {page}"]
    return "\n".join(filter(None, lines))
