"""The figures of a report: plain numbers in, an SVG or PNG file out.

    render(plane_figure, curves) -> bytes

Curves are told apart by colour, dashes and markers and are labelled where they end, or in a legend where they are
many; the same numbers give the same bytes. Nothing here knows of run folders.

Shapes: U updates after which the model was scored.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fomo.atomic import write_atomically
from fomo.errors import UserError
from fomo.report.drawing import (
    COLOURS,
    LABELLED,
    at_least,
    count_updates,
    label_beside,
    label_inside,
    legend_below,
    line_style,
    new_figure,
    settle,
    shorten,
)
from fomo.schedules import RateCurve

SCORES = {"ka": "knowledge accumulation", "zs": "zero-shot retention", "gm": "geometric mean"}
ROLES = {"adaptation": "#004488", "evaluation": "#DDAA33"}  # dark and light: they differ in grayscale, too
GOLD = "#E5AC00"  # of the joint upper bound's star; too light for text
JOINT = "#7A5C00"  # of its label and line
MISSING_GLYPH = "Glyph .* missing from font"  # emoji are boxes in a PNG, but ordinary text in an SVG
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
    joint: bool = False  # the joint upper bound: everything at once; its end counts, not its way


@dataclass(frozen=True)
class Training:
    """How the runs of one recipe were trained."""

    life: RateCurve
    runs: list[list[dict]]  # lines of train.jsonl


# --- files -----------------------------------------------------------------------------------------------


def render(draw: Callable[[Any], Figure], what: Any, kind: str = "svg", salt: str = "") -> bytes:
    """The file of the figure `draw(what)`; the ids in SVGs with different salts differ."""
    return save(drawn(draw, what), kind, draw.__name__ + salt)


def drawn(draw: Callable[[Any], Figure], what: Any) -> Figure:
    """A figure in our style with its layout settled, so that it can be saved more than once for little."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MISSING_GLYPH)
        figure = draw(what)
        settle(figure)
        figure.set_layout_engine("none")
    return figure


def save(figure: Figure, kind: str, salt: str) -> bytes:
    """A drawn figure as a PNG or SVG file without its date."""
    undated = dict.fromkeys(["Date", "Creator", "Format", "Type"] if kind == "svg" else ["Software"])
    buffer = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MISSING_GLYPH)
        figure.savefig(buffer, format=kind, dpi=200, metadata=undated)
    return buffer.getvalue()


def write_figure(path: Path, draw: Callable[[Any], Figure], what: Any) -> None:
    """Draw into the file that --plot names."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a .png or .svg file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(draw, what, path.suffix[1:]))


# --- scores ----------------------------------------------------------------------------------------------


def plane_figure(curves: list[Curve]) -> Figure:
    """The KA-ZS plane: from the untouched model (black star) over one point per update to the last (large).

    The joint upper bound is a gold star; a dotted line to it is the linear trade-off of KA and ZS.
    """
    figure, (axes,) = new_figure(height=4.4)
    axes.set(xlabel="zero-shot retention (ZS), %", ylabel="knowledge accumulation (KA), %")
    axes.margins(0.1)
    labels, stars, obstacles, ways = [], {}, [], ways_of(curves)
    for curve in curves:
        points = np.stack([curve.mean["zs"], curve.mean["ka"]], axis=1)  # (U, 2)
        if not np.isfinite(points).all():
            axes.set_title(f"{shorten(curve.label, 30)}: no KA or no ZS, not drawn")
            continue
        stars[tuple(points[0].round(1))] = points[0]  # curves with the same start share the star
        if curve.joint:
            labels.append(draw_joint(axes, curve, points))
            points = points[[0, -1]]
        else:
            colour = draw_way(axes, curve, points, line_style(ways[curve.label], len(points)))
            if len(ways) <= LABELLED and len(points) > 1:
                labels.append((*points[-1], shorten(curve.label, 30), colour))
        obstacles += [points, *error_bars(curve, points[-1])]
        at_least(axes, points[-1], span=2)
    for star in stars.values():
        axes.plot(*star, marker="*", markersize=14, color="black", markeredgecolor="white", zorder=5)
    labels += [(*star, "untouched model", "black") for star in list(stars.values())[:1]]
    if len(ways) > LABELLED:
        legend_below(axes)
    label_inside(axes, labels, obstacles)
    return figure


def ways_of(curves: list[Curve]) -> dict[str, int]:
    """Label -> index, which decides the colour, of the curves that are drawn update by update."""
    return {label: i for i, label in enumerate(curve.label for curve in curves if not curve.joint)}


def draw_way(axes: Axes, curve: Curve, points: np.ndarray, style: dict) -> str:
    """A run's way over the plane, (U, 2), with its spread at the end; -> its colour."""
    axes.plot(*points.T, label=shorten(curve.label, 28), **style)
    if len(points) > 1:
        spread = curve.spread["ka"][-1], curve.spread["zs"][-1]
        axes.errorbar(*points[-1], *spread, ecolor=style["color"], fmt="none")
        axes.plot(*points[-1], **{**style, "markersize": 8, "markeredgecolor": "white", "zorder": 4})
    return style["color"]


def error_bars(curve: Curve, end: np.ndarray) -> list[np.ndarray]:
    """Both of them as lines (2, 2) around the end (zs, ka)."""
    spread = np.diag([curve.spread["zs"][-1], curve.spread["ka"][-1]])
    return [np.stack([end - half, end + half]) for half in spread]


def draw_joint(axes: Axes, curve: Curve, points: np.ndarray) -> tuple:
    """The gold star and the line to it; -> its label."""
    axes.plot(*points[[0, -1]].T, color="#555555", linestyle=(0, (1, 2.5)), linewidth=1.2, zorder=1)
    axes.errorbar(*points[-1], curve.spread["ka"][-1], curve.spread["zs"][-1], ecolor=JOINT, fmt="none")
    axes.plot(*points[-1], marker="*", markersize=15, color=GOLD, markeredgecolor="black", zorder=5)
    return (*points[-1], "joint upper bound", JOINT)


def scores_figure(curves: list[Curve]) -> Figure:
    """KA, ZS and GM over the updates with a band of one standard deviation, labelled at the curves' ends.

    "frozen": what ridge regression on the untouched model's features reaches (fomo/frozen.py).
    """
    known = [key for key in SCORES if any(np.isfinite(curve.mean[key]).any() for curve in curves)]
    figure, panels = new_figure(height=0.4 + 1.7 * len(known), rows=len(known), sharex=True)
    labels, ways = [], ways_of(curves)
    many = len(ways) > LABELLED
    for axes, key in zip(panels, known, strict=True):
        axes.set_title(f"{SCORES[key]} ({key.upper()}), %")
        axes.margins(x=0.03)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ends = [draw_score(axes, curve, key, ways.get(curve.label, 0)) for curve in curves]
        some = [] if many else [label for label in ends if np.isfinite(label[1])]
        if len(curves) == 1:
            some = [(x, y, text.split()[-1], colour) for x, y, text, colour in some]
        frozen = next((curve for curve in curves if curve.frozen is not None), None)
        if key == "ka" and frozen:
            x, y = frozen.updates, frozen.frozen
            axes.plot(x, y, color="#777777", linestyle=":", linewidth=1.2)
            some.append((x[-1], y[-1], f"frozen {y[-1]:.1f}", "#777777"))
        labels.append((axes, some))
    count_updates(panels[-1])
    if many:
        legend_below(panels[0])
    label_beside(figure, labels)
    return figure


def draw_score(axes: Axes, curve: Curve, key: str, index: int) -> tuple:
    """One score of a curve over its updates; of the joint upper bound its end, as a line. -> its label."""
    x, mean, spread = curve.updates, curve.mean[key], curve.spread[key]
    name = re.sub(r" \(\d+ runs\)$", "", curve.label)  # the plane says how many
    text = f"{shorten(name, 20)} {mean[-1]:.1f}"
    if curve.joint:
        axes.axhline(mean[-1], color=GOLD, linewidth=1.5, label=shorten(curve.label, 28))
        return 0, mean[-1], text, JOINT
    style = line_style(index, len(x))
    axes.plot(x, mean, label=shorten(curve.label, 28), **style)
    axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
    if np.isfinite(mean[-1]):
        at_least(axes, np.array([x[-1], mean[-1]]), span=np.array([0, 2]))
    return x[-1], mean[-1], text, style["color"]


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
    label_beside(figure, [(axes, labels)])
    return figure


# --- training --------------------------------------------------------------------------------------------


def training_figure(training: Training) -> Figure:
    """The learning rate over the life, as planned, and each run's loss, as far as it has got."""
    figure, (rates, losses) = new_figure(height=3.4, rows=2, sharex=True)
    rates.set_title("learning rate")
    draw_rates(rates, training.life, {"color": COLOURS[0]})
    losses.set_title("loss")
    losses.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    style = {"color": COLOURS[0], "linewidth": 0.8, "alpha": len(training.runs) ** -0.5}
    for lines in training.runs:
        marker = "." if len(lines) <= 100 else None
        for update, some in groupby(lines, key=lambda line: line["update"]):  # a new line with every update
            x, y = zip(*((line["step"] + 1, line.get("loss")) for line in some), strict=True)
            at = update - 1 + np.array(x) / training.life.steps
            losses.plot(at, np.array(y, float), marker=marker, **style)
    count_updates(losses, "updates")
    return figure


def schedule_figure(lives: list[RateCurve]) -> Figure:
    """The learning rates of several recipes over the life."""
    figure, (axes,) = new_figure(height=3.2, width=8)
    axes.set_ylabel("learning rate")
    for index, life in enumerate(lives):
        style = {key: line_style(index, 1)[key] for key in ("color", "linestyle")}
        draw_rates(axes, life, {**style, "label": shorten(life.label, 40)})
    count_updates(axes, "updates")
    if len(lives) > 1:
        legend_below(axes, columns=3)
    return figure


def draw_rates(axes: Axes, life: RateCurve, style: dict) -> None:
    """A life's learning rate. Where an infinite schedule forks, the trunk goes on beside the thin branch."""
    forks, per_update = life.schedule.meta == "infinite", np.arange(1, life.steps + 1) / life.steps
    x = np.concatenate([update + per_update for update in range(life.updates)])
    y = np.concatenate([life.rates(update, branch=not forks) for update in range(life.updates)])
    axes.plot(x, y, linewidth=1.1, **style)
    if forks:
        start = max(life.schedule.trunk_steps(life.steps) - 1, 0)
        for update in range(life.updates):
            x, y = update + per_update[start:], life.rates(update)[start:]
            axes.plot(x, y, color=style["color"], linewidth=0.8, linestyle=":")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")  # 5e-06 rather than 0.000005


# --- data and work ---------------------------------------------------------------------------------------


def stream_figure(stream: Sequence[Mapping[str, int]]) -> Figure:
    """Which dataset feeds which update: the share of each update's concepts. stream: dataset -> concepts."""
    sets = list(dict.fromkeys(name for chunk in stream for name in chunk))
    shares = np.array([[chunk.get(name, 0) / sum(chunk.values()) for chunk in stream] for name in sets])
    figure, (axes,) = new_figure(height=1.2 + 0.17 * len(sets))
    axes.set_title("% of an update's concepts")
    shown = np.ma.masked_equal(100 * shares, 0)
    # As one picture: a hundred updates of forty datasets would be thousands of rectangles.
    extent = (0.5, len(stream) + 0.5, len(sets) - 0.5, -0.5)
    style = {"cmap": "viridis_r", "vmin": 0, "aspect": "auto", "interpolation": "none"}
    mesh = axes.imshow(shown, extent=extent, **style)
    axes.set_yticks(range(len(sets)), [shorten(name, 24) for name in sets], fontsize=8)
    count_updates(axes, "update")
    axes.grid(False)
    figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
    return figure


def budget_figure(spent: tuple[str, Sequence[int], np.ndarray]) -> Figure:
    """What each update spent of what it was allowed: (unit, updates, percent)."""
    unit, updates, shares = spent
    figure, (axes,) = new_figure(height=2.0)
    axes.set_title(f"{unit}, % of what an update may spend")
    axes.bar(updates, shares, color=COLOURS[0], width=0.7)
    axes.axhline(100, color="black", linewidth=1, linestyle="--")
    axes.set_ylim(0, max(115, 1.1 * shares.max()))
    axes.grid(axis="x", visible=False)
    count_updates(axes, "update")
    return figure
