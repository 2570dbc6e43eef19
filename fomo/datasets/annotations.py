"""Which files of a folder say something of its pictures: tables, lists and notes on single pictures."""

import json
import os
import re
from itertools import islice
from pathlib import Path

from fomo.datasets.columns import CLOSED
from fomo.datasets.sources.folders import Tree
from fomo.errors import UserError

HARMLESS = re.compile(
    r"readme.*|licen[sc]e.*|copying|citation.*|dataset_infos?\.json|.*\.(md|html|pdf)", re.I
)
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", *CLOSED)
READ = 1 << 16  # bytes of a file that may speak of pictures
SOME = 1000  # pictures that it may speak of


def tables_in(tree: Tree) -> list[Path]:
    """Files that say something of the pictures: tables, and what is no table but speaks of them."""
    shards = {n.removesuffix(".tar") for folder in tree.walk() for n in folder.others if n.endswith(".tar")}
    pictures = [os.path.basename(file) for file in islice(tree.all_pictures(), SOME)]
    stems = {os.path.splitext(name)[0] for name in pictures}
    codes = {folder.name for folder in tree.walk() if re.fullmatch(r"[a-z]?\d+", folder.name)}
    found = []
    for folder in tree.walk():
        for name in folder.others:
            stem, suffix = os.path.splitext(name)
            path, suffix = folder.path / name, suffix.lower()
            of_shard = stem.removesuffix("_stats") in shards  # img2dataset says there what is in the shard
            of_picture = stem in stems or stem in pictures
            if HARMLESS.fullmatch(name) or of_shard:
                continue
            may_be = suffix in (".json", ".txt") and not of_picture
            if suffix in TABLES or (may_be and speaks_of(path, pictures, codes)):
                found.append(path)
    return found


def refuse_annotations(tree: Tree) -> None:
    """Files of single pictures that lie in a folder of their own, as the boxes of YOLO and Pascal VOC."""
    pictures = list(islice(map(tree.relative, tree.all_pictures()), SOME))
    stems = {os.path.splitext(os.path.basename(file))[0]: file for file in pictures}
    for folder in tree.walk():
        for name in folder.others if not folder.pictures else ():
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".xml", ".json") and stem in stems:
                what = f"{tree.relative(folder.path / name)} annotates {stems[stem]}, and is not read here"
                raise UserError(f"{tree.path}: {what}; make class folders or captions of it")


def speaks_of(file: Path, pictures: list[str], codes: set[str]) -> bool:
    """Whether it names pictures, or says what class folders are that have numbers and codes for names."""
    if file.suffix.lower() == ".json" and is_table(file):
        return True
    with open(file, "rb") as opened:
        text = opened.read(READ).decode("utf-8", "replace")
    words = set(re.split(r"[\s,;:|=\"'/\\{}\[\]()]+", text))
    return bool(words & set(pictures)) or (len(codes) > 1 and len(words & codes) > len(codes) / 2)


def is_table(file: Path) -> bool:
    """Whether a `.json` is a list of objects or of COCO's form."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    if isinstance(content, dict):
        return {"images", "annotations"} <= content.keys()
    return bool(content) and isinstance(content, list) and isinstance(content[0], dict)
