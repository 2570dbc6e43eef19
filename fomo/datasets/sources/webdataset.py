"""WebDataset: tar shards whose members are read in place, by an index of where each one lies."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from fomo.atomic import cache_root, make
from fomo.datasets.arrays import Arrays, Captions, Strings, cores, in_processes, read_array
from fomo.datasets.sources.base import (
    IMAGE_SUFFIXES,
    Captioned,
    NumberedClasses,
    caption_lines,
    distinct,
    read_names,
)
from fomo.datasets.sources.hub import expand, fetch
from fomo.errors import UserError
from fomo.progress import Progress

VERSION = 4  # of the index: of its form, and of which members are samples
NAMES_FILES = ("classes.txt", "classnames.txt")
TEXTS = ("cls", "txt", "json")
CAPTION_KEYS = ("caption", "text")  # of a .json that has no "captions"; the first that is there
MOST_CLASSES = 10_000_000
UNLABELLED = "samples have a .cls that is no number and are left out"
UNREAD = "texts cannot be read and are left out"
PLAIN = "-c FILE > PLAIN.tar"
OTHERS = {  # what a file that is no tar file begins with -> what it is, and what to do
    b"\x1f\x8b": ("compressed (gzip)", f"gunzip {PLAIN}"),
    b"BZh": ("compressed (bzip2)", f"bunzip2 {PLAIN}"),
    b"\xfd7zXZ\0": ("compressed (xz)", f"unxz {PLAIN}"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", f"unzstd {PLAIN}"),
    b"PK": ("a zip archive", "unzip it, and name the folder"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it with `7z x`, and name the folder"),
    b"Rar!": ("a rar archive", "unpack it with `unrar x`, and name the folder"),
    b"version https://git-lfs": ("Git's note of where a large file is", "git lfs pull"),
    b"<": ("a web page, not what was to be fetched", "fetch it again"),
}


class Shards(Captioned, NumberedClasses):
    """Tar shards end to end: members that share a name but for the suffix are one sample (`.jpg .cls .txt .json`).

    `shirt.back.jpg` with a `shirt.back.txt` is a sample beside `shirt.jpg`. Without texts of its own it belongs to
    `shirt`: it is that sample's picture if there is no `shirt.jpg`, else it is left out, with a note. Suffixes may
    be in any case.
    """

    def open_shards(self, paths: list[str], names: Path | None, keys: tuple[str, ...] = ()) -> None:
        """keys: in the `.json` members, of the captions, and then nothing else is one."""
        self.files = [str(fetch(path)) for path in paths]
        missing = [path for path in self.files if not Path(path).is_file()]
        if missing:
            more = f" ({len(missing)} of {len(paths)} shards are missing)" if len(paths) > 1 else ""
            raise UserError(f"{missing[0]}: no such tar file{more}")
        folder = index_of(self.files, self.key(), keys)
        meta = json.loads((folder / "meta.json").read_text())
        self.starts = np.array(meta["starts"])  # (shards + 1,) number of the first sample of each
        self.offsets = read_array(folder, "offsets", np.int64)  # (n,) of the picture in its shard
        self.sizes = read_array(folder, "sizes", np.int64)  # (n,)
        self.names = Strings.read(folder, "names")
        self.texts = Captions(Strings.read(folder, "texts"), read_array(folder, "rows", np.int64))
        self.labels = read_array(folder, "labels", np.int64)
        if not len(self.labels):
            problem = "no samples, expected members such as 000.jpg, 000.txt, 000.cls"
            raise UserError(f"{paths[0]}: {'; '.join([problem, *meta['notes']])}")
        self.notes += tuple(meta["notes"])
        self.name_classes(self.first_captions(), names, read_names(names) if names else [], self.files[0])

    def first_captions(self) -> dict[int, str]:
        labels, first = np.unique(np.where(self.caption_counts() > 0, self.labels, -1), return_index=True)
        pairs = zip(labels.tolist(), first.tolist(), strict=True)
        return {label: self.captions(index)[0] for label, index in pairs if label >= 0}

    def byte_sizes(self) -> np.ndarray:
        return self.sizes

    def encoded(self, index: int) -> bytes:
        with open(self.file_of(index), "rb") as file:
            file.seek(self.offsets[index])
            return file.read(self.sizes[index])

    def image(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded(index)))

    def file_of(self, index: int) -> str:
        return self.files[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def name_of(self, index: int) -> str:
        return f"{self.file_of(index)}:{self.names[index]}"

    def id_of(self, index: int) -> str:
        return self.names[index]

    def key(self) -> str:
        return f"webdataset {VERSION} {' '.join(IMAGE_SUFFIXES)} {' '.join(map(stamp, self.files))}"


def stamp(path: str) -> str:
    """What tells one content of a file from another, without reading it."""
    stat = Path(path).stat()
    return f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"


@dataclass
class Webdataset(Shards):
    """One path or a list; `{0000..0019}` stands for a range, `hf://datasets/ORG/REPO/FILE` for one of the hub."""

    path: str | list[str]
    classes_file: str | None = None  # default: classes.txt or classnames.txt beside the first shard
    caption: str | list[str] | None = None  # keys in `.json` members: what is under them, and no other text

    def __post_init__(self):
        given = self.path if isinstance(self.path, list) else [self.path]
        if not given:
            raise UserError("path: an empty list, expected tar files")
        paths = [path for pattern in given for path in expand(pattern)]
        beside = [fetch(paths[0]).parent / name for name in NAMES_FILES]
        found = next((file for file in beside if file.is_file()), None)
        keys = (self.caption,) if isinstance(self.caption, str) else tuple(self.caption or ())
        self.open_shards(paths, Path(self.classes_file) if self.classes_file else found, keys)


def index_of(files: list[str], key: str, caption_keys: tuple[str, ...]) -> Path:
    """The folder with the index of these shards, made now if it is not there yet."""
    digest = hashlib.sha256(f"{caption_keys} {key}".encode()).hexdigest()[:20]
    folder = cache_root() / "indexes" / digest
    if not folder.exists():
        make(folder, partial(write_index, files, caption_keys))
    return folder


def write_index(files: list[str], caption_keys: tuple[str, ...], folder: Path) -> None:
    arrays, starts = Arrays(folder), [0]
    noted: dict[str, tuple[int, str]] = {}
    lengths = dict.fromkeys(("names", "texts", "texts_ends"), 0)  # of these arrays, up to the last shard
    shards = in_processes(partial(scan, keys=caption_keys), files, cores() if len(files) > 8 else 0)
    for found in Progress(shards, "indexing shards", len(files), leave=False, disable=len(files) == 1):
        if isinstance(found, UserError):
            raise found
        columns, members = found
        starts.append(starts[-1] + len(columns["labels"]))
        for ends, of in (("names_ends", "names"), ("texts_ends", "texts"), ("rows", "texts_ends")):
            columns[ends] = columns[ends] + lengths[of]
            lengths[of] += len(columns[of])
        arrays.append(**columns)
        for what, (count, name) in members.items():
            before, first = noted.get(what, (0, name))
            noted[what] = (before + count, first)
    notes = [f"{count} {what}, first: {first}" for what, (count, first) in noted.items()]
    arrays.finish(starts=starts, notes=notes)


def scan(file: str, keys: tuple[str, ...]) -> tuple[dict, dict[str, tuple[int, str]]] | UserError:
    """-> the columns of one shard's index, and what is to be noted: of how many members, and of which first."""
    try:
        found, noted = with_pictures(read_members(file))
    except (tarfile.TarError, OSError, ValueError) as error:
        # returned, not raised: what a worker process raises arrives with its traceback as text
        other = told_apart(file) if isinstance(error, tarfile.ReadError) else None
        return UserError(f"{file}: {other or f'not a readable tar shard: {error}'}")
    labels = [label_of(sample, noted) for sample in found]
    found, labels = [
        [x for x, label in zip(of, labels, strict=True) if label is not None] for of in (found, labels)
    ]
    captions = Captions.of([captions_of(sample, keys, noted) for sample in found])
    names = Strings.of(sample.name for sample in found)
    columns = {
        "offsets": np.array([sample.offset for sample in found], np.int64),
        "sizes": np.array([sample.size for sample in found], np.int64),
        "labels": np.array(labels, np.int64),
        "rows": captions.ends,
        "names": names.flat,
        "names_ends": names.ends,
        "texts": captions.texts.flat,
        "texts_ends": captions.texts.ends,
    }
    return columns, {what: (len(names), f"{file}:{names[0]}") for what, names in noted.items() if names}


def told_apart(file: str | Path) -> str | None:
    """What a file is by its first bytes, where that is one of OTHERS, whatever it is called; and what to do."""
    with open(file, "rb") as opened:
        start = opened.read(32)
    for mark, (what, remedy) in OTHERS.items():
        if start.startswith(mark):
            return f"it is {what}; expected a plain tar file, whose members are read in place: {remedy}"
    return None


@dataclass
class TarSample:
    """Members that share a name but for the suffix."""

    name: str  # of the picture, else of the first member
    key: str  # of the name, what is before the first dot
    offset: int = -1  # of the picture; -1: there is none
    size: int = 0
    texts: dict[str, tuple[str, bytes]] = field(
        default_factory=dict
    )  # suffix -> name and content of the member
    spare: list[str] = field(default_factory=list)  # further pictures
    shared: set[str] = field(default_factory=set)  # suffixes of texts that other samples have taken over

    def take(self, name: str, offset: int, size: int) -> None:
        if self.offset >= 0:
            self.spare.append(self.name)
        self.name, self.offset, self.size = name, offset, size


def read_members(path: str) -> dict[str, TarSample]:
    """One pass over the headers; text members are read, pictures only located. Nothing is extracted."""
    samples: dict[str, TarSample] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members.clear()  # else tarfile keeps an object of every header
            if not member.isfile():
                continue
            folder, _, base = member.name.rpartition("/")
            if base.startswith("._"):  # what macOS's tar adds of its own to every file
                continue
            stem, _, suffix = base.rpartition(".")
            key, suffix = base.partition(".")[0], suffix.lower()
            if suffix not in (*IMAGE_SUFFIXES, *TEXTS):
                stem = key
            sample = samples.setdefault(f"{folder}/{stem}", TarSample(member.name, f"{folder}/{key}"))
            if suffix in IMAGE_SUFFIXES:
                sample.take(member.name, member.offset_data, member.size)
            elif suffix in TEXTS:
                sample.texts[suffix] = (member.name, tar.extractfile(member).read())
        tar.fileobj.seek(tar.offset)  # tarfile takes a cut or damaged header for the end
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("it is cut off or damaged, the mark of its end is missing")
    return samples


def with_pictures(samples: dict[str, TarSample]) -> tuple[list[TarSample], dict[str, list[str]]]:
    """The samples that have a picture, and the names of the members that are left out, by why."""
    by_depth = sorted(samples.items(), key=lambda pair: pair[0].rpartition("/")[2].count("."))
    for stem, sample in by_depth:
        whole = whole_of(stem, samples)
        if whole is None or sample.offset < 0:
            continue
        if sample.texts:
            taken = {k: v for k, v in whole.texts.items() if k == "cls" or whole.offset < 0}
            whole.shared |= taken.keys() - sample.texts.keys()
            sample.texts = taken | sample.texts
        elif whole.texts:  # it is the picture of the whole, or one more of it
            del samples[stem]
            if whole.offset < 0:
                whole.take(sample.name, sample.offset, sample.size)
            else:
                whole.spare.append(sample.name)
    found = [sample for sample in samples.values() if sample.offset >= 0]
    keys = {sample.key for sample in found}
    rest = [sample for sample in samples.values() if sample.offset < 0]
    known = ", ".join(IMAGE_SUFFIXES)
    return found, {
        f"samples have no picture (known: {known}) and are left out": [
            s.name for s in rest if s.key not in keys
        ],
        "texts belong to no picture and are left out": [
            name
            for s in rest
            if s.key in keys
            for suffix, (name, _) in s.texts.items()
            if suffix not in {"cls", *s.shared}
        ],
        "pictures belong to a sample that has one and are left out": [
            name for s in found for name in s.spare
        ],
    }


def whole_of(stem: str, samples: dict[str, TarSample]) -> TarSample | None:
    """The sample that a name with dots may belong to: of `shirt.back.left` `shirt.back`, else `shirt`."""
    folder, _, base = stem.rpartition("/")
    while "." in base:
        base = base.rpartition(".")[0]
        if whole := samples.get(f"{folder}/{base}"):
            return whole
    return None


def label_of(sample: TarSample, noted: dict[str, list[str]]) -> int | None:
    """Of its `.cls`; -1 without one, None (and `noted`) where that is no number."""
    name, data = sample.texts.get("cls", ("", b"-1"))
    try:
        label = int(data.decode("utf-8-sig"))
        if label >= MOST_CLASSES:
            raise ValueError(f"{label} is no number of a class")
        return label
    except ValueError as error:
        noted.setdefault(UNLABELLED, []).append(f"{name} ({error})")
        return None


def captions_of(sample: TarSample, keys: tuple[str, ...], noted: dict[str, list[str]]) -> list[str]:
    """The lines of its `.txt`, then "captions" of its `.json`; without any, its "caption" or "text".

    The last is a guess, so it is `noted`, as is what cannot be read. keys: of the `.json`, in place of all these.
    """
    content, listed, written = {}, [], []
    name, data = sample.texts.get("json", ("", b"{}"))
    with leaving_out(name, noted):
        content = named_fields(data)
        listed = [text for key in keys or ("captions",) for text in texts_under(key, content)]
    if keys:
        return distinct(listed)
    text_name, text = sample.texts.get("txt", ("", b""))
    with leaving_out(text_name, noted):
        written = caption_lines(text)
    captions = distinct([*written, *listed])
    for key in CAPTION_KEYS:
        if not captions and is_text(content.get(key)) and (captions := distinct(texts_under(key, content))):
            what = f'pictures have the "{key}" of their .json as caption (`caption: KEY` takes another)'
            noted.setdefault(what, []).append(name)
    return captions


def named_fields(data: bytes) -> dict:
    content = json.loads(data.decode("utf-8-sig"))
    if not isinstance(content, dict):
        raise ValueError('expected named fields, as {"caption": TEXT}')
    return content


def texts_under(key: str, content: dict) -> list[str]:
    value = content.get(key)
    if value is None:
        return []
    if not is_text(value):
        raise ValueError(f"{key}: expected a text or a list of texts, got {str(value)[:40]!r}")
    return [value] if isinstance(value, str) else value


def is_text(value: object) -> bool:
    """A text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


@contextmanager
def leaving_out(member: str, noted: dict[str, list[str]]) -> Iterator[None]:
    """A member whose content cannot be read is `noted`, and its sample goes on without it."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        noted.setdefault(UNREAD, []).append(f"{member} ({error})")
