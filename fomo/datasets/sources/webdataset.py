"""WebDataset: tar shards whose members are read in place, by an index of where each one lies."""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from fomo.atomic import cache_root, make
from fomo.datasets.arrays import Arrays, Captions, Strings, cores, in_processes, read_array
from fomo.datasets.sources.base import IMAGE_SUFFIXES, Captioned, NumberedClasses, read_names
from fomo.datasets.sources.hub import expand, fetch
from fomo.errors import UserError

VERSION = 2  # of the index
NAMES_FILES = ("classes.txt", "classnames.txt")


class Shards(Captioned, NumberedClasses):
    """Tar shards end to end: members that share a name are one sample (`.jpg .cls .txt .json`)."""

    def open_shards(self, paths: list[str], names: Path | None, lines: bool = False) -> None:
        """`lines`: each line of a `.txt` is a caption, else all of it is one."""
        self.files = [str(fetch(path)) for path in paths]
        missing = [path for path in self.files if not Path(path).is_file()]
        if missing:
            more = f" ({len(missing)} of {len(paths)} shards are missing)" if len(paths) > 1 else ""
            raise UserError(f"{missing[0]}: no such tar file{more}")
        folder = index_of(self.files, self.key(), lines)
        meta = json.loads((folder / "meta.json").read_text())
        self.starts = np.array(meta["starts"])  # (shards + 1,) number of the first sample of each
        self.offsets = read_array(folder, "offsets", np.int64)  # (n,) of the picture in its shard
        self.sizes = read_array(folder, "sizes", np.int64)  # (n,)
        self.names = Strings.read(folder, "names")
        self.texts = Captions(Strings.read(folder, "texts"), read_array(folder, "rows", np.int64))
        self.labels = read_array(folder, "labels", np.int64)
        if not len(self.labels):
            raise UserError(f"{paths[0]}: no samples, expected members such as 000.jpg, 000.txt, 000.cls")
        if meta["dropped"]:
            what = f"{meta['dropped']} samples have no picture, first: {meta['first']}"
            self.notes += (f"{what}; skipped (known: {', '.join(IMAGE_SUFFIXES)})",)
        self.name_classes(self.first_captions(), names, read_names(names) if names else [], self.files[0])

    def first_captions(self) -> dict[int, str]:
        labels, first = np.unique(np.where(self.caption_counts() > 0, self.labels, -1), return_index=True)
        pairs = zip(labels.tolist(), first.tolist(), strict=True)
        return {label: self.captions(index)[0] for label, index in pairs if label >= 0}

    def image(self, index: int) -> Image.Image:
        with open(self.file_of(index), "rb") as file:
            file.seek(self.offsets[index])
            return Image.open(io.BytesIO(file.read(self.sizes[index])))

    def file_of(self, index: int) -> str:
        return self.files[int(np.searchsorted(self.starts, index, side="right")) - 1]

    def name_of(self, index: int) -> str:
        return f"{self.file_of(index)}:{self.names[index]}"

    def id_of(self, index: int) -> str:
        return self.names[index]

    def key(self) -> str:
        return "webdataset " + " ".join(stamp(path) for path in self.files)


def stamp(path: str) -> str:
    """What tells one content of a file from another, without reading it."""
    stat = Path(path).stat()
    return f"{Path(path).resolve()} {stat.st_size} {stat.st_mtime_ns}"


@dataclass
class Webdataset(Shards):
    """One path or a list; `{0000..0019}` stands for a range, `hf://datasets/ORG/REPO/FILE` for one of the hub."""

    path: str | list[str]
    classes_file: str | None = None  # default: classes.txt or classnames.txt beside the first shard

    def __post_init__(self):
        given = self.path if isinstance(self.path, list) else [self.path]
        if not given:
            raise UserError("path: an empty list, expected tar files")
        paths = [path for pattern in given for path in expand(pattern)]
        beside = [fetch(paths[0]).parent / name for name in NAMES_FILES]
        found = next((file for file in beside if file.is_file()), None)
        self.open_shards(paths, Path(self.classes_file) if self.classes_file else found)


def index_of(files: list[str], key: str, lines: bool) -> Path:
    """The folder with the index of these shards, made now if it is not there yet."""
    digest = hashlib.sha256(f"{VERSION} {lines} {key}".encode()).hexdigest()[:20]
    folder = cache_root() / "indexes" / digest
    if not folder.exists():
        make(folder, partial(write_index, files, lines))
    return folder


def write_index(files: list[str], lines: bool, folder: Path) -> None:
    arrays, starts, without = Arrays(folder), [0], []
    lengths = dict.fromkeys(("names", "texts", "texts_ends"), 0)  # of these arrays, up to the last shard
    shards = in_processes(partial(scan, lines=lines), files, cores() if len(files) > 8 else 0)
    for found in tqdm(shards, "indexing shards", len(files), leave=False, disable=len(files) == 1):
        if isinstance(found, UserError):
            raise found
        columns, no_picture = found
        starts.append(starts[-1] + len(columns["labels"]))
        for ends, of in (("names_ends", "names"), ("texts_ends", "texts"), ("rows", "texts_ends")):
            columns[ends] = columns[ends] + lengths[of]
            lengths[of] += len(columns[of])
        arrays.append(**columns)
        without += no_picture
    arrays.finish(starts=starts, dropped=len(without), first=(without or [""])[0])


def scan(file: str, lines: bool) -> tuple[dict[str, np.ndarray], list[str]] | UserError:
    """-> the columns of one shard's index, and the names of samples without a picture."""
    try:
        samples = read_headers(file, lines)
    except UserError as error:  # as a value: what a worker process raises arrives with its traceback as text
        return error
    found = [s for s in samples if s.offset >= 0]
    captions, names = Captions.of([s.captions for s in found]), Strings.of(s.name for s in found)
    columns = {
        "offsets": np.array([s.offset for s in found], np.int64),
        "sizes": np.array([s.size for s in found], np.int64),
        "labels": np.array([s.label for s in found], np.int64),
        "rows": captions.ends,
        "names": names.flat,
        "names_ends": names.ends,
        "texts": captions.texts.flat,
        "texts_ends": captions.texts.ends,
    }
    return columns, [f"{file}:{s.name}" for s in samples if s.offset < 0]


@dataclass
class TarSample:
    """Where one sample's picture lies in its shard, and its text."""

    name: str
    offset: int = -1
    size: int = 0
    label: int = -1
    captions: list[str] = field(default_factory=list)


def read_headers(path: str, lines: bool) -> list[TarSample]:
    """One pass over the headers; text members are read, pictures only located. Nothing is extracted."""
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # else tarfile keeps an object of every header
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}", TarSample(member.name))
                if suffix.lower() in IMAGE_SUFFIXES:
                    sample.name, sample.offset, sample.size = member.name, member.offset_data, member.size
                elif suffix in ("cls", "txt", "json"):
                    add_text(sample, member.name, suffix, tar.extractfile(member).read(), lines)
            tar.fileobj.seek(tar.offset)  # tarfile takes a cut or damaged header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off or damaged, the mark of its end is missing")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable tar shard: {error}") from None
    return list(samples.values())


def add_text(sample: TarSample, name: str, suffix: str, data: bytes, lines: bool) -> None:
    """`.cls` label, `.txt` caption, `.json` a list under "captions"; each caption once, `.txt` first."""
    try:
        text = data.decode("utf-8")
        if suffix == "cls":
            sample.label = int(text)
            return
        found = json_captions(text) if suffix == "json" else text.splitlines() if lines else [text]
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    texts = [*found, *sample.captions] if suffix == "txt" else [*sample.captions, *found]
    sample.captions = list(dict.fromkeys(t.strip() for t in texts if t.strip()))


def json_captions(text: str) -> list[str]:
    content = json.loads(text)
    captions = (content.get("captions") or []) if isinstance(content, dict) else None
    if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
        raise ValueError('expected {"captions": [TEXT, ...]}')
    return captions
