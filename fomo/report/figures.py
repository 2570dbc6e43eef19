"""The figures of a report: plain numbers in, an SVG or PNG file out.

    render(plane_figure, curves) -> bytes

Curves are told apart by colour, dashes and markers, which a legend below the figure names; the same numbers give
the same bytes. Nothing here knows of run folders.

Shapes: U updates after which the model was scored, W evaluations within updates.
"""

import io
import math
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
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from fomo.atomic import write_atomically
from fomo.errors import UserError
from fomo.schedules import RateCurve

SCORES = {"ka": "knowledge accumulation", "zs": "zero-shot retention", "gm": "geometric mean"}
ROLES = {"adaptation": "#004488", "evaluation": "#DDAA33"}  # dark and light: they differ in grayscale, too
# Neighbours differ in lightness, and so in grayscale.
COLOURS = ["#004488", "#D1550B", "#117755", "#BB4499", "#6B5700", "#2A88C0", "#7A0C1E", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p", "<"]  # of another length than COLOURS: pairs do not repeat
DASHES = ["-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5))]
GOLD = "#E5AC00"  # of the joint upper bound
WIDTH = 4.6  # inches, about a phone's width, so that 10 pt text is still readable there
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
class Within:
    """What the runs of one recipe scored within updates; means over runs."""

    positions: np.ndarray  # 2.5: halfway in the third update, (W,)
    mean: dict[str, np.ndarray]  # "ka", "zs", "gm" -> percent, (W,)


NONE_WITHIN = Within(np.empty(0), dict.fromkeys(SCORES, np.empty(0)))


@dataclass(frozen=True)
class Curve:
    """What the runs of one recipe scored, the untouched model (update 0) first."""

    label: str
    updates: list[int]
    mean: dict[str, np.ndarray]  # "ka", "zs", "gm" -> percent, (U,); NaN where a run has no score
    spread: dict[str, np.ndarray]  # their standard deviation over runs, (U,)
    frozen: np.ndarray | None = None  # KA of the frozen-feature baseline, (U,)
    joint: bool = False  # the joint upper bound: everything at once; its end counts, not its way
    within: Within = NONE_WITHIN

    @property
    def known(self) -> list[str]:
        """Of "ka", "zs", "gm" those that have a value."""
        return [key for key in SCORES if np.isfinite(self.mean[key]).any()]

    @property
    def points(self) -> list[tuple[float, float]]:
        """(ZS, KA) of the updates that have both."""
        points = np.stack([self.mean["zs"], self.mean["ka"]], axis=1)
        return [(zs, ka) for zs, ka in points.tolist() if np.isfinite(zs + ka)]


@dataclass(frozen=True)
class Training:
    """How the runs of one recipe were trained."""

    rates: RateCurve
    runs: list[list[dict]]  # lines of train.jsonl


@dataclass(frozen=True)
class Periods:
    """What a model knows of each period of time, after each update of which one taught it."""

    names: list[str]  # T, in the order of the updates
    updates: list[int]
    scores: np.ndarray  # KA, percent, (U, T); NaN where a period has no test picture


# --- files -----------------------------------------------------------------------------------------------


def render(draw: Callable[[Any], Figure], what: Any, kind: str = "svg", salt: str = "") -> bytes:
    """The undated file of the figure `draw(what)`; the ids in SVGs with different salts differ."""
    undated = dict.fromkeys(["Date", "Creator", "Format", "Type"] if kind == "svg" else ["Software"])
    buffer = io.BytesIO()
    style = {**STYLE, "svg.hashsalt": draw.__name__ + salt}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=MISSING_GLYPH)
        draw(what).savefig(buffer, format=kind, dpi=200, metadata=undated)
    return buffer.getvalue()


def write_figure(path: Path, draw: Callable[[Any], Figure], what: Any) -> None:
    """Draw into the file that --plot names."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a .png or .svg file")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(draw, what, path.suffix[1:]))


# --- what the figures share ------------------------------------------------------------------------------


def new_figure(height: float, rows: int = 1, *, width: float = WIDTH, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure outside of pyplot's global state, and its axes, one above the other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **kwargs)[:, 0]


def line_style(index: int, points: int) -> dict:
    """How one of several curves looks; small markers where a hundred updates crowd."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5 if points <= 30 else 1.5,
    }


def shorten(text: str, length: int = 28) -> str:
    """One line of at most `length` characters; the middle goes, since names often differ at the end."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - length // 3 - 1]}…{text[-(length // 3) :]}"


def count_updates(axes: Axes, title: str = "update (0: the untouched model)") -> None:
    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))  # room for three digits


def at_least(axes: Axes, point: np.ndarray, span: np.ndarray | float) -> None:
    """Let the axes span some points around the point (x, y): noise shall not fill the figure."""
    axes.update_datalim([point - span / 2, point + span / 2])
    axes.autoscale_view()


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend under the figure, which grows by as much; a single curve needs none."""
    figure, (handles, names) = axes.figure, axes.get_legend_handles_labels()
    if len(names) < 2:
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.1 + 0.19 * math.ceil(len(names) / columns))
    style = {"frameon": False, "fontsize": 9, "handlelength": 3.2, "columnspacing": 1.2, "labelspacing": 0.3}
    figure.legend(handles, names, loc="outside lower left", ncols=columns, **style)


# --- scores ----------------------------------------------------------------------------------------------


def plane_figure(curves: list[Curve]) -> Figure:
    """The KA-ZS plane: from the untouched model (black star; of a child its parent's model, hollow) over one point
    per update to the last (large).

    Small points are evaluations within updates. The joint upper bound is a gold star; a dotted line to it is the
    linear trade-off of KA and ZS.
    """
    figure, (axes,) = new_figure(height=4.0)
    axes.set(xlabel="zero-shot retention (ZS), %", ylabel="knowledge accumulation (KA), %")
    axes.margins(0.1)
    starts: dict[bool, list] = {True: [], False: []}  # untouched, or a parent's
    missing = []
    for index, curve in enumerate(curves):
        points = np.stack([curve.mean["zs"], curve.mean["ka"]], axis=1)  # (U, 2)
        if not np.isfinite(points).all():
            missing.append(curve.label)
            continue
        starts[curve.updates[0] == 0].append(points[0])
        if curve.joint:
            draw_joint(axes, curve, points)
        else:
            draw_way(axes, curve, points, line_style(index, len(points)))
        at_least(axes, points[-1], span=2)
    if missing:
        axes.set_title(f"{shorten(', '.join(missing), 20)}: no KA or no ZS, not drawn")
    looks = {True: ("untouched model", "black", "white"), False: ("parent's model", "white", "black")}
    for untouched, (label, color, edge) in looks.items():
        if starts[untouched]:
            star = {"marker": "*", "markersize": 14, "color": color, "markeredgecolor": edge}
            axes.plot(*np.transpose(starts[untouched]), linestyle="none", label=label, zorder=5, **star)
    legend_below(axes)
    return figure


def draw_way(axes: Axes, curve: Curve, points: np.ndarray, style: dict) -> None:
    """A run's way over the plane, (U, 2), with its spread at the end."""
    within = np.stack([curve.within.mean["zs"], curve.within.mean["ka"]], axis=1)
    draw_line(axes, curve, points, within, style)
    if len(points) > 1:
        spread = curve.spread["ka"][-1], curve.spread["zs"][-1]
        axes.errorbar(*points[-1], *spread, ecolor=style["color"], fmt="none")
        axes.plot(*points[-1], **{**style, "markersize": 8, "markeredgecolor": "white", "zorder": 4})


def draw_line(axes: Axes, curve: Curve, points: np.ndarray, within: np.ndarray, style: dict) -> None:
    """From point to point after each update, (U, 2), through the smaller ones within updates, (W, 2)."""
    order = np.argsort(np.concatenate([curve.updates, curve.within.positions]), kind="stable")
    ends = np.flatnonzero(order < len(points)).tolist()
    line = np.concatenate([points, within])[order]
    axes.plot(*line.T, label=shorten(curve.label), markevery=ends, **style)
    if len(within):
        small = {"marker": "o", "markersize": style["markersize"] / 2}
        axes.plot(*within.T, color=style["color"], linestyle="none", **small)


def draw_joint(axes: Axes, curve: Curve, points: np.ndarray) -> None:
    """The gold star and the line to it."""
    axes.plot(*points[[0, -1]].T, color="#555555", linestyle=(0, (1, 2.5)), linewidth=1.2, zorder=1)
    axes.errorbar(*points[-1], curve.spread["ka"][-1], curve.spread["zs"][-1], ecolor=GOLD, fmt="none")
    star = {"marker": "*", "markersize": 15, "color": GOLD, "markeredgecolor": "black"}
    axes.plot(*points[-1], linestyle="none", label=shorten(curve.label, 40), zorder=5, **star)


def scores_figure(curves: list[Curve]) -> Figure:
    """KA, ZS and GM over the updates with a band of one standard deviation; small points lie within updates.

    "frozen features", of a single curve: what ridge regression on the features of the model that it began with
    reaches, over its own sets.
    """
    known = [key for key in SCORES if any(key in curve.known for curve in curves)]
    figure, panels = new_figure(height=0.4 + 1.7 * len(known), rows=len(known), sharex=True)
    frozen = curves[0] if len(curves) == 1 and curves[0].frozen is not None else None
    for axes, key in zip(panels, known, strict=True):
        axes.set_title(f"{SCORES[key]} ({key.upper()}), %")
        axes.margins(x=0.03)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        for index, curve in enumerate(curves):
            draw_score(axes, curve, key, index)
        if key == "ka" and frozen:
            dotted = {"color": "#777777", "linestyle": ":", "linewidth": 1.2}
            axes.plot(frozen.updates, frozen.frozen, label="frozen features", **dotted)
    count_updates(panels[-1])
    legend_below(panels[0])
    return figure


def draw_score(axes: Axes, curve: Curve, key: str, index: int) -> None:
    """One score of a curve over its updates; of the joint upper bound its end, as a line."""
    x, mean, spread = curve.updates, curve.mean[key], curve.spread[key]
    if curve.joint:
        axes.axhline(mean[-1], color=GOLD, linewidth=1.5, label=shorten(curve.label, 40))
        return
    style = line_style(index, len(x))
    within = np.stack([curve.within.positions, curve.within.mean[key]], axis=1)
    draw_line(axes, curve, np.stack([x, mean], axis=1), within, style)
    axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.15, linewidth=0)
    if np.isfinite(mean[-1]):
        at_least(axes, np.array([x[-1], mean[-1]]), span=np.array([0, 2]))


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
    figure, (axes,) = new_figure(height=3.0)
    key = next(iter(rows[0]))
    values = [row[key] for row in rows]
    if not all(isinstance(value, (int, float)) for value in values):
        values = [str(value) for value in values]  # as categories
    for index, score in enumerate(SCORES):
        y = np.array([row[score] for row in rows], float)
        if np.isfinite(y).all():
            axes.plot(values, y, label=score.upper(), **line_style(index, len(rows)))
    axes.set(xlabel=key, ylabel="percent")
    legend_below(axes, columns=3)
    return figure


def worth_figure(found: tuple[list[dict], float | None]) -> Figure:
    """The scores over `keep`, and where on the curve the deployed model is; None where it is not on it."""
    rows, deployed = found
    figure = sweep_figure(rows)
    (axes,) = figure.axes
    if deployed is not None:
        axes.axvline(deployed, color="#555555", linestyle=":", linewidth=1.4, zorder=1)
        place = {"xycoords": ("data", "axes fraction"), "ha": "left" if deployed < 0.5 else "right"}
        axes.annotate(f"deployed: keep {deployed:g}", (deployed, 1.02), fontsize=9, **place)
    return figure


def choice_figure(choice: dict) -> Figure:
    """GM on validation pictures over `keep`, a line for each step; over the steps of a method without `keep`."""
    figure, (axes,) = new_figure(height=3.0)
    tried, chosen = choice["tried"], choice["chosen"]
    along = "step" if chosen["keep"] is None else "keep"
    lines = {"": tried} if along == "step" else by_step(tried)
    for index, (label, rows) in enumerate(lines.items()):
        x, y = ([row[key] for row in rows] for key in (along, "gm"))
        axes.plot(x, y, label=label, **line_style(index, len(rows)))
    axes.plot(chosen[along], chosen["gm"], "*", color="#555555", markersize=14, label="chosen", zorder=3)
    axes.set(xlabel=along, ylabel="GM, percent")
    legend_below(axes, columns=3)
    return figure


def by_step(tried: list[dict]) -> dict[str, list[dict]]:
    return {f"after step {step}": list(rows) for step, rows in groupby(tried, key=lambda row: row["step"])}


# --- training --------------------------------------------------------------------------------------------


def training_figure(training: Training) -> Figure:
    """The learning rate over all updates, as planned, and each run's loss, as far as it has got."""
    figure, (rates, losses) = new_figure(height=3.4, rows=2, sharex=True)
    rates.set_title("learning rate")
    draw_rates(rates, training.rates, {"color": COLOURS[0]})
    losses.set_title("loss")
    losses.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    style = {"color": COLOURS[0], "linewidth": 0.8, "alpha": len(training.runs) ** -0.5}
    for lines in training.runs:
        marker = "." if len(lines) <= 100 else None
        for update, some in groupby(lines, key=lambda line: line["update"]):  # a new line with every update
            x, y = zip(*((line["step"] + 1, line.get("loss")) for line in some), strict=True)
            at = update - 1 + np.array(x) / training.rates.steps
            losses.plot(at, np.array(y, float), marker=marker, **style)
    count_updates(losses, "updates")
    return figure


def schedule_figure(curves: list[RateCurve]) -> Figure:
    """The learning rates of several recipes over all updates."""
    figure, (axes,) = new_figure(height=3.2, width=8)
    axes.set_ylabel("learning rate")
    for index, curve in enumerate(curves):
        style = {key: line_style(index, 1)[key] for key in ("color", "linestyle")}
        draw_rates(axes, curve, {**style, "label": shorten(curve.label, 40)})
    count_updates(axes, "updates")
    legend_below(axes, columns=3)
    return figure


def draw_rates(axes: Axes, curve: RateCurve, style: dict) -> None:
    """Where an infinite schedule forks, the trunk goes on beside the thin branch."""
    forks, per_update = curve.schedule.meta == "infinite", np.arange(1, curve.steps + 1) / curve.steps
    x = np.concatenate([update + per_update for update in range(curve.updates)])
    y = np.concatenate([curve.rates(update, branch=not forks) for update in range(curve.updates)])
    axes.plot(x, y, linewidth=1.1, **style)
    if forks:
        start = max(curve.schedule.trunk_steps(curve.steps) - 1, 0)
        for update in range(curve.updates):
            x, y = update + per_update[start:], curve.rates(update)[start:]
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


def periods_figure(periods: Periods) -> Figure:
    """KA after each update (rows) on each period (columns), written into the cells while they are large enough.

    A frame marks what the update of the row taught: left of it is backward transfer, right of it forward transfer.
    """
    rows, columns = periods.scores.shape
    figure, (axes,) = new_figure(height=1.2 + 0.28 * min(rows, 20))
    axes.set_title("KA by period, %")
    mesh = axes.imshow(periods.scores, cmap="viridis", aspect="auto", interpolation="none")
    frame = {"width": 1, "height": 1, "fill": False, "edgecolor": COLOURS[1], "linewidth": 2}
    for row, update in enumerate(periods.updates):
        if update:
            axes.add_patch(Rectangle((update - 1.5, row - 0.5), **frame))
    middle, centred = (mesh.norm.vmin + mesh.norm.vmax) / 2, {"ha": "center", "va": "center", "fontsize": 8}
    for (row, column), score in np.ndenumerate(periods.scores) if columns <= 8 else ():
        text = f"{score:.1f}" if np.isfinite(score) else "n/a"
        axes.text(column, row, text, color="white" if score < middle else "black", **centred)
    every, begins = math.ceil(columns / 12), [name.partition("..")[0] for name in periods.names]
    tilted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if columns > 5 else {}
    axes.set_xticks(range(0, columns, every), begins[::every], fontsize=8, **tilted)
    every = math.ceil(rows / 20)
    axes.set_yticks(range(0, rows, every), periods.updates[::every])
    axes.set(xlabel="period (its first date)" if begins != periods.names else "period", ylabel="update")
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
