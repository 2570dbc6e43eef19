"""A data file from a folder: what `--data photos/` stands for, found by names and written down to be read.

What a folder may be is in layouts.py. Without a test split a tenth of every class is held out. Nothing else is
guessed: a prompt, a year, a pretraining pool can be added to the file that is written.
"""

import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from tqdm import tqdm

from fomo.atomic import write_atomically
from fomo.datasets import datafile
from fomo.datasets.datafile import HOLDOUT, entry
from fomo.datasets.layouts import ACCEPTED, Layout, layout_of
from fomo.datasets.sources.base import IMAGE_SUFFIXES, Part, PictureFiles, Source
from fomo.datasets.sources.folders import Tree
from fomo.datasets.stream import concepts_of
from fomo.errors import UserError
from fomo.text import plural

# What `recipe_for` chooses:
PASSES = 20  # over the pictures, at most: validation decides
BATCHES = (16, 512)  # smallest and largest
ENOUGH = 150  # pictures, of which a tenth can be spared to choose on
UNCHOSEN = {"passes": 10, "keep": 0.5}  # of fewer
PATH = re.compile(rf"\S+\.({'|'.join(IMAGE_SUFFIXES)})", re.IGNORECASE)


def as_data_file(path: str | Path, folder: Path, one_class: bool = False) -> Path:
    """The data file of `path`, written into `folder`; what was found is shown on standard error."""
    file = write_inferred(path, folder / "data.yaml", one_class)
    header = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
    tqdm.write("\n".join(header), file=sys.stderr)
    return file


@contextmanager
def given(path: str | Path | None) -> Iterator[Path | None]:
    """A data file as it is, and for a folder, a table or a shard one that is there as long as it is needed."""
    if path is None or is_data_file(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield as_data_file(path, Path(folder))


def write_inferred(path: str | Path, out: Path, one_class: bool = False) -> Path:
    """Write what `infer` finds, below a few lines about it."""
    content, notes = infer(path, one_class)
    lines = [f"Inferred from {str(Path(path).resolve())!a}", *notes]
    header = "".join(f"# {line}\n" for line in lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (header + yaml.safe_dump(content, sort_keys=False)).encode())
    return out


def infer(path: str | Path, one_class: bool = False) -> tuple[dict, list[str]]:
    """-> the content of a data file, one set to learn, from a folder, a table or a shard; and notes on it.

    one_class: a single class is accepted.
    """
    if not str(path):
        raise UserError("--data: an empty path, expected a data file, a folder, a table or a shard")
    path = Path(path).expanduser().resolve()
    layout = layout_of(path)
    spec = {**layout.spec, **({"one_class": True} if one_class else {})}
    if "path" not in spec and "test" not in spec and spec["source"] != "clip_benchmark":
        spec["holdout"] = HOLDOUT
    name = (path.name if path.is_dir() else path.stem) or "data"
    train = opened(name, spec, path, "train")
    nameless = [n for n in set(train.labels.tolist()) if n >= 0 and train.classes[n] == f"class {n}"]
    if spec["source"] == "webdataset" and nameless:
        problem = f"label {nameless[0]} has no name: no classes.txt beside the shard, no caption"
        raise UserError(f"{path}: {problem}")
    if not train.classes:
        spec["task"] = "retrieval"
        if not train.caption_counts().any():
            packed = "; a folder that was packed as .tar is to be unpacked" * (spec["source"] == "webdataset")
            raise UserError(f"{path}: neither classes nor captions, accepted: {ACCEPTED}{packed}")
    test = opened(name, spec, path, "test")
    notes = [*dict.fromkeys(layout.notes), *unused(layout, [train, test]), *useless_captions(train)]
    return {"adaptation": {name: spec}}, notes


def opened(name: str, spec: dict, path: Path, split: str) -> Source:
    return entry(name, "adaptation", spec, path).open(split)


def unused(layout: Layout, sources: list[Source]) -> list[str]:
    """Lines about what lies beside the pictures of a table and is in no row."""
    if ("concept" not in layout.spec and "caption" not in layout.spec) or layout.root is None:
        return []
    tree, used = Tree.of(layout.root), set()
    for source in sources:
        files = source.whole if isinstance(source, Part) else source
        if isinstance(files, PictureFiles):
            used |= {os.path.realpath(files.path_of(index)) for index in range(len(files))}
    left = [file for file in tree.all_pictures() if os.path.realpath(file) not in used]
    count = plural(len(left), "picture is", "pictures are")
    return [f"{count} in no row, first: {tree.relative(left[0])}"] if left else []


def useless_captions(source: Source) -> list[str]:
    """Lines about captions that say nothing, counted."""
    empty, paths = [], []
    for index in range(len(source)):
        captions = source.captions(index)
        if not captions and not source.classes:
            empty.append(index)
        if any(map(PATH.fullmatch, captions)):
            paths.append(index)
    kinds = (("have no caption", empty), ("have a caption that is only a file's path", paths))
    return [
        f"{len(numbers)} of {len(source)} {what}, first: {source.name_of(numbers[0])!a}"
        for what, numbers in kinds
        if numbers
    ]


def is_data_file(path: str | Path) -> bool:
    """Whether `--data` is a data file already, not a folder, a table or a shard to look into."""
    return Path(path).suffix in (".yaml", ".yml")


def recipe_for(file: Path, updates: int = 1) -> dict:
    """Parts of a recipe that suit a few pictures without a pretraining pool; `defaults` are those of a scale.

    Each of the updates, which share the pictures, has batches that are a power of two and at most a quarter of its
    pictures. How many passes, and the share of the old model in its merge, are chosen on validation pictures if
    there are enough.
    """
    pictures = sum(concepts_of(datafile.read(file))[1])
    enough, (smallest, largest) = pictures >= ENOUGH, BATCHES
    pictures /= updates
    batch = min(max(2 ** int(math.log2(max(pictures / 4, 1))), smallest), largest)
    passes = PASSES if enough else UNCHOSEN["passes"]
    return {
        "stream": {"updates": 1},
        "optimizer": {"batch_size": batch},
        "budget": {"steps": math.ceil(passes * pictures / batch), "auto": enough},
        "defaults": {"keep": "auto" if enough else UNCHOSEN["keep"]},
    }
