"""What a line should say before anything is trained: what a model will not get of the data, or cannot tell apart.

`data check` says it of everything; a dry run and the start of an update look at LOOKED pictures of each split, of
which only the headers are read.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import open_clip

from fomo.architectures import LOCAL, tokenizer_of
from fomo.budget.flops_memory import parameter_count
from fomo.budget.mafs import architecture
from fomo.datasets.datafile import DataFile, Entry
from fomo.datasets.sources.base import UNREADABLE, Source, peculiarities
from fomo.datasets.stream import plain
from fomo.errors import UserError
from fomo.recipe import Model
from fomo.text import plural, shortened

LOOKED = 1000
LONGEST = 16  # contexts up to which a caption's tokens are counted
CODE = re.compile(
    r"[\W_]*(((class|cls|label|category|cat|id)[\s_-]*)?\d+(\.\d+)?|[a-z][\s_-]?\d{4,})[\W_]*", re.IGNORECASE
)
NUMBERED = re.compile(r"([a-z]+)[\s_-]*0*(\d+)", re.IGNORECASE)
PICTURES = {
    "turned": "carry an EXIF orientation, by which open_clip turns nothing, so nothing is turned here; to turn "
    "the files: mogrify -auto-orient",
    "transparent": "are transparent, and open_clip shows what lies below, often black; to put them on white: "
    "mogrify -background white -alpha remove -alpha off",
    "deep": "have 16 or 32 bits a channel, of which open_clip makes white all above 255 and black all below 1, so "
    "values from 0 to 1 are black all over; to scale them: mogrify -depth 8",
}


@dataclass(frozen=True)
class Reader:
    """The model that the data is for; without arguments any CLIP."""

    config: dict = field(default_factory=dict)  # open_clip's model_cfg
    tokenizer: Callable | None = field(default_factory=open_clip.SimpleTokenizer)  # None: it is not here
    own: bool = False  # pretrained by us, on rendered pictures


def reader_of(model: Model) -> Reader:
    """Of a recipe's model. No weights are read; what the hub has may be fetched."""
    config = architecture(model)
    place = Path((model.name or "").removeprefix(LOCAL) or model.pretrained or "")
    try:
        tokenizer = tokenizer_of({"model_cfg": config}, place if place.is_dir() else None, "model")
    except UserError:
        tokenizer = None
    return Reader(config, tokenizer, own=not (model.name or model.pretrained))


def glance(data: DataFile, reader: Reader, opened: list[tuple[Entry, dict[str, Source]]]) -> list[str]:
    """All remarks on what understood.open_all has opened, from a part of every split."""
    lines = of_model(data, reader)
    for entry, sources in opened:
        for split, source in sources.items():
            numbers = np.unique(
                np.linspace(0, len(source) - 1, min(LOOKED, len(source))).astype(int)
            ).tolist()
            lines += of_pictures(f"{entry.where} ({split})", counted(source, numbers), len(numbers), source)
            lines += of_texts(entry, split, source, numbers, reader)
        lines += of_classes(entry, sources)
    return lines


def of_model(data: DataFile, reader: Reader) -> list[str]:
    lines, side = [], reader.config.get("vision_cfg", {}).get("image_size", 224)
    if reader.config and data.image_size not in (None, side):
        what = f"{data.image_size} is the side of cached pictures, the model still sees {side} and not more"
        remedy = "pictures are resized twice, so scores differ from the deployed model's: leave it out"
        lines.append(f"{data.path}: image_size: {what}; {remedy}")
    entries = (*data.pretraining, *data.adaptation.values(), *data.evaluation.values())
    if reader.own and not all(entry.source.rendered for entry in entries):
        size = f"{parameter_count(reader.config) / 1e6:.1f} M parameters"
        what = f"the model has {size} and has only seen rendered pictures: it knows nothing of photographs"
        lines.append(f"{what}; take one that does, as --model ViT-B-32/laion2b_s34b_b79k")
    if "multimodal_cfg" in reader.config:
        what = "its picture and text towers are trained, its captioner is not and no longer fits them"
        lines.append(f"the model is a CoCa: {what}: use the update for features, not to write captions")
    if reader.tokenizer is None:
        name = reader.config["text_cfg"].get("hf_tokenizer_name", "its own")
        lines.append(f"the tokenizer {name} cannot be had here, so nobody knows how many captions it cuts")
    return lines


def of_batches(batch_size: int, draws: Iterable[tuple[str, int, int]]) -> list[str]:
    """On batches that are larger than what they are drawn from, a line for each pool, on its worst update.

    draws: of each update and pool its name, the pairs that a batch has of it, and its pictures.
    """
    fewest: dict[str, tuple[float, int, int]] = {}
    for pool, pairs, pictures in draws:
        if pairs > pictures > 0:
            fewest[pool] = max(fewest.get(pool, (0.0, 0, 0)), (pairs / pictures, pairs, pictures))
    remedy = "in the loss equal pairs are wrong answers to each other: lower optimizer.batch_size"
    return [
        f"a batch of {batch_size} holds {pairs} pairs of the {pool}'s {pictures} pictures: "
        f"each about {times:.{times < 10:d}f} times; {remedy}"
        for pool, (times, pairs, pictures) in fewest.items()
    ]


def counted(source: Source, numbers: Iterable[int]) -> Counter:
    """How many of the pictures are what, by the keys of PICTURES."""
    found: Counter = Counter()
    for index in numbers:
        try:
            with source.image(index) as image:
                found.update(peculiarities(image))
        except UNREADABLE:
            pass  # counted where pictures are decoded
    return found


def of_pictures(name: str, found: Counter, looked: int, source: Source) -> list[str]:
    of = looked_at(looked, len(source))
    return [f"{name}: {found[kind]} of {of}pictures {text}" for kind, text in PICTURES.items() if found[kind]]


def looked_at(looked: int, total: int) -> str:
    return f"{looked} " if looked == total else f"{looked} looked at among {total} "


def of_texts(entry: Entry, split: str, source: Source, numbers: Sequence[int], reader: Reader) -> list[str]:
    """On the captions of pictures. Of a test set that is scored by class names there are none."""
    retrieval = entry.task == "retrieval" or not source.classes
    if split == "test" and not retrieval:
        return []
    name, lines = f"{entry.where} ({split})", []
    texts = [source.captions(index) for index in numbers]
    count = sum(map(len, texts))
    of = f"{count} captions" + (
        "" if len(numbers) == len(source) else f" of {len(numbers)} pictures looked at"
    )
    if lengths := lengths_of_cut([text for own in texts for text in own], reader):
        context, share = reader.tokenizer.context_length, len(lengths) / count
        what = f"are longer than the {context} tokens that the model reads, the longest has {max(lengths)}"
        remedy = "the rest is cut off: shorten them, or put first what matters"
        lines.append(f"{name}: {len(lengths)} of {of} ({share:.1%}) {what}; {remedy}")
    owners = Counter(text for own in texts for text in set(own))
    if retrieval and (shared := {text: n for text, n in owners.items() if n > 1}):
        first = next(iter(shared))[:60]
        what = f"belong to several pictures, of which only one counts as right, first: {first!r}"
        lines.append(f"{name}: {sum(shared.values())} of {of} {what}; make them differ, or say classes")
    return lines


def lengths_of_cut(texts: list[str], reader: Reader) -> list[int]:
    """How many tokens the texts have that do not fit the model's context."""
    if reader.tokenizer is None:
        return []
    context, lengths = reader.tokenizer.context_length, []
    texts = [
        text for text in texts if len(text.encode("utf-8", "replace")) > context - 2
    ]  # a token is a byte or more
    for start in range(0, len(texts), LOOKED):
        rows = reader.tokenizer(texts[start : start + LOOKED], context_length=LONGEST * context)
        used = rows != rows[:, -1:]  # what stands at the very end is padding
        places = np.arange(1, rows.shape[1] + 1)
        lengths += (used.numpy() * places).max(1).tolist()
    return [length for length in lengths if length > context]


def codes_among(names: list[str]) -> list[str]:
    """Names that are codes; c0, c1, c2, ... are, where all names of a set are so."""
    parts = [match.groups() for match in map(NUMBERED.fullmatch, names) if match]
    numbers = sorted(int(number) for _, number in parts)
    in_a_row = numbers in (list(range(len(names))), list(range(1, len(names) + 1)))
    if len(names) > 2 and in_a_row and len({word for word, _ in parts}) == 1:
        return names
    return [name for name in names if CODE.fullmatch(name)]


def of_classes(entry: Entry, splits: dict[str, Source]) -> list[str]:
    """On the class names of a dataset, which all its splits share."""
    sources = list(splits.values())
    names = sources[0].classes if sources else []
    lines, of = [], f"of {len(names)} class names"
    if codes := codes_among(names):
        remedy = (
            "a text tower knows words: rename the folders or values, or write a classes.txt beside shards"
        )
        lines.append(f"{len(codes)} {of} are codes or numbers, first: {codes[0]!r}; {remedy}")
    alike = Counter(map(plain, set(names)))
    if twins := [name for name in names if alike[plain(name)] > 1]:
        what = f"differ from another only in case or underscores, first: {twins[0]!r}"
        lines.append(f"{len(twins)} {of} {what}; make one class of them, or name what differs")
    if entry.role != "pretraining" and entry.task == "classification" and names:
        present = {label for source in sources for label in np.unique(source.labels).tolist()}
        empty = [name for label, name in enumerate(names) if label not in present]
        if empty and not sources[0].rendered:
            what = f"have no picture, first: {empty[0]!r}"
            lines.append(f"{len(empty)} {of} {what}; each is a wrong answer more: list what there is")
        lines += one_sided(names, splits)
    return [f"{entry.where}: {line}" for line in lines]


def one_sided(names: list[str], splits: dict[str, Source]) -> list[str]:
    """Lines on classes that only one of train and test has."""
    if not {"train", "test"} <= splits.keys():
        return []
    trained, tested = (set(splits[split].labels.tolist()) - {-1} for split in ("train", "test"))
    lines = []
    for only, what in (
        (tested - trained, "scored but never trained"),
        (trained - tested, "trained but never scored"),
    ):
        if only:
            count = plural(len(only), "class is", "classes are")
            lines.append(f"{count} {what}: {shortened([names[label] for label in sorted(only)])}")
    return lines
