"""The figures of a report: plain numbers in, an SVG or PNG file out.

    render(plane_figure, curves) -> bytes

Curves are told apart by colour, dashes and markers and are labelled where they end; the same numbers give the
same bytes. Nothing here knows of run folders.

Shapes: U updates after which the model was scored.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise, product
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

SCORES = {"ka": "knowledge accumulation", "zs": "zero-shot retention", "gm": "geometric mean"}

# Dark enough to be read as text on white.
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
    "axes.unicode_minus": False,  # ticks, labels and tables write one and the same minus
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "svg.fonttype": "none",  # text stays text: small, searchable, in any script the reader's fonts have
}


@dataclass(frozen=True)
class Curve:
    """What the runs of one recipe scored, the untouched model (update 0) first."""

    label: str
    updates: list[int]
    mean: dict[str, np.ndarray]  # "ka", "zs", "gm" -> percent, (U,); NaN where a run has no score
    spread: dict[str, np.ndarray]  # their standard deviation over runs, (U,)
    frozen: np.ndarray | None = None  # KA of the frozen-feature baseline, (U,)


def render(draw: Callable[[Any], Figure], what: Any, kind: str = "svg", salt: str = "") -> bytes:
    """The file of the figure `draw(what)`; the ids in SVGs with different salts differ."""
    undated = dict.fromkeys(["Date", "Creator", "Format", "Type"] if kind == "svg" else ["Software"])
    style = {**STYLE, "svg.hashsalt": draw.__name__ + salt}
    buffer = io.BytesIO()
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # Emoji and scripts that DejaVu lacks are boxes in a PNG, but ordinary text in an SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        draw(what).savefig(buffer, format=kind, dpi=200, metadata=undated)
    return buffer.getvalue()


def plane_figure(curves: list[Curve]) -> Figure:
    """The KA-ZS plane: from the untouched model (star) over one point per update to the last (large)."""
    figure, (axes,) = new_figure(height=4.4)
    axes.set(xlabel="zero-shot retention (ZS), %", ylabel="knowledge accumulation (KA), %")
    axes.margins(0.1)
    labels, stars, drawn = [], {}, []
    for index, curve in enumerate(curves):
        points = np.stack([curve.mean["zs"], curve.mean["ka"]], axis=1)  # (U, 2)
        if not np.isfinite(points).all():
            axes.set_title(f"{shorten(curve.label, 30)}: no KA or no ZS, not drawn")
            continue
        style, last = line_style(index, len(points)), points[-1]
        axes.plot(*points.T, **style)
        if len(points) > 1:
            spread = curve.spread["ka"][-1], curve.spread["zs"][-1]
            axes.errorbar(*last, *spread, ecolor=style["color"], fmt="none")
            axes.plot(*last, **{**style, "markersize": 8, "markeredgecolor": "white", "zorder": 4})
            labels.append((*last, shorten(curve.label, 30), style["color"]))
        stars[tuple(points[0].round(1))] = points[0]  # curves with the same start share the star
        drawn.append(points)
        at_least(axes, last, span=2)
    for star in stars.values():
        axes.plot(*star, marker="*", markersize=14, color="black", markeredgecolor="white", zorder=5)
    labels += [(*star, "untouched model", "black") for star in list(stars.values())[:1]]
    label_inside(axes, labels, drawn)
    return figure


def label_inside(axes: Axes, labels: list[tuple], curves: list[np.ndarray]) -> None:
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


def scores_figure(curves: list[Curve]) -> Figure:
    """KA, ZS and GM over the updates with a band of one standard deviation, labelled at the curves' ends.

    "frozen": what ridge regression on the untouched model's features reaches (fomo/frozen.py).
    """
    known = [key for key in SCORES if any(np.isfinite(curve.mean[key]).any() for curve in curves)]
    figure, panels = new_figure(height=0.4 + 1.7 * len(known), rows=len(known), sharex=True)
    for axes, key in zip(panels, known, strict=True):
        axes.set_title(f"{SCORES[key]} ({key.upper()}), %")
        axes.margins(x=0.03)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        labels = []
        for index, curve in enumerate(curves):
            x, mean, spread = curve.updates, curve.mean[key], curve.spread[key]
            style = line_style(index, len(x))
            axes.plot(x, mean, **style)
            axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
            if np.isfinite(mean[-1]):
                name = f"{shorten(curve.label, 20)} " if len(curves) > 1 else ""
                labels.append((x[-1], mean[-1], f"{name}{mean[-1]:.1f}", style["color"]))
                at_least(axes, np.array([x[-1], mean[-1]]), span=np.array([0, 2]))
        frozen = next((curve for curve in curves if curve.frozen is not None), None)
        if key == "ka" and frozen:
            axes.plot(frozen.updates, frozen.frozen, color="#777777", linestyle=":", linewidth=1.2)
            labels.append(
                (frozen.updates[-1], frozen.frozen[-1], f"frozen {frozen.frozen[-1]:.1f}", "#777777")
            )
        label_beside(axes, labels)
    count_updates(panels[-1])
    return figure


def label_beside(axes: Axes, labels: list[tuple]) -> None:
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


def datasets_figure(changes: list[tuple[str, str, float]]) -> Figure:
    """A bar for each (name, role, change of the score), in the given order, with a panel for each role."""
    rows = {role: [(name, change) for name, its, change in changes if its == role] for role in ROLES}
    rows = {role: some for role, some in rows.items() if some}
    counts = [len(some) for some in rows.values()]
    height = 0.6 + 0.35 * len(rows) + 0.2 * sum(counts)
    figure, panels = new_figure(height, len(rows), sharex=True, height_ratios=counts)
    for axes, (role, some) in zip(panels, rows.items(), strict=True):
        names, values = zip(*some, strict=True)
        axes.set_title(f"{role} sets, mean {np.mean(values):+.1f}")
        bars = axes.barh(range(len(some)), values, color=ROLES[role], edgecolor="#555555", linewidth=0.4)
        axes.bar_label(bars, fmt="{:+.1f}", padding=3, fontsize=9)
        axes.set_yticks(range(len(some)), [shorten(name, 24) for name in names], fontsize=9)
        axes.set_ylim(len(some) - 0.4, -0.6)  # the first on top
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.margins(x=0.2)  # room for the numbers at the bars' ends
        axes.tick_params(left=False)
        axes.grid(axis="y", visible=False)
    panels[-1].set_xlabel("change of the score, points")
    return figure


def training_figure(runs: list[list[dict]]) -> Figure:
    """Learning rate and loss from each run's lines of train.jsonl; a new line begins with every update."""
    figure, panels = new_figure(height=3.4, rows=2, sharex=True)
    for axes, (key, title) in zip(panels, {"lr": "learning rate", "loss": "loss"}.items(), strict=True):
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter("{x:g}")  # 5e-06 rather than 0.000005
        for lines in runs:
            steps = 1 + max((line["step"] for line in lines), default=0)
            style = {"color": COLOURS[0], "linewidth": 0.8, "alpha": len(runs) ** -0.5}
            for update, some in groupby(lines, key=lambda line: line["update"]):
                x, y = zip(*((line["step"] + 1, line.get(key)) for line in some), strict=True)
                marker = "." if len(lines) <= 100 else None
                axes.plot(update - 1 + np.array(x) / steps, np.array(y, float), marker=marker, **style)
    count_updates(panels[-1])
    return figure


def sweep_figure(rows: list[dict]) -> Figure:
    """KA, ZS and GM over the values of one parameter, which is the first key of each row."""
    figure, (axes,) = new_figure(height=3.2)
    key = next(iter(rows[0]))
    values = [row[key] for row in rows]
    numeric = all(isinstance(value, (int, float)) for value in values)
    x = values if numeric else range(len(values))
    if not numeric:
        axes.set_xticks(x, [str(value) for value in values])
    labels = []
    for index, score in enumerate(SCORES):
        y = np.array([row[score] for row in rows], float)
        if np.isfinite(y).all():
            style = line_style(index, len(rows))
            axes.plot(x, y, **style)
            labels.append((x[-1], y[-1], score.upper(), style["color"]))
    axes.set(xlabel=key, ylabel="percent")
    label_beside(axes, labels)
    return figure


def new_figure(height: float, rows: int = 1, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure outside of pyplot's global state, and its axes, one above the other."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **kwargs)[:, 0]


def count_updates(axes: Axes) -> None:
    axes.set_xlabel("update (0: the untouched model)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def at_least(axes: Axes, point: np.ndarray, span: np.ndarray | float) -> None:
    """Let the axes span some points around the point (x, y): noise shall not fill the figure."""
    axes.update_datalim([point - span / 2, point + span / 2])
    axes.autoscale_view()


def line_style(index: int, points: int) -> dict:
    """How one of several curves looks; small markers where a hundred updates crowd."""
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
