"""What was understood of the data, said before a step is trained; and what keeps a run from making sense.

`update`, `continue`, a dry run and `data check` all say it from here. Nothing is decoded: names, labels, captions
and the bytes of files are looked at.
"""

import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fomo.datasets.datafile import SPLITS, DataFile, Entry
from fomo.datasets.dates import spanned
from fomo.datasets.sources.base import COMPARED, Source, digest
from fomo.errors import UserError
from fomo.text import plural, shortened

LOOKED = 1000  # test pictures that are looked for in what is trained on
Splits = dict[str, Source]  # those that an entry has


def say(data: DataFile, opened: list[tuple[Entry, Splits]]) -> None:
    """Write what was understood on standard error."""
    for line in understood(data, opened):
        tqdm.write(line, file=sys.stderr)


def opened_and_said(data: DataFile) -> list[tuple[Entry, Splits]]:
    """What `open_all` opens, after it was said; a UserError if it makes no sense."""
    opened = open_all(data)
    say(data, opened)
    shared = overlaps(opened)
    for problem in problems(opened, shared):
        raise UserError(f"{data.path}: {problem}")
    for leak in leaks(shared):
        tqdm.write(f"warning: {leak}", file=sys.stderr)
    return opened


def open_all(data: DataFile) -> list[tuple[Entry, Splits]]:
    """Every entry with its splits, but what is rendered here; of a set's periods the whole set, once."""
    entries = (*data.pretraining, *data.adaptation.values(), *data.evaluation.values())
    wholes = {entry.whole.where: entry.whole for entry in entries if not entry.source.rendered}
    found = []
    for entry in wholes.values():
        splits = {split: entry.open(split) for split in (*SPLITS[entry.role], "validation")}
        found.append((entry, {split: source for split, source in splits.items() if source is not None}))
    return found


def understood(data: DataFile, opened: list[tuple[Entry, Splits]]) -> Iterator[str]:
    """A line for each dataset."""
    entries = (*data.adaptation.values(), *data.evaluation.values())
    rendered = [entry.name for entry in entries if entry.source.rendered]
    if rendered and opened:  # of a world that is all rendered there is nothing to be understood wrongly
        yield f"{data.path.name}: {plural(len(rendered), 'set')} of rendered pictures ({shortened(rendered)})"
    for entry, splits in opened:
        name = entry.where if entry.role == "pretraining" else entry.name
        dates = [source.dates for source in splits.values() if source.dates is not None]
        when = spanned(np.concatenate(dates)) if dates else ""
        yield "; ".join(filter(None, (f"{name}: {what(entry, splits)}", use(entry, splits), when)))


def what(entry: Entry, splits: Splits) -> str:
    """4 classes of 10 to 12 pictures (cat: a.jpg, dog: b.jpg, ...)"""
    source = next(iter(splits.values()))
    total = sum(map(len, splits.values()))
    retrieval = entry.task == "retrieval" or not source.classes
    if retrieval or entry.role == "pretraining":
        captions = next((texts for i in range(min(len(source), 20)) if (texts := source.captions(i))), [""])
        example = f" ({captions[0][:60]!r}, ...)" if captions[0] else ""
        return f"{plural(total, 'picture')} with captions{example}"
    counts = sum(np.bincount(s.labels[s.labels >= 0], minlength=len(source.classes)) for s in splits.values())
    present = counts[counts > 0]
    least, most = present.min(initial=total), present.max(initial=0)
    each = plural(int(most), "picture") if least == most else f"{least:,} to {most:,} pictures"
    labels, first = np.unique(source.labels, return_index=True)
    examples = [
        f"{source.classes[label]}: {os.path.basename(source.name_of(index))}"
        for label, index in zip(labels.tolist(), first.tolist(), strict=True)
        if label >= 0
    ]
    return f"{plural(len(present), 'class', 'classes')} of {each} ({shortened(examples)})"


def use(entry: Entry, splits: Splits) -> str:
    counts = {split: plural(len(source), "picture") for split, source in splits.items()}
    if entry.role == "pretraining":
        return "replayed"
    if entry.role == "evaluation":
        chosen = f", {counts['validation']} chosen on" if "validation" in splits else ""
        return f"{counts['test']} scored{chosen}, never trained on"
    how = ""
    if "holdout" in entry.spec:
        share = f"{entry.spec['holdout']:.0%} of every class, " if splits["train"].classes else ""
        how = f" ({share}held out)"
    chosen = f", {len(splits['validation']):,} to choose on" if "validation" in splits else ""
    return f"{counts['train']} to learn from{chosen}, {len(splits['test']):,} to test on{how}"


# --- what makes no sense ---------------------------------------------------------------------------------


class Overlap(NamedTuple):
    """Test pictures of an entry that are also trained on."""

    entry: Entry
    test: Source
    trained: str  # name of the set that is, the entry's own or another
    found: list[int]  # numbers of the pictures


def overlaps(opened: list[tuple[Entry, Splits]]) -> list[Overlap]:
    trained = {entry.name: s["train"] for entry, s in opened if entry.role == "adaptation" and "train" in s}
    shared = []
    for entry, splits in opened:
        test = splits.get("test")
        for name, train in trained.items():
            if test is None or (name == entry.name and "holdout" in entry.spec):
                continue
            if found := copies(test, train):
                shared.append(Overlap(entry, test, name, found))
    return shared


def problems(opened: list[tuple[Entry, Splits]], shared: list[Overlap]) -> Iterator[str]:
    """What an update refuses."""
    for entry, splits in opened:
        if entry.role != "pretraining" and entry.task == "classification":
            yield from of_classes(entry, splits)
    for entry, test, trained, found in shared:
        if trained == entry.name and len(found) == min(len(test), LOOKED):
            what = f"every test picture is also trained on, first: {test.name_of(found[0])}"
            yield f"{entry.where}: {what}; leave `test` out, and a tenth of train is held out"


def of_classes(entry: Entry, splits: Splits) -> Iterator[str]:
    names = next(iter(splits.values())).classes
    if len(names) == 1 and not entry.spec.get("one_class"):
        what = f"one class only ({names[0]}), so every answer is right and its score says nothing"
        remedy = "add the classes it is to be told from, or accept it: --one-class, here `one_class: true`"
        yield f"{entry.where}: {what}; {remedy}"
    if {"train", "test"} <= splits.keys():
        trained, tested = (set(splits[s].labels.tolist()) - {-1} for s in ("train", "test"))
        if trained and tested and not trained & tested:
            shown = shortened([names[label] for label in sorted(tested)])
            yield f"{entry.where}: no class of test is one of train ({shown}), so nothing learned is tested"


def leaks(shared: list[Overlap]) -> Iterator[str]:
    """What an update warns of."""
    for entry, test, trained, found in shared:
        of = f"{len(found)} of {plural(min(len(test), LOOKED), 'test picture')}"
        yield f"{entry.where}: {of} also trained on in {trained}, first: {test.name_of(found[0])}"


def copies(test: Source, train: Source) -> list[int]:
    """The numbers of the test pictures, of at most LOOKED, whose bytes are those of a picture trained on."""
    sizes, others = test.byte_sizes(), train.byte_sizes()
    if sizes is None or others is None:
        return []
    numbers = np.unique(np.linspace(0, len(test) - 1, min(LOOKED, len(test))).astype(int))
    alike = np.flatnonzero(np.isin(others, sizes[numbers]))[:COMPARED]
    digests = {digest(train, index) for index in alike.tolist()}
    return [number for number in numbers.tolist() if digests and digest(test, number) in digests]
