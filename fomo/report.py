"""Reports: what runs learned and what they kept, as one HTML page and one picture.

    read_run(folder) -> Run -> group_runs -> Group -> figures and tables -> report.html, plane.png

Runs of one recipe that differ only in the seed form a group, drawn as one curve: their mean, with the sample
standard deviation as spread. Runs may be unfinished: what is there is shown. The page embeds its figures as
SVG and fetches nothing; the same input gives the same bytes.

Shapes: R runs of a group, U updates that all of them have reached.
"""

import io
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from itertools import pairwise, product
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from fomo.errors import UserError

SCORES = {"ka": "knowledge accumulation", "zs": "zero-shot retention", "gm": "geometric mean"}
SCORED = "the test samples scored during the run"  # a subset, unless the recipe or small sets say otherwise

# Dark enough to be read as text on white; markers and dashes tell groups apart without colour.
COLOURS = ["#004488", "#C2410C", "#117755", "#AA3377", "#7A6200", "#555555", "#2A78B0"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p"]
DASHES = ["-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5))]
ROLES = {"adaptation": "#004488", "evaluation": "#DDAA33"}  # dark and light: they differ in grayscale, too

WIDTH = 4.6  # inches, about a phone's width, so that 10 pt text is still readable there
STYLE = {
    "figure.facecolor": "white",  # an explicit card: the page behind it may be dark
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine measures text alike
    "font.size": 10,
    "text.parse_math": False,  # a dataset may be called "$x$"
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "svg.fonttype": "none",  # text stays text: small, searchable, in any script the reader's fonts have
}

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
class Run:
    """One run folder, as far as it has got."""

    name: str
    recipe: dict
    recipe_text: str
    evaluations: dict[int, dict]  # update -> its line of metrics.jsonl; update 0 is the untouched model
    training: list[dict]  # lines of train.jsonl


def read_run(folder: Path) -> Run:
    """Read what a report needs of a run folder."""
    folder = Path(folder)
    lines = read_lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'}: empty, the run has not been evaluated yet")
    training = folder / "train.jsonl"
    text = read_text(folder / "recipe.yaml")
    return Run(
        name=folder.resolve().name,  # resolved, because the name of "." is empty
        recipe=yaml.safe_load(text),
        recipe_text=text,
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
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the folder of a run") from None


# --- runs that differ only in the seed -------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Runs of one recipe that differ only in the seed."""

    label: str
    runs: list[Run]

    @property
    def updates(self) -> list[int]:
        """The updates that every run has reached: a mean over changing runs would jump."""
        return sorted(set.intersection(*(set(run.evaluations) for run in self.runs)))

    def values(self, key: str) -> np.ndarray:
        """One score over the updates, (R, U); NaN where a run does not have it."""
        lines = [[run.evaluations[update].get(key) for update in self.updates] for run in self.runs]
        return np.array(lines, dtype=float)

    @property
    def whole(self) -> bool:
        """Whether the first and the last scores exist for the whole test sets, beside the subset's."""
        ends = (run.evaluations[self.updates[i]] for run in self.runs for i in (0, -1))
        return all(line.get("full") for line in ends)

    def change(self, pick: Callable[[dict], float | None]) -> np.ndarray:
        """What `pick` finds in the first and in the last scores of each run, (R, 2)."""
        lines = [[run.evaluations[self.updates[i]] for i in (0, -1)] for run in self.runs]
        return np.array(
            [[pick(line["full"] if self.whole else line) for line in row] for row in lines], float
        )

    def datasets(self) -> list[tuple[str, str, np.ndarray]]:
        """(name, role, scores before and after (R, 2)), from the largest gain to the largest loss."""
        roles = self.runs[0].evaluations[0]["roles"].items()
        rows = [(name, role, self.change(lambda line, n=name: line["datasets"][n])) for name, role in roles]
        return sorted(rows, key=lambda row: -np.diff(row[2]).mean())


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group runs by their recipe without the seed, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        recipe = {**run.recipe, "seed": None}
        groups.setdefault(json.dumps(recipe, sort_keys=True, default=str), []).append(run)
    return [Group(group_label([run.name for run in members]), members) for members in groups.values()]


def group_label(names: list[str]) -> str:
    """merge-s0, merge-s1, merge-s2 -> merge (3 runs)."""
    if len(names) == 1:
        return names[0]
    stems = {re.sub(r"[-_. ]+(seed|s)?[-_. ]*\d+$", "", name) for name in names}
    return f"{stems.pop() if len(stems) == 1 else names[0]} ({len(names)} runs)"


def deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over runs, (R, ...) -> (...); a single run has no spread."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


# --- figures ---------------------------------------------------------------------------------------------


def plane_figure(groups: list[Group]) -> Figure:
    """The KA-ZS plane: from the untouched model (star) over one point per update to the last (large)."""
    figure, (axes,) = new_figure(height=4.0)
    axes.set(xlabel="zero-shot retention (ZS), %", ylabel="knowledge accumulation (KA), %")
    axes.margins(0.1)
    labels, stars, curves = [], {}, []
    for index, group in enumerate(groups):
        zs, ka = group.values("zs"), group.values("ka")
        curve = np.stack([zs.mean(axis=0), ka.mean(axis=0)], axis=1)  # (U, 2)
        if not np.isfinite(curve).all():
            axes.set_title(f"{shorten(group.label, 30)}: no KA or no ZS, not drawn")
            continue
        style = line_style(index, points=len(curve))
        axes.plot(*curve.T, **style)
        if len(curve) > 1:
            axes.errorbar(*curve[-1], deviation(ka)[-1], deviation(zs)[-1], ecolor=style["color"], fmt="none")
            axes.plot(*curve[-1], **{**style, "markersize": 8, "markeredgecolor": "white", "zorder": 4})
            labels.append((*curve[-1], shorten(group.label, 30), style["color"]))
        stars[tuple(curve[0].round(1))] = curve[0]  # runs with the same start share the star
        curves.append(curve)
        at_least(axes, curve[-1], span=2)
    for star in stars.values():
        axes.plot(*star, marker="*", markersize=14, color="black", markeredgecolor="white", zorder=5)
    labels += [(*star, "untouched model", "black") for star in list(stars.values())[:1]]
    label_inside(axes, labels, curves)
    return figure


def at_least(axes, point: np.ndarray, span: np.ndarray | float) -> None:
    """Let the axes span some points around the point (x, y): noise shall not fill the figure."""
    axes.update_datalim([point - span / 2, point + span / 2])
    axes.autoscale_view()


def label_inside(axes, labels: list[tuple], curves: list[np.ndarray]) -> None:
    """Label points (x, y, text, colour) where the text covers no other label and the least of the curves."""
    axes.figure.draw_without_rendering()  # settles the layout, so that positions in pixels are known
    segments = [np.linspace(a, b, 12) for curve in curves for a, b in pairwise(curve)]
    pixels = axes.transData.transform(np.concatenate([np.empty((0, 2)), *segments, *curves]))
    around = np.array([(0, 1), (1, 0), (-1, 0), (1, 1), (-1, 1), (0, -1), (1, -1), (-1, -1)])
    pt = axes.figure.dpi / 72  # pixels
    taken: list[Bbox] = []
    for x, y, text, colour in labels:
        style = {"textcoords": "offset points", "color": colour, "ha": "center", "va": "center"}
        note = axes.annotate(text, (x, y), (0, 0), **style)
        point, half = axes.transData.transform((x, y)), note.get_window_extent().size / 2
        note.remove()
        places = []
        for far, direction in product((8, 14, 22, 32, 44), around):
            middle = point + direction * (far * pt + half)
            box = Bbox([middle - half, middle + half])
            outside = (box.min < axes.bbox.min).any() or (box.max > axes.bbox.max).any()
            covered = ((pixels > box.min - 4) & (pixels < box.max + 4)).all(axis=1).sum()
            places.append((outside or any(map(box.overlaps, taken)), covered, far, box, middle))
        _, _, far, box, middle = min(places, key=lambda place: place[:3])
        taken.append(box)
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6} if far > 14 else None
        axes.annotate(text, (x, y), (middle - point) / pt, arrowprops=line, **style)


def scores_figure(groups: list[Group]) -> Figure:
    """KA, ZS and GM over the updates with a band of one standard deviation, labelled at the curves' ends."""
    known = [key for key in SCORES if any(np.isfinite(group.values(key)).any() for group in groups)]
    figure, panels = new_figure(height=0.4 + 1.7 * len(known), rows=len(known), sharex=True)
    for axes, key in zip(panels, known, strict=True):
        axes.set_title(f"{SCORES[key]} ({key.upper()}), %")
        axes.margins(x=0.03)
        labels = []
        for index, group in enumerate(groups):
            values, x = group.values(key), group.updates
            mean, spread = values.mean(axis=0), deviation(values)
            style = line_style(index, points=len(x))
            axes.plot(x, mean, **style)
            axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
            name = f"{shorten(group.label, 20)} " if len(groups) > 1 else ""
            labels.append((x[-1], mean[-1], f"{name}{mean[-1]:.1f}", style["color"]))
            at_least(axes, np.array([x[-1], mean[-1]]), span=np.array([0, 2]))
        label_beside(axes, [label for label in labels if np.isfinite(label[1])])
    panels[-1].set_xlabel("update (0: the untouched model)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def label_beside(axes, labels: list[tuple]) -> None:
    """Label points (x, y, text, colour) in a column at the right, moved apart where they are close."""
    labels = sorted(labels, key=lambda label: label[1])
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    gap = (high - low) * 12 / (axes.bbox.height * 72 / axes.figure.dpi)  # 12 pt in units of the data
    heights = [y for _, y, _, _ in labels]
    for i in range(1, len(heights)):  # up from the lowest ...
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # ... and back down, so that none rises above the panel
        heights[i] = min(heights[i], high - gap * (len(heights) - 1 - i))
    for (_, _, text, colour), y in zip(labels, heights, strict=True):
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
        axes.annotate(text, (1, y), (2, 0), color=colour, annotation_clip=False, **place)


def datasets_figure(group: Group) -> Figure:
    """The change of every dataset as a bar; adaptation sets above, evaluation sets below, each sorted."""
    rows = {role: [row for row in group.datasets() if row[1] == role] for role in ROLES}
    rows = {role: some for role, some in rows.items() if some}
    counts = [len(some) for some in rows.values()]
    height = 0.6 + 0.35 * len(rows) + 0.2 * sum(counts)
    figure, panels = new_figure(height, len(rows), sharex=True, height_ratios=counts)
    for axes, (role, some) in zip(panels, rows.items(), strict=True):
        changes = np.array([np.diff(scores).mean() for _, _, scores in some])
        axes.set_title(f"{role} sets, mean {changes.mean():+.1f}")
        bars = axes.barh(range(len(some)), changes, color=ROLES[role], edgecolor="#555555", linewidth=0.4)
        axes.bar_label(bars, fmt="{:+.1f}", padding=3, fontsize=9)
        axes.set_yticks(range(len(some)), [shorten(name, 24) for name, _, _ in some], fontsize=9)
        axes.set_ylim(len(some) - 0.4, -0.6)  # the largest gain on top
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.margins(x=0.2)  # room for the numbers at the bars' ends
        axes.tick_params(left=False)
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("change of the score, points")
    return figure


def training_figure(group: Group) -> Figure:
    """Learning rate and loss over the life, a line per run; update k is trained between k - 1 and k."""
    figure, panels = new_figure(height=3.4, rows=2, sharex=True)
    for axes, (key, title) in zip(panels, {"lr": "learning rate", "loss": "loss"}.items(), strict=True):
        axes.set_title(title)
        for run in group.runs:
            steps = 1 + max((line["step"] for line in run.training), default=0)
            x = [line["update"] - 1 + (line["step"] + 1) / steps for line in run.training]
            y = np.array([line.get(key) for line in run.training], dtype=float)
            axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=len(group.runs) ** -0.5)
    panels[-1].set_xlabel("update")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def new_figure(height: float, rows: int = 1, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure outside of pyplot's global state, and its axes, one above the other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **kwargs)[:, 0]


def line_style(index: int, points: int) -> dict:
    """How the curve of a group looks; small markers where a hundred updates crowd."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5 if points <= 30 else 1.5,
    }


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters; the middle goes, since names often differ at the end."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - length // 3 - 1]}…{text[-(length // 3) :]}"


def render(draw: Callable[..., Figure], what: Group | list[Group], suffix: str = ".svg") -> bytes:
    """Draw a figure in the report's style; return the bytes of a .png or .svg file."""
    if suffix not in (".png", ".svg"):
        raise UserError(f"figure format {suffix!r} is unknown; accepted: .png, .svg")
    # Ids within an SVG are hashes; the salt keeps those of the figures on one page apart.
    salt = f"{draw.__name__} {what.label if isinstance(what, Group) else ''}"
    undated = dict.fromkeys(["Date", "Creator", "Format", "Type"] if suffix == ".svg" else ["Software"])
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        # Emoji and scripts that DejaVu lacks are boxes in a PNG, but ordinary text in an SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        draw(what).savefig(buffer, format=suffix[1:], dpi=200, metadata=undated)
    return buffer.getvalue()


def plane(runs: list[Run], path: Path) -> None:
    """Draw the KA-ZS plane of the runs into a PNG or SVG file, by the suffix."""
    path = Path(path)
    write(path, render(plane_figure, group_runs(runs), path.suffix.lower()))


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


# --- the page --------------------------------------------------------------------------------------------


def write_report(folders: list[Path], out: Path | None = None) -> Path:
    """Write the report of the runs, and plane.png beside it; return the report's path."""
    runs = [read_run(folder) for folder in folders]
    groups = group_runs(runs)
    note = f"One point per update, on {SCORED}."
    overview = card("Learned (up) against kept (right)", picture(plane_figure, groups), note)
    overview += card("Scores over updates", picture(scores_figure, groups), note)
    body = [headline(group) for group in groups] + [f'<div class="grid">{overview}</div>']
    body += [details(group) for group in groups]
    title = escape(", ".join(group.label for group in groups))
    out = Path(out) if out else Path(folders[0]) / "report.html"
    write(out, PAGE.format(css=CSS, title=title, body="\n".join(body)).encode())
    plane(runs, out.with_name("plane.png"))
    return out


def headline(group: Group) -> str:
    """KA, ZS and GM before and after, and how far the run has got."""
    tiles = ""
    for key, title in SCORES.items():
        before, after = group.change(lambda line, key=key: line.get(key)).T
        tile = f"<b>{number(before)} → {number(after)}</b>{number(after - before, '+.1f')}"
        tiles += f"<div>{title} ({key.upper()}){tile}</div>"
    done, planned = group.updates[-1], group.runs[0].recipe["stream"]["updates"]
    progress = f"after {done} of {planned} updates" + ("" if done == planned else ", unfinished")
    note = f"Percent on {test_sets(group)}, {progress}."
    if len(group.runs) > 1:
        note += " Mean ± standard deviation of " + ", ".join(run.name for run in group.runs) + "."
    return card(group.label, f'<div class="tiles">{tiles}</div>', note)


def details(group: Group) -> str:
    """What concerns one recipe: its datasets, its training, the tables, the recipe itself."""
    note = f"From the untouched model to the last update, percent, on {test_sets(group)}."
    pictures = ""
    if len(group.updates) > 1:
        pictures += card(f"{group.label}: change per dataset", picture(datasets_figure, group), note)
    if any(run.training for run in group.runs):
        pictures += card(f"{group.label}: learning rate and loss", picture(training_figure, group))
    tables = card(f"{group.label}: updates", updates_table(group), f"Percent, on {SCORED}.")
    tables += card(f"{group.label}: datasets", datasets_table(group), note)
    recipe = f"<summary>{escape(group.label)}: recipe</summary><pre>{escape(group.runs[0].recipe_text)}</pre>"
    return f'<div class="grid">{pictures}</div>{tables}<details class="card">{recipe}</details>'


def test_sets(group: Group) -> str:
    return "the whole test sets" if group.whole else SCORED


def updates_table(group: Group) -> str:
    """A row per update: the scores, and of what it cost the columns that the run has."""
    costs = {
        "drift": ("drift", 1, ".3f"),
        "steps": ("steps", 1, ",.0f"),
        "samples": ("samples", 1, ",.0f"),
        "gflops": ("GFLOPs", 1, ",.0f"),
        "mafs": ("MAFs", 1, ",.0f"),
        "seconds": ("seconds", 1, ",.0f"),
        "peak_memory": ("peak GiB", 2**30, ".2f"),
    }
    columns = [(key.upper(), group.values(key), ".1f") for key in SCORES]
    for key, (title, unit, form) in costs.items():  # the mean without its spread, which tells nothing
        columns.append((title, group.values(key).mean(axis=0, keepdims=True) / unit, form))
    columns = [column for column in columns if np.isfinite(column[1]).any()]
    rows = [
        [str(update), *(number(values[:, i], form) for _, values, form in columns)]
        for i, update in enumerate(group.updates)
    ]
    return table(["update", *(title for title, _, _ in columns)], rows)


def datasets_table(group: Group) -> str:
    rows = [
        [name, role, number(scores[:, 0]), number(scores[:, 1]), number(np.diff(scores)[:, 0], "+.1f")]
        for name, role, scores in group.datasets()
    ]
    return table(["dataset", "role", "before", "after", "change"], rows)


def number(values: np.ndarray, form: str = ".1f") -> str:
    """The mean over runs (R,), with the spread if there are several; n/a where a run has no value."""
    if not np.isfinite(values).all():
        return "n/a"
    text = f"{values.mean():{form}}"
    return f"{text} ± {deviation(values):{form.lstrip('+')}}" if len(values) > 1 else text


def table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def card(title: str, content: str, note: str = "") -> str:
    """A white box; `content` is HTML, title and note are text."""
    note = f'<p class="quiet">{escape(note)}</p>' if note else ""
    return f'<section class="card"><h2>{escape(title)}</h2>\n{content}{note}</section>\n'


def picture(draw: Callable[..., Figure], what: Group | list[Group]) -> str:
    """A figure as inline SVG, without the XML header, which HTML does not have."""
    svg = render(draw, what).decode()
    return re.sub('<g id="[^"]*">', "<g>", svg[svg.index("<svg") :])  # ids of groups repeat in each figure
