"""Sources: where images and captions come from, one small class each behind one interface, one file each.

A class's fields are what a data file may say of it, checked like a recipe's. `split_field` names the field that
an entry's `train:` and `test:` fill: a path, a split's name, a number of pictures.
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from fomo.datasets.arrays import Captions, Strings
from fomo.errors import UserError
from fomo.text import plural

# Of pictures that people train on, not all that Pillow opens: documents, films and measurements are no pictures.
SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
SUFFIXES += ("jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm")
UNREADABLE = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)
UNREADABLE += (EOFError, IndexError, OverflowError, TypeError, struct.error, zlib.error)  # of damaged files
HELD_OUT = 50  # pictures with captions that are enough to test on
COMPARED = 20_000  # pictures of equal size whose bytes are compared


def readable(suffixes: tuple[str, ...]) -> tuple[str, ...]:
    """Those that this Pillow opens: WebP, AVIF and JPEG 2000 are parts that it may have been built without."""
    forms = Image.registered_extensions()
    missing = {None} if features.check("jpg_2000") else {None, "JPEG2000"}  # that is registered all the same
    return tuple(suffix for suffix in suffixes if forms.get(f".{suffix}") not in missing)


IMAGE_SUFFIXES = readable(SUFFIXES)


class Source:
    """One split of one dataset, by index.

    classes: class names in label order; empty for a set that has captions only.
    labels: (n,) int64, position in `classes`; -1 where a sample belongs to no class.
    dates: (n,) texts as dates.py has them, "" for an unknown one; None: the source knows nothing of time.
    prompts: templates for zero-shot classification, `{}` stands for the class name.
    notes: what was left out or looks wrong, one line each; shown when the source is opened.
    """

    split_field = "path"
    classes: list[str]
    labels: np.ndarray
    dates: np.ndarray | None = None
    prompts: tuple[str, ...] = ("a photo of a {}.",)
    notes: tuple[str, ...] = ()
    unread: Mapping[int, str] = MappingProxyType({})  # whose `.txt` could not be read so far, and why
    weight: float = 1.0  # in a pretraining pool: how often each picture counts
    cache: str = "auto"  # whether its pixels are cached, see cache.open_pixels
    skip_bad: bool = (
        False  # whether it is used without the pictures that cannot be read, however many those are
    )
    data_file: Path | None = None  # that names it
    rendered = False  # drawn here: every picture is a square of plain RGB

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The picture, at its own size and in its own mode. Raises one of UNREADABLE if it is broken."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """All captions of the picture, the first one is used for testing; none: the prompt describes it."""
        raise NotImplementedError

    def caption_counts(self) -> np.ndarray:
        """(n,) how many captions each picture has."""
        return np.fromiter((len(self.captions(i)) for i in range(len(self))), np.int64, len(self))

    def name_of(self, index: int) -> str:
        """What to call a sample in messages."""
        raise NotImplementedError

    def id_of(self, index: int) -> str:
        """What the sample is called within its dataset, wherever that lies."""
        return self.name_of(index)

    def key(self) -> str:
        """What the pixels depend on, as text: names the pixel cache, so it changes when they would."""
        raise NotImplementedError

    def byte_sizes(self) -> np.ndarray | None:
        """(n,) of the pictures as they are stored, -1 where one is missing; None if they are not stored so."""
        return None

    def encoded(self, index: int) -> bytes:
        """The picture as it is stored, where `byte_sizes` are known. Raises one of UNREADABLE."""
        raise NotImplementedError

    def agree(self, splits: list["Source"]) -> None:
        """Take the class names of all splits of the dataset (train, test); for those found in the data itself."""


class Part(Source):
    """Some samples of a source, by their numbers in it."""

    def __init__(self, source: Source, numbers: np.ndarray):
        self.whole, self.numbers = source, numbers
        self.classes, self.prompts, self.notes = source.classes, source.prompts, source.notes
        self.weight, self.cache, self.rendered = source.weight, source.cache, source.rendered
        self.skip_bad, self.data_file = source.skip_bad, source.data_file
        self.labels = source.labels[numbers]
        self.dates = None if source.dates is None else source.dates[numbers]

    def image(self, index: int) -> Image.Image:
        return self.whole.image(int(self.numbers[index]))

    def captions(self, index: int) -> list[str]:
        return self.whole.captions(int(self.numbers[index]))

    def caption_counts(self) -> np.ndarray:
        return self.whole.caption_counts()[self.numbers]

    @property
    def unread(self) -> Mapping[int, str]:
        return self.whole.unread

    def name_of(self, index: int) -> str:
        return self.whole.name_of(int(self.numbers[index]))

    def id_of(self, index: int) -> str:
        return self.whole.id_of(int(self.numbers[index]))

    def byte_sizes(self) -> np.ndarray | None:
        sizes = self.whole.byte_sizes()
        return None if sizes is None else sizes[self.numbers]

    def encoded(self, index: int) -> bytes:
        return self.whole.encoded(int(self.numbers[index]))

    def key(self) -> str:
        return f"{len(self)} ({zlib.crc32(self.numbers.tobytes()):08x}) of {self.whole.key()}"


def limited(source: Source, limit: int | None) -> Source:
    """At most `limit` samples, drawn uniformly, the same in every run."""
    if limit is None or limit >= len(source):
        return source
    rng = np.random.default_rng([limit, 0x5AB5])
    return Part(source, np.sort(rng.choice(len(source), limit, replace=False, shuffle=False)))


def holdout_mask(source: Source, share: float, purpose: str = "test") -> np.ndarray:
    """(n,) bool: about `share` of every class, never all; to test on at least one, of a class of one picture none.

    Of pictures without classes about HELD_OUT are taken where that is more, but at most a third (for validation a
    sixth): recall@5 among five pictures is always 100.

    A hash of a sample's name decides, so samples that are added later move none from one side to the other
    (but the last of its class that is left on a side). Without classes the share falls as the set grows, from a
    third of 150 pictures to `share` of HELD_OUT / `share`: on the way some test pictures are given to training,
    and never one back, so nothing that was learnt is tested on.

    Copies of a picture are on one side, on the training side if their classes differ. The draws for validation
    are independent of those for testing.
    """
    names, groups = names_of_pictures(source)
    person = b"" if purpose == "test" else purpose.encode()
    digests = b"".join(hashlib.blake2b(name, digest_size=8, person=person).digest() for name in names)
    draws = np.frombuffer(digests, "<u8") / 2**64  # (n,) in [0, 1)
    if (source.labels < 0).all():
        most = 1 / 3 if purpose == "test" else 1 / 6
        share = max(share, min(most, HELD_OUT / max(len(source), 1)))
    test = draws < share
    _, of_class = np.unique(source.labels, return_inverse=True)
    least, most = np.ones(of_class.max(initial=-1) + 1), np.zeros(of_class.max(initial=-1) + 1)
    np.minimum.at(least, of_class, draws)
    np.maximum.at(most, of_class, draws)
    test[(draws == least[of_class]) & (purpose == "test")] = True
    test[draws == most[of_class]] = False
    together = np.ones(len(source), bool)
    np.logical_and.at(together, groups, test)
    return together[groups]


def names_of_pictures(source: Source) -> tuple[list[bytes], np.ndarray]:
    """-> the names of n samples, of copies of a picture that of the first; (n,) the number of that first one."""
    names = [source.id_of(index).encode("utf-8", "surrogateescape") for index in range(len(source))]
    groups, sizes = np.arange(len(source)), source.byte_sizes()
    if sizes is not None:
        _, size_of, counts = np.unique(sizes, return_inverse=True, return_counts=True)
        first: dict[bytes, int] = {}
        for index in np.flatnonzero(counts[size_of] > 1)[:COMPARED].tolist():
            groups[index] = first.setdefault(digest(source, index), index)
    return [names[first] for first in groups.tolist()], groups


def digest(source: Source, index: int) -> bytes:
    """Of the bytes of a picture, as it is stored; of one that cannot be read, of its name."""
    try:
        return hashlib.blake2b(source.encoded(index), digest_size=16).digest()
    except UNREADABLE:
        return source.name_of(index).encode("utf-8", "surrogateescape")


class PictureFiles(Source):
    """A source whose pictures are files: `files` are their paths, relative to `base`."""

    base: str
    files: Strings

    def path_of(self, index: int) -> str:
        return os.path.join(self.base, self.files[index])

    @cached_property
    def unread(self) -> dict[int, str]:
        return {}

    def image(self, index: int) -> Image.Image:
        return Image.open(self.path_of(index))

    def captions_beside(self, index: int) -> list[str]:
        """The lines of the `.txt` beside a picture; of one that cannot be read none, and `unread` has it."""
        try:
            return captions_beside(self.path_of(index))
        except UserError as error:
            self.unread[index] = str(error)
            return []

    def name_of(self, index: int) -> str:
        return self.path_of(index)

    def id_of(self, index: int) -> str:
        return self.files[index]

    def byte_sizes(self) -> np.ndarray:
        def size(path: str) -> int:
            try:
                return os.stat(path).st_size
            except (OSError, ValueError):  # ValueError: a null character in a table
                return -1

        return np.array([size(self.path_of(index)) for index in range(len(self))], np.int64)

    def encoded(self, index: int) -> bytes:
        return Path(self.path_of(index)).read_bytes()

    def key(self) -> str:
        return f"{type(self).__name__} {Path(self.base).resolve()} {self.digest()}"

    def digest(self) -> str:
        """A hash of the names, sizes and times of all files."""
        digest = hashlib.sha256()
        for index in range(len(self.files)):
            try:
                stat = os.stat(self.path_of(index))
                content = f"{stat.st_size} {stat.st_mtime_ns}"
            except (OSError, ValueError):  # ValueError: a null character in a table
                content = "missing"
            digest.update(f"{self.files[index]} {content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def caption_lines(data: bytes) -> list[str]:
    """The captions of a `.txt`, wherever it lies: one a line, each once, blank lines left out.

    Raises a ValueError if it is not UTF-8.
    """
    text = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")  # no other breaks end a line
    return distinct(text.split("\n"))


def distinct(texts: list[str]) -> list[str]:
    """Without blanks around them, empty ones left out, each at its first place."""
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def captions_beside(picture: str) -> list[str]:
    """Of the `.txt` that has the picture's name but for the suffix; none without such a file."""
    stem = os.path.splitext(picture)[0]
    file = next((stem + end for end in (".txt", ".TXT", ".Txt") if os.path.isfile(stem + end)), None)
    if file is None:
        return []
    try:
        return caption_lines(Path(file).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a readable caption: {error}") from None


def unread_texts(source: Source) -> list[str]:
    """A line about files of captions that could not be read so far, if there are any."""
    problems = list(source.unread.values())
    return (
        [f"{len(problems)} texts cannot be read and are left out, first: {problems[0]}"] if problems else []
    )


class Captioned(Source):
    """A source that holds the captions of all its pictures in memory."""

    texts: Captions

    def captions(self, index: int) -> list[str]:
        return self.texts[index]

    def caption_counts(self) -> np.ndarray:
        return self.texts.counts()


class NamedClasses(Source):
    """A source whose labels are names (of folders, of a column), numbered in alphabetical order."""

    def number(self, names: list[str], of_sample: list[int]) -> None:
        """names: any, once each; of_sample: (n,) position in `names`, -1 for none."""
        order = sorted(range(len(names)), key=names.__getitem__)
        rank = np.zeros(len(names) + 1, np.int64)
        rank[order] = np.arange(len(names))
        rank[-1] = -1
        self.classes = [names[i] for i in order]
        self.labels = rank[np.array(of_sample, np.int64)]

    def agree(self, splits: list[Source]) -> None:
        """Number the names of all splits together: what only one split has stays a class of both."""
        union = sorted({name for split in splits for name in split.classes})
        if union != self.classes:
            position = {name: i for i, name in enumerate(union)}
            moved = np.array([*(position[name] for name in self.classes), -1], np.int64)
            self.classes, self.labels = union, moved[self.labels]


class NumberedClasses(Source):
    """A source whose labels are numbers; their names stand in a list, or are guessed from the data itself."""

    guessed: dict[int, str] | None = None  # names by label, where no list gives them

    def name_classes(self, guesses: dict[int, str], file: Path | None, names: list[str], where: str) -> None:
        """By the `names` of a file, in label order; without a file by the guesses, else by the numbers."""
        present = np.unique(self.labels[self.labels >= 0]).tolist()
        if not present:
            self.classes = []
        elif file is None:
            self.guessed = guesses
            self.classes = with_numbers(guesses, present[-1] + 1)
        else:
            for label in present:
                if label >= len(names) or not names[label]:
                    raise UserError(
                        f"{where}: label {label} has no name, {file} has {plural(len(names), 'name')}"
                    )
            self.classes = names
        self.notes += same_names(self.classes)

    def agree(self, splits: list[Source]) -> None:
        """Guessed names: the first split (train) decides, the others add labels that it lacks."""
        if self.guessed is not None:
            names = {}
            for split in reversed(splits):
                names |= split.guessed or {}
            self.classes = with_numbers(names, max(len(split.classes) for split in splits))


def with_numbers(names: dict[int, str], count: int) -> list[str]:
    return [names.get(label, f"class {label}") for label in range(count)]


def read_names(file: Path) -> list[str]:
    """One name per line: line number = label, so an empty line between others counts."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file of class names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable file of class names: {error}") from None


def same_names(classes: list[str]) -> tuple[str, ...]:
    """A note on class names that stand twice: no text can tell such classes apart."""
    first: dict[str, int] = {}
    pairs = [(first[name], i) for i, name in enumerate(classes) if name and first.setdefault(name, i) != i]
    if not pairs:
        return ()
    one, other = pairs[0]
    more = f" (and {len(pairs) - 1} more)" if len(pairs) > 1 else ""
    return (f"two classes have the same name {classes[one]!r}, labels {one} and {other}{more}",)


def peculiarities(image: Image.Image) -> Iterator[str]:
    """What its pixels do not show to open_clip, which reads a picture by PIL's `convert("RGB")` and no more."""
    if image.getexif().get(0x0112) in range(2, 9):  # the EXIF orientation
        yield "turned"
    if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
        yield "transparent"
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits
        yield "deep"
