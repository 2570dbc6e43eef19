"""A data file from a folder: what `--data photos/` stands for, found by names alone and written down to be read.

photos/CLASS/*.jpg            class folders, also below train/ and test/ (or val/, valid/)
photos/*.jpg with *.txt       pictures with captions, likewise
photos/*.csv or *.tsv         a table with columns such as filepath, title, label; the pictures lie anywhere
photos/*.tar                  shards of .jpg with .cls or .txt

Tables and shards with test or val in their names are the test split. Without one, a tenth of every class is held
out. Nothing else is guessed: a prompt, a year, a pretraining pool can be added to the file that is written.
"""

import csv
import math
import re
import sys
from pathlib import Path

import yaml
from tqdm import tqdm

from fomo.atomic import write_atomically
from fomo.datasets import datafile
from fomo.datasets.datafile import entry, write_once
from fomo.datasets.sources.base import IMAGE_SUFFIXES, Source
from fomo.datasets.sources.folders import folders_in, pictures
from fomo.datasets.stream import concepts_of
from fomo.errors import UserError

HOLDOUT = 0.1  # of every class is the test split where there is none
# What `recipe_for` chooses:
PASSES = 10  # over the pictures
BATCHES = (16, 512)  # smallest and largest
KEEP = 0.5  # of the original in the one merge there is; its whole curve is in the report
TESTS = ("test", "val", "valid", "validation")  # the first that is there is the test split
KINDS = {".csv": "csv", ".tsv": "tsv", ".tar": "webdataset"}
COLUMNS = {  # of a table, in any case; the first that it has
    "image": ("filepath", "file_path", "image_path", "path", "file_name", "filename", "file", "image"),
    "caption": ("title", "caption", "text", "description"),
    "concept": ("concept", "category", "class_name", "classname", "class", "label"),
}
ACCEPTED = "class folders, pictures with captions in .txt files, one .csv or .tsv, or .tar shards"
PATH = re.compile(rf"\S+\.({'|'.join(IMAGE_SUFFIXES)})", re.IGNORECASE)
Splits = dict[str, list[Path]]  # train and, where there is one, test


def as_data_file(path: str | Path, folder: Path) -> Path:
    """The data file of `path`, written into `folder`; what was found is shown on standard error."""
    file = write_inferred(path, folder / "data.yaml")
    header = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ")]
    tqdm.write("\n".join([*header, f"written to {file}"]), file=sys.stderr)
    return file


def write_inferred(path: str | Path, out: Path) -> Path:
    """Write what `infer` finds, below a few lines about it."""
    content = infer(path)
    lines = [f"Inferred from {str(Path(path).resolve())!a}", *summary(content, Path(path))]
    header = "".join(f"# {line}\n" for line in lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (header + yaml.safe_dump(content, sort_keys=False)).encode())
    return out


def infer(path: str | Path) -> dict:
    """The content of a data file: one set to learn, from a folder, a table or a shard."""
    path = Path(path).expanduser().resolve()
    source, splits = in_folder(path) if path.is_dir() else in_file(path)
    spec: dict = {"source": source}
    for split, files in splits.items():
        spec[split] = str(files[0]) if len(files) == 1 else [str(file) for file in files]
    if "test" not in splits:
        spec["holdout"] = HOLDOUT
    if source in ("csv", "tsv"):
        spec |= columns_of(splits["train"])
    name = (path.name if path.is_dir() else path.stem) or "data"
    train = opened(name, spec, path, "train")
    nameless = [n for n in set(train.labels.tolist()) if n >= 0 and train.classes[n] == f"class {n}"]
    if source == "webdataset" and nameless:
        problem = f"label {nameless[0]} has no name: no classes.txt beside the shard, no caption"
        raise UserError(f"{path}: {problem}")
    if not train.classes:
        spec["task"] = "retrieval"
        if not train.caption_counts().any():
            raise UserError(f"{path}: neither classes nor captions, accepted: {ACCEPTED}")
    return {"adaptation": {name: spec}}


def opened(name: str, spec: dict, path: Path, split: str) -> Source:
    return entry(name, "adaptation", spec, path).open(split)


def in_file(path: Path) -> tuple[str, Splits]:
    """The kind of source of a single file; a file beside it that has its name but for `test` is the test split."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if suffix not in KINDS:
        raise UserError(f"{path}: expected a data file (.yaml), or {ACCEPTED}")
    beside = [file for file in visible(path.parent) if file.suffix.lower() == suffix and file != path]
    tests = [file for file in beside if split_of(file) != "train" and stem_of(file) in ("", stem_of(path))]
    return KINDS[suffix], {"train": [path], **by_name(path, tests)}


def in_folder(root: Path) -> tuple[str, Splits]:
    """The kind of source that a folder is, and the files or folders of its splits."""
    below = {entry.name: Path(entry.path) for entry in folders_in(root)}
    splits = {name: folder for name, folder in below.items() if name.lower() in ("train", *TESTS)}
    if "train" in map(str.lower, splits):
        return in_split_folders(root, below, sorted(splits.values()))
    for folder in splits.values():
        if any(holds_pictures(Path(inner.path)) for inner in folders_in(folder)):
            raise UserError(f"{root}: {folder.name}/ holds class folders, but no train/ is beside it")
    kind, files = kind_of(root)
    if kind == "folder":
        return kind, {"train": files}
    splits = by_name(root, files)
    if "train" not in splits:
        raise UserError(f"{root}: only test files ({files[0].name}), there is nothing to learn")
    return kind, splits


def in_split_folders(root: Path, below: dict[str, Path], folders: list[Path]) -> tuple[str, Splits]:
    for other in below.values():
        if other not in folders and holds_pictures(other):
            raise UserError(f"{root}: {other.name}/ is beside train/, but is neither a split nor in one")
    splits = {split: kind_of(files[0]) for split, files in by_name(root, folders).items()}
    kinds = {kind for kind, _ in splits.values()}
    if len(kinds) > 1:
        raise UserError(f"{root}: its splits hold different kinds of data: {', '.join(sorted(kinds))}")
    return kinds.pop(), {split: files for split, (_, files) in splits.items()}


def kind_of(folder: Path) -> tuple[str, list[Path]]:
    """The kind of source in one folder, and its files, or the folder itself if it is pictures."""
    kinds: Splits = {}
    for file in visible(folder):
        if file.suffix.lower() in KINDS:
            kinds.setdefault(KINDS[file.suffix.lower()], []).append(file)
    tables = [file for kind in ("csv", "tsv") for file in kinds.pop(kind, [])]
    for file in tables:
        if "image" in columns_in(file):  # a table of something else may lie beside pictures
            kinds.setdefault(KINDS[file.suffix.lower()], []).append(file)
    if holds_pictures(folder) and not kinds.keys() & {"csv", "tsv"}:  # those tables list the pictures
        kinds["folder"] = [folder]
    if not kinds and tables:
        kinds[KINDS[tables[0].suffix.lower()]] = tables[:1]  # `columns_of` says what it lacks
    if not kinds:
        raise UserError(f"{folder}: nothing to learn from in it, accepted: {ACCEPTED}")
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({files[0].name})" for kind, files in kinds.items())
        remedy = "name the file or folder that is meant"
        raise UserError(f"{folder}: more than one kind of data: {found}; {remedy}")
    return kinds.popitem()


def by_name(path: Path, files: list[Path]) -> Splits:
    """Files or folders by the split in their names. Of several kinds of test split one is used."""
    named: Splits = {}
    for file in files:
        named.setdefault(split_of(file), []).append(file)
    tests = [name for name in TESTS if name in named]
    for unused in tests[1:]:
        note = f"{named[unused][0].name} is left out, the test split is {named[tests[0]][0].name}"
        write_once(f"{path}: {note}")
    splits = {"train": named.get("train"), "test": named.get((*tests, None)[0])}
    return {split: files for split, files in splits.items() if files}


def split_of(file: Path) -> str:
    words = words_of(file)
    return next((name for name in TESTS if name in words), "train")


def stem_of(file: Path) -> str:
    """Its name without the word for a split: that of shop.csv and shop_test.csv is the same."""
    return "_".join(word for word in words_of(file) if word not in ("train", *TESTS))


def words_of(file: Path) -> list[str]:
    return re.findall("[a-z]+|[0-9]+", file.stem.lower())


def visible(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def holds_pictures(folder: Path) -> bool:
    return next(pictures(folder, folder), None) is not None


def columns_in(table: Path) -> dict[str, str]:
    """What a table's columns are called: `image`, `caption`, `concept` -> the name as written."""
    names = {name.strip().lower(): name for name in reversed(header(table))}
    return {what: names[name] for what, known in COLUMNS.items() for name in known[::-1] if name in names}


def header(table: Path) -> list[str]:
    separator = {"csv": ",", "tsv": "\t"}[KINDS[table.suffix.lower()]]
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file, delimiter=separator), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: not a readable table: {error}") from None


def columns_of(tables: list[Path]) -> dict:
    """The fields of a table's entry."""
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise UserError(f"{tables[0].parent}: more than one table: {names}; name the one that is meant")
    columns = columns_in(tables[0])
    if "image" not in columns:
        names = header(tables[0])
        hint = "; is the separator right?" if len(names) == 1 else ""
        accepted, has = ", ".join(COLUMNS["image"]), ", ".join(names) or "none"
        raise UserError(f"{tables[0]}: no column of pictures, it has: {has}; accepted: {accepted}{hint}")
    return {"caption": None, **columns}


def summary(content: dict, path: Path) -> list[str]:
    """What a run would make of it, a line each; opens both splits."""
    lines = []
    for name, spec in content["adaptation"].items():
        train, test = (opened(name, spec, path, split) for split in ("train", "test"))
        concepts = f"{len(train.classes)} classes" if train.classes else "captions"
        how = "held out" if "holdout" in spec else "in the test split"
        lines.append(f"{name!a}: {concepts}, {len(train)} pictures to learn from, {len(test)} {how}")
        lines += useless_captions(train)
    return lines


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


def is_data_file(path: str) -> bool:
    """Whether `--data` is a data file already, not a folder, a table or a shard to look into."""
    return Path(path).suffix in (".yaml", ".yml")


def recipe_for(file: Path) -> dict:
    """Parts of a recipe that suit a few pictures without a pretraining pool; `defaults` are those of a scale.

    One update of PASSES passes, in batches that are a power of two and at most a quarter of the pictures.
    """
    pictures = sum(concepts_of(datafile.read(file))[1])
    smallest, largest = BATCHES
    batch = min(max(2 ** int(math.log2(max(pictures / 4, 1))), smallest), largest)
    return {
        "stream": {"updates": 1},
        "optimizer": {"batch_size": batch},
        "budget": {"steps": math.ceil(PASSES * pictures / batch)},
        "defaults": {"keep": KEEP},
    }
