"""What the figures share: how curves are told apart, and labels that cover neither each other nor the data."""

import math
from itertools import pairwise, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

# Dark enough to be read as text on white; neighbours differ in lightness, and so in grayscale.
COLOURS = ["#004488", "#D1550B", "#117755", "#BB4499", "#6B5700", "#2A88C0", "#7A0C1E", "#777777"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "p", "<"]  # of another length than COLOURS: pairs do not repeat
DASHES = ["-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5))]
WIDTH = 4.6  # inches, about a phone's width, so that 10 pt text is still readable there
LABELLED = 6  # so many curves are labelled where they end; more are in a legend


def new_figure(height: float, rows: int = 1, *, width: float = WIDTH, **kwargs) -> tuple[Figure, np.ndarray]:
    """A figure outside of pyplot's global state, and its axes, one above the other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, squeeze=False, **kwargs)[:, 0]


def settle(figure: Figure) -> None:
    """Make room for what is drawn so far."""
    figure.get_layout_engine().execute(figure)


def line_style(index: int, points: int) -> dict:
    """How one of several curves looks; small markers where a hundred updates crowd."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5 if points <= 30 else 1.5,
    }


def count_updates(axes: Axes, title: str = "update (0: the untouched model)") -> None:
    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=1))  # room for three digits


def at_least(axes: Axes, point: np.ndarray, span: np.ndarray | float) -> None:
    """Let the axes span some points around the point (x, y): noise shall not fill the figure."""
    axes.update_datalim([point - span / 2, point + span / 2])
    axes.autoscale_view()


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend under the figure, which grows by as much."""
    figure, (handles, names) = axes.figure, axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.1 + 0.19 * math.ceil(len(names) / columns))
    style = {"frameon": False, "fontsize": 9, "handlelength": 3.2, "columnspacing": 1.2, "labelspacing": 0.3}
    figure.legend(handles, names, loc="outside lower left", ncols=columns, **style)


def label_inside(axes: Axes, labels: list[tuple], curves: list[np.ndarray]) -> None:
    """Label points (x, y, text, colour) where the text covers no other label and the least of the curves."""
    settle(axes.figure)  # so that positions in pixels are known
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


def label_beside(figure: Figure, labels: list[tuple[Axes, list[tuple]]]) -> None:
    """Label points (x, y, text, colour) of each axes in a column at its right, moved apart where close."""
    settle(figure)
    for axes, some in labels:
        some = sorted(some, key=lambda label: label[1])
        low, high = axes.get_ylim()
        gap = (high - low) * 12 / (axes.bbox.height * 72 / figure.dpi)  # 12 pt in units of the data
        heights = [y for _, y, _, _ in some]
        for i in range(1, len(heights)):  # up from the lowest ...
            heights[i] = max(heights[i], heights[i - 1] + gap)
        for i in reversed(range(len(heights))):  # ... and back down, so that none rises above the panel
            heights[i] = min(heights[i], high - gap * (len(heights) - 1 - i))
        place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "va": "center"}
        for (_, _, text, colour), y in zip(some, heights, strict=True):
            axes.annotate(text, (1, y), (2, 0), color=colour, annotation_clip=False, **place)


def shorten(text: str, length: int) -> str:
    """One line of at most `length` characters; the middle goes, since names often differ at the end."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - length // 3 - 1]}…{text[-(length // 3) :]}"
