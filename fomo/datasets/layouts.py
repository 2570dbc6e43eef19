"""What a folder or a file of data is, by what lies in it. Everything that is there is used, or told, or refused.

photos/CLASS/*.jpg          class folders, all at one depth; also below train/ and test/ (or val/, seg_test/, ...)
photos/*.jpg with *.txt     pictures with captions, likewise
photos/*.csv                a table, or .tsv, .jsonl, .json, .parquet; the pictures lie anywhere below photos/
photos/*.tar                shards of .jpg with .cls or .txt; or the layout of CLIP_benchmark
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from fomo.datasets.annotations import HARMLESS, is_table, refuse_annotations, tables_in
from fomo.datasets.columns import CLOSED, SOURCES, Look, look_at
from fomo.datasets.sources.folders import Tree, skipped_files
from fomo.datasets.sources.split_names import TESTS, TRAIN, chosen_test, split_in, words_of
from fomo.datasets.sources.tables import Ends
from fomo.datasets.sources.webdataset import NAMES_FILES
from fomo.errors import UserError
from fomo.text import plural, shortened

ACCEPTED = (
    "class folders, pictures with captions in .txt files, "
    "a table (.csv, .tsv, .jsonl, .json, .parquet), or .tar shards"
)
UNPACK = {".zip": "unzip", ".7z": "7z x", ".rar": "unrar x", ".tgz": "tar xf", ".gz": "gunzip, or tar xf"}
UNPACK |= {".bz2": "tar xf", ".xz": "tar xf", ".zst": "tar xf"}
# Words of folders that say what kind of thing is in them, not of what class.
GENERIC = {"image", "img", "picture", "photo", "mask", "label", "annotation", "trimap", "jpeg", "jpg", "png"}
GENERIC |= {"data", "dataset", "set", "seg", "segmentation", "class", "object", "ground", "truth", "gt"}
GENERIC |= {f"{word}s" for word in GENERIC}
# Folders of cameras and of those who sort by date: 2024, 2024-05, 2024/05/01, 100APPLE.
DATED = re.compile(r"(.*/)?((19|20)\d\d([-_./ ]?[01]\d([-_./ ]?[0-3]\d)?)?|\d{3}[A-Z_]{5})")
BOXES = re.compile(r"\d+( -?\d*\.?\d+){4,}")  # a line of YOLO
SOME = 1000  # captions that are looked at


@dataclass
class Layout:
    """spec: an entry of a data file; notes: what was decided or left out, a line each; root: where it all lies."""

    spec: dict
    notes: list[str] = field(default_factory=list)
    root: Path | None = None


def layout_of(path: Path) -> Layout:
    """Of a folder, a table or a shard. A UserError says what is in the way, and the remedy."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    layout = in_folder(path) if path.is_dir() else in_file(path)
    for split in ("train", "test", "path"):
        files = layout.spec.get(split)
        if isinstance(files, list):
            layout.spec[split] = str(files[0]) if len(files) == 1 else [str(file) for file in files]
    return layout


def in_folder(path: Path) -> Layout:
    tree, notes = unwrapped(Tree.of(path))
    if any("nshards.txt" in folder.others for folder in tree.folders):
        layout = Layout({"source": "clip_benchmark", "root": str(tree.path)})
    else:
        splits, left_out = split_folders(tree)
        within = [folder.path for folder in splits.values()]
        tables = tables_in(tree)
        loose = [file for file in tables if not any(folder in file.parents for folder in within)]
        layout = in_split_folders(tree, splits) if splits and not loose else in_one(tree, tables)
        notes += left_out if splits and not loose else []
    layout.notes, layout.root = notes + layout.notes, tree.path
    return layout


def unwrapped(tree: Tree) -> tuple[Tree, list[str]]:
    """Into the folder that is all there is, as of an archive that was unpacked into a folder of its name."""
    notes = []
    while not tree.pictures and len(tree.folders) == 1 and all(map(HARMLESS.fullmatch, tree.others)):
        (inner,) = tree.folders
        if not any(folder.content or folder.others for folder in inner.walk()):
            break
        if inner.content and not inner.folders and not captions_in(inner):  # pictures of one class
            break
        if split_in(inner.name) in TESTS:
            break
        tree = Tree.of(inner.path)
        notes = [f"read: {tree.path}, the only folder there"]
    return tree, notes


def captions_in(tree: Tree) -> list[str]:
    """The names of the `.txt` files that belong to pictures."""
    stems = {os.path.splitext(name)[0] for name in tree.pictures}
    return [n for n in tree.others if n.lower().endswith(".txt") and n[:-4] in stems]


# --- splits ----------------------------------------------------------------------------------------------


def split_folders(tree: Tree) -> tuple[dict[str, Tree], list[str]]:
    """The folders of the splits, train and where there is one test; and which test split is left out."""
    kinds = {folder.name: split_in(folder.name) for folder in tree.folders if folder.content or folder.others}
    groups: dict[tuple, dict[str, Tree]] = {}
    for folder in tree.folders:
        if kind := kinds.get(folder.name):
            groups.setdefault(rest_of(folder.name), {})[kind] = folder
    # train beside anything else; seg_train only beside seg_test, for it may be a class as well
    found = next((g for rest, g in groups.items() if "train" in g and (not rest or len(g) > 1)), {})
    if not found:
        for folder in groups.get((), {}).values():
            if folder.folders and any(inner.holds_pictures() for inner in folder.folders):
                raise UserError(
                    f"{tree.path}: {folder.name}/ holds class folders, but no train/ is beside it"
                )
        return {}, []
    for folder in tree.folders:
        if folder not in found.values() and folder.holds_pictures():
            problem = f"{folder.name}/ is beside {found['train'].name}/, but is neither a split nor in one"
            raise UserError(f"{tree.path}: {problem}; move it away, or name the folder that is meant")
    test = chosen_test(found)
    left_out = [f for kind, f in found.items() if kind not in ("train", test)]
    notes = [f"{folder.name} is left out, the test split is {found[test].name}" for folder in left_out]
    return {
        split: found[kind] for split, kind in (("train", "train"), ("test", test)) if kind in found
    }, notes


def rest_of(name: str) -> tuple[str, ...]:
    """What a name says besides its split: () of train2017 and Training_images, (seg,) of seg_train."""
    words = words_of(name)
    known = {*TRAIN, *TESTS, *(GENERIC - {"seg"})}
    return tuple(word for word in words if word not in known and not word.isdigit())


def in_split_folders(tree: Tree, splits: dict[str, Tree]) -> Layout:
    parts = {}
    for split, folder in splits.items():
        try:
            part = Tree.of(folder.path)
            parts[split] = in_one(part, tables_in(part))
        except UserError as error:
            if split == "train":
                raise
            remedy = f"name {splits['train'].path}, of which a tenth is held out"
            why = str(error).partition("; accepted")[0]
            raise UserError(f"{why}; as it cannot be the test split, {remedy}") from None
    kinds = sorted({part.spec["source"] for part in parts.values()})
    if len(kinds) > 1:
        raise UserError(f"{tree.path}: its splits hold different kinds of data: {', '.join(kinds)}")
    train, *tests = parts.values()
    for test in tests:
        train.notes += dates_of_one(train.spec, test.spec)
        compare_fields(tree.path, train.spec, test.spec)
        train.spec["test"] = test.spec["train"]
        train.notes += test.notes
    return train


def compare_fields(path: Path, train: dict, test: dict) -> None:
    """What an entry says of both splits must be true of both."""
    differing = [
        key
        for key in sorted((train.keys() | test.keys()) - {"train", "test"})
        if train.get(key) != test.get(key)
    ]
    if differing:
        found = "; ".join(f"{key}: {train.get(key)} and {test.get(key)}" for key in differing)
        raise UserError(f"{path}: train and test are not of one form: {found}")


def dates_of_one(*fields: dict) -> list[str]:
    """Take out a column of dates that only one split has; -> a note on it."""
    columns = {found.get("date") for found in fields}
    if len(columns) == 1:
        return []
    for found in fields:
        found.pop("date", None)
    return [f"dates are not used, only one split has the column {column}" for column in columns - {None}]


def by_name(path: Path, files: list[Path]) -> tuple[dict[str, list[Path]], list[str]]:
    """Files by the split in their names; of several kinds of test split one is used, the others are noted."""
    named: dict[str, list[Path]] = {}
    for file in files:
        named.setdefault(split_in(file.stem) or "train", []).append(file)
    test = chosen_test(named)
    notes = [
        f"{named[unused][0].name} is left out, the test split is {named[test][0].name}"
        for unused in named
        if unused not in ("train", test)
    ]
    if "train" not in named:
        raise UserError(f"{path}: only test files ({files[0].name}), there is nothing to learn")
    return {"train": named["train"], **({"test": named[test]} if test else {})}, notes


# --- what is in one folder -------------------------------------------------------------------------------


def in_one(tree: Tree, tables: list[Path]) -> Layout:
    """tables: what `tables_in` finds in it."""
    shards = [folder.path / n for folder in tree.walk() for n in folder.others if n.lower().endswith(".tar")]
    if shards:  # which have their texts with them, so a table beside them is only told
        if tree.holds_pictures():
            kinds = f"webdataset ({shards[0].name}), folder ({tree.name})"
            remedy = "name the file or folder that is meant"
            raise UserError(f"{tree.path}: more than one kind of data: {kinds}; {remedy}")
        splits, notes = by_name(tree.path, shards)
        return Layout({"source": "webdataset", **splits}, [*notes, *beside(tree, {".tar", *NAMES_FILES})])
    refuse_annotations(tree)
    if tables:
        layout = in_tables(tree, tables)
        layout.notes += beside(tree, {file.suffix.lower() for file in tables})
        return layout
    if tree.holds_pictures():
        return in_pictures(tree)
    kinds = Counter(os.path.splitext(n)[1].lower() or n for folder in tree.walk() for n in folder.others)
    packed = next((n for folder in tree.walk() for n in folder.others if packing(n)), None)
    if packed:
        raise UserError(f"{tree.path}: {packed} is packed; unpack it ({packing(packed)}) and name the folder")
    holds = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(4)) or "nothing"
    raise UserError(f"{tree.path}: nothing to learn from in it (it holds: {holds}), accepted: {ACCEPTED}")


def beside(tree: Tree, used: set[str]) -> list[str]:
    """A note on files that are neither pictures nor of the kinds that are used."""
    note = skipped_files(tree, used)
    return [note] if note else []


def packing(name: str) -> str | None:
    """What unpacks a file; None if it is not packed."""
    return UNPACK.get(os.path.splitext(name)[1].lower())


def in_pictures(tree: Tree) -> Layout:
    """Class folders, all at one depth; or pictures with captions, in folders that are no classes."""
    depths: dict[int, str] = {}
    counts: Counter = Counter()
    for file in map(tree.relative, tree.all_pictures()):
        depth = file.count(os.sep)
        depths.setdefault(depth, file)
        counts[depth] += 1
    loose = counts.pop(0, 0)
    if not counts:
        return flat(tree)
    holders = [folder for folder in tree.walk() if folder.pictures and folder is not tree]
    if all(map(captions_in, holders)) and all(is_no_class(f.name) or f.name.isdigit() for f in holders):
        return Layout({"source": "folder", "train": [tree.path], "level": 0})
    if all(is_no_class(tree.relative(folder.path)) for folder in holders):
        names = shortened([f"{tree.relative(folder.path)}/" for folder in holders])
        what = (
            "all pictures lie in" if len(holders) == 1 else "no classes, but kinds of files, dates or splits:"
        )
        raise UserError(f"{tree.path}: {what} {names}{unread(tree)}; accepted: {ACCEPTED}")
    if len(counts) > 1:
        some = ", ".join(depths[depth] for depth in sorted(counts)[:2])
        spec = f"{{source: folder, train: {tree.path}, level: {min(counts)}}}"
        remedy = f"bring them to one depth, or say in a data file which are the classes: {spec}"
        raise UserError(f"{tree.path}: pictures lie at several depths of folders ({some}): {remedy}")
    (level,) = counts
    if loose >= counts[level]:
        what = f"{plural(loose, 'picture')} in no class folder (first: {depths[0]}), {counts[level]} in one"
        raise UserError(f"{tree.path}: {what}; move them into class folders, or away")
    classes = [folder for folder in tree.at(level) if folder.holds_pictures()]
    notes = []
    if level > 1:
        names = shortened([folder.name for folder in classes])
        notes = [f"the classes are the folders {level} levels down ({names})"]
    return Layout(
        {"source": "folder", "train": [tree.path], **({"level": level} if level > 1 else {})}, notes
    )


def is_no_class(path: str) -> bool:
    """Whether a folder's name says of what kind, of which split or when taken its content is."""
    name = os.path.basename(path)
    words = [word for word in words_of(name) if not word.isdigit()]
    kind = words and all(word in {*GENERIC, *TRAIN, *TESTS} for word in words)
    return bool(kind or DATED.fullmatch(path))


def flat(tree: Tree) -> Layout:
    texts = captions_in(tree)
    boxes = [name for name in texts[:SOME] if BOXES.match((tree.path / name).read_text("utf-8", "replace"))]
    if boxes:
        raise UserError(
            f"{tree.path}: {boxes[0]} holds boxes (YOLO), not captions; cut them out as class folders"
        )
    if not texts:
        count = plural(len(tree.pictures), "picture")
        problem = f"{count}, neither class folders nor a .txt with a caption beside a picture"
        raise UserError(f"{tree.path}: {problem}{unread(tree)}; accepted: {ACCEPTED}")
    return Layout({"source": "folder", "train": [tree.path]})


def unread(tree: Tree) -> str:
    """The kinds of files that may hold what is missing."""
    kinds = Counter(os.path.splitext(n)[1].lower() for folder in tree.walk() for n in folder.others)
    found = [suffix for suffix in (".xml", ".json", ".txt", ".mat") if kinds[suffix]]
    return f"; annotations in {', '.join(found)} files are not read" if found else ""


# --- tables ----------------------------------------------------------------------------------------------


def look_at_all(files: list[Path], tree: Tree) -> list[Look]:
    ends = cache(lambda root: Ends(str(root)))  # one walk through a folder for all tables
    return [look(file, tree, ends) for file in files]


def look(file: Path, tree: Tree, ends: Callable[[Path], Ends]) -> Look:
    if file.suffix.lower() == ".json" and not is_table(file):
        return Look(file, problem="speaks of pictures or classes, and is not read here")
    beside = split_in(file.stem) or "train"
    of_split = [folder.path for folder in tree.folders if split_in(folder.name) == beside]
    return look_at(file, list(dict.fromkeys([file.parent, *of_split, tree.path])), ends)


def in_tables(tree: Tree, files: list[Path]) -> Layout:
    looks = look_at_all(files, tree)
    unused = next((found for found in looks if found.problem), None)
    if unused:
        name, usable = tree.relative(unused.file), [found.file for found in looks if not found.problem]
        spec = f"{{source: folder, train: {tree.path}}}"
        inner = [folder for folder in tree.folders if folder.holds_pictures()]
        if usable:
            remedy = f"; move it away, or name the table that is meant (--data {usable[0]})"
        elif len(inner) == 1 and not tree.pictures and inner[0].folders:
            remedy = f"; move it away, or name the folder that is meant (--data {inner[0].path})"
        elif inner:
            remedy = f"; if the folders alone are meant, move it away, or say so in a data file: {spec}"
        else:
            remedy = ""
        raise UserError(f"{tree.path}: {name} {unused.problem}{remedy}")
    return of_tables(tree, looks)


def of_tables(tree: Tree, looks: list[Look]) -> Layout:
    """The entry of tables that can be read, one for each split, or parts of one in Parquet."""
    found = {look.file: look for look in looks}
    splits, notes = by_name(tree.path, list(found))
    for same in splits.values():
        if len(same) > 1 and any(found[file].source != "parquet" for file in same):
            names = ", ".join(tree.relative(file) for file in same)
            raise UserError(f"{tree.path}: more than one table: {names}; name the one that is meant")
    first = {split: found[same[0]] for split, same in splits.items()}
    fields = first["train"].fields
    if "test" in first:
        roots = {look.fields.get("root", str(look.file.parent)) for look in first.values()}
        if len(roots) > 1:
            for look in first.values():
                look.fields["root"] = str(tree.path)
        notes += dates_of_one(*(look.fields for look in first.values()))
        fields = {key: value for key, value in fields.items() if key != "split_column"}
        compare_fields(tree.path, *({"source": look.source, **look.fields} for look in first.values()))
    elif "split_column" in fields:
        fields, splits, more = by_column(first["train"], splits)
        notes += more
    return Layout({"source": first["train"].source, **splits, **fields}, notes)


def by_column(found: Look, splits: dict[str, list[Path]]) -> tuple[dict, dict, list[str]]:
    """-> the fields, the paths and notes of a table that has a column of splits."""
    column, test = found.fields["split_column"], chosen_test(found.splits)
    if "train" not in found.splits:
        raise UserError(f"{found.file}: column {column!r} has no row of train, there is nothing to learn")
    left_out = sorted(found.splits - {"train", test})
    notes = [f"rows of {kind} are left out, the test split is {test}" for kind in left_out]
    return found.fields, {"path": splits["train"]} if test else splits, notes


# --- a file ----------------------------------------------------------------------------------------------


def in_file(path: Path) -> Layout:
    """Of a single file; a file beside it that has its name but for `test` is the test split."""
    suffix = path.suffix.lower()
    if packing(path.name):
        raise UserError(f"{path}: a packed file; unpack it ({packing(path.name)}) and name the folder")
    if suffix not in (*SOURCES, *CLOSED, ".tar"):
        raise UserError(f"{path}: expected a data file (.yaml), or {ACCEPTED}")
    beside = [f for f in sorted(path.parent.iterdir()) if f.suffix.lower() == suffix and f != path]
    tests = [f for f in beside if split_in(f.stem) in TESTS and rest_of(f.stem) in ((), rest_of(path.stem))]
    if suffix == ".tar":
        splits, notes = by_name(path, [path, *tests])
        return Layout({"source": "webdataset", **splits}, notes)
    root = path.parent.parent if is_no_class(path.parent.name) else path.parent  # of annotations/labels.csv
    tree = Tree(root, [Tree(folder) for folder in sorted(root.iterdir()) if folder.is_dir()])
    looks = look_at_all([path, *tests], tree)
    if looks[0].problem:
        raise UserError(f"{path}: {looks[0].problem}")
    layout = of_tables(tree, [found for found in looks if not found.problem])
    layout.notes += [f"{f.file.name} is no test split: {f.problem}" for f in looks if f.problem]
    return layout
