"""What became of the classes: before and after, the pictures that were won and lost, the confusions that grew."""

import base64
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.errors import UserError
from fomo.report.columns import Columns, Values
from fomo.report.run_records import Group, Record
from fomo.runs.logs import read_lines
from fomo.text import plural

SHOWN = 12  # pictures that were won, and that were lost
SIDE = 96  # pixels of a picture's longer side
CONFUSIONS = 10


def classes_table(group: Group) -> Columns:
    """A row per class of every set that has several, from the largest gain to the largest loss."""
    titles = group.records[0].constants.get("classes") or {}
    tested = group.records[0].constants.get("tested") or {}
    if len(group.updates) < 2 or any(r.constants.get("classes") != titles for r in group.records):
        return {}
    ends = [[record.by_class(group.updates[i]) for i in (0, -1)] for record in group.records]
    rows = []
    for name in [name for name, classes in titles.items() if len(classes) > 1]:
        if not all(name in scores for pair in ends for scores in pair):
            continue
        both = np.array([[scores[name] for scores in pair] for pair in ends], float)  # (R, 2, classes)
        counts = tested.get(name) or [None] * len(titles[name])
        of_set = zip(titles[name], counts, both.transpose(2, 0, 1), strict=True)
        rows += [(name, *row) for row in of_set if np.isfinite(row[-1]).all()]
    rows.sort(key=lambda row: -np.diff(row[-1]).mean())
    if not rows:
        return {}
    names, classes, counts, scores = zip(*rows, strict=True)
    return {
        "class": classes,
        **({"dataset": names} if len(set(names)) > 1 else {}),
        "n": ["n/a" if n is None else f"{n:,}" for n in counts],
        "before": Values([both[:, 0] for both in scores]),
        "after": Values([both[:, 1] for both in scores]),
        "change": Values([both[:, 1] - both[:, 0] for both in scores], "+.1f"),
    }


@dataclass(frozen=True)
class Taken:
    """A test picture, and what it was and is taken for."""

    dataset: str
    picture: str
    label: str  # its class
    before: str
    after: str


def taken(record: Record) -> list[Taken]:
    """The pictures whose predictions the run has kept, at first and at last; nothing of one evaluation."""
    path = record.folder / "predictions.jsonl"
    lines = read_lines(path) if path.exists() else []
    if len(lines) < 2:
        return []
    first, last = lines[0]["datasets"], lines[-1]["datasets"]
    found = []
    for name, now in last.items():
        titles, then = record.constants["classes"][name], first.get(name, {})
        if then.get("pictures") != now["pictures"]:
            continue  # the set was changed while the run was interrupted
        numbers = zip(now["labels"], then["predicted"], now["predicted"], strict=True)
        for picture, row in zip(now["pictures"], numbers, strict=True):
            found.append(Taken(name, picture, *(titles[number] for number in row)))
    return found


def not_shown(record: Record) -> str:
    """Lines about classes without a score, and sets to learn without predictions; nothing of an older run."""
    constants, path = record.constants, record.folder / "predictions.jsonl"
    kept = read_lines(path)[0]["datasets"] if path.exists() else {}
    tasks, tested = constants.get("tasks") or {}, constants.get("tested") or {}
    classified = [name for name, task in tasks.items() if task == "classification"]
    empty = sum(tested[name].count(0) for name in classified)
    large = [name for name in classified if constants["roles"][name] == "adaptation" and name not in kept]
    found = [f"{plural(empty, 'class has', 'classes have')} no test picture."] if empty else []
    found += (
        [f"Of {', '.join(large)} too many pictures are scored to keep what each is taken for."]
        if large
        else []
    )
    return " ".join(found)


def confusions_table(pictures: list[Taken]) -> Columns:
    """The pairs of classes that are taken for each other more often than before, those that grew most first."""
    before = Counter((p.label, p.before) for p in pictures if p.label != p.before)
    after = Counter((p.label, p.after) for p in pictures if p.label != p.after)
    grown = sorted((pair for pair in after if after[pair] > before[pair]), key=lambda p: before[p] - after[p])
    if not grown:
        return {}
    labels, others = zip(*grown[:CONFUSIONS], strict=True)
    counts = [Values([np.array([n[pair]]) for pair in grown[:CONFUSIONS]], ".0f") for n in (before, after)]
    return {"class": labels, "taken for": others, "before": counts[0], "after": counts[1]}


def examples(record: Record, pictures: list[Taken]) -> tuple[list[tuple[str, list[tuple[str, str]]]], str]:
    """-> a heading each for those won and lost with [(picture as a URI, what is said of it)]; what is missing."""
    won = [p for p in pictures if p.before != p.label == p.after]
    lost = [p for p in pictures if p.before == p.label != p.after]
    shown, gone = [], 0
    for title, some, word in (("Won", won, "was {0.before}"), ("Lost", lost, "now {0.after}")):
        chosen = [some[i] for i in np.linspace(0, len(some) - 1, min(len(some), SHOWN)).round().astype(int)]
        uris = thumbnails(record.folder / "data.yaml", chosen)
        gone += len(chosen) - len(uris)
        seen = [(uris[p], f"{p.label}, {word.format(p)}") for p in chosen if p in uris]
        count = plural(len(some), "picture") + (f", {len(seen)} of them" if len(seen) < len(some) else "")
        shown += [(f"{title}: {count}", seen)] if some else []
    missing = f"{plural(gone, 'picture')} cannot be opened any more where data.yaml says." if gone else ""
    return shown, missing


def thumbnails(data_file: Path, wanted: list[Taken]) -> dict[Taken, str]:
    """Small JPEG files as data URIs, of the pictures that are still there."""
    return {p: uri for name in {p.dataset for p in wanted} for p, uri in of_set(data_file, name, wanted)}


def of_set(data_file: Path, name: str, wanted: list[Taken]) -> Iterator[tuple[Taken, str]]:
    from fomo.datasets import datafile  # torch takes seconds to import, and few reports need it
    from fomo.datasets.periods import as_recorded
    from fomo.datasets.sources.base import UNREADABLE

    try:
        data = datafile.read(data_file)
        sets = data.adaptation if name in data.adaptation else as_recorded(data, [name]).adaptation
        source = sets[name].open("test")
        numbers = {source.id_of(number): number for number in range(len(source))}
    except (UserError, OSError, KeyError, AttributeError):  # the set is gone, or its test split
        return
    for picture in [p for p in wanted if p.dataset == name and p.picture in numbers]:
        try:
            image = source.image(numbers[picture.picture]).convert("RGB")
        except UNREADABLE:
            continue
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=80)
        yield picture, "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
