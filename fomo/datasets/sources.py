"""Sources: where images and captions come from, one small class each behind one interface.

A class's fields are what a data file may say of it, checked like a recipe's. `split_field` names the field that
an entry's `train:` and `test:` fill: a path, a split's name, a number of pictures.
"""

import inspect
import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from fomo.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UNREADABLE = (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError)


class Source:
    """One split of one dataset, by index.

    classes: class names in label order; empty for a set that has captions only.
    labels: (n,) int64, position in `classes`; -1 where a sample belongs to no class.
    prompts: templates for zero-shot classification, `{}` stands for the class name.
    """

    split_field = "path"
    classes: list[str]
    labels: np.ndarray
    prompts: tuple[str, ...] = ("a photo of a {}.",)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image.Image:
        """The picture, at its own size and in its own mode. Raises one of UNREADABLE if it is broken."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """All captions of the picture, the first one is used for testing; none: the prompt describes it."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """What to call a sample in messages."""
        raise NotImplementedError

    def key(self) -> str:
        """What the pixels depend on, as text: names the pixel cache, so it changes when they would."""
        raise NotImplementedError


@dataclass
class Webdataset(Source):
    """Tar shards: members that share a name are one sample (`.jpg .cls .txt .json`); read in place."""

    path: str
    classes_file: str | None = None  # default: classes.txt or classnames.txt beside the shard

    def __post_init__(self):
        if not Path(self.path).is_file():
            raise UserError(f"{self.path}: no such tar file")
        samples = index_shard(self.path)
        if not samples:
            raise UserError(f"{self.path}: no samples, expected members such as 000.jpg, 000.txt, 000.cls")
        self.samples = samples
        self.labels = np.array([s.label for s in samples], dtype=np.int64)
        self.classes = self.class_names()

    def class_names(self) -> list[str]:
        present = np.unique(self.labels[self.labels >= 0]).tolist()
        if not present:
            return []
        beside = [Path(self.path).parent / name for name in ("classes.txt", "classnames.txt")]
        file = self.classes_file or next((file for file in beside if file.is_file()), None)
        if file is None:
            firsts = {s.label: s.captions[0] for s in reversed(self.samples) if s.captions}
            return [firsts.get(label, f"class {label}") for label in range(present[-1] + 1)]
        names = read_names(Path(file))
        for label in present:
            if label >= len(names) or not names[label]:
                raise UserError(f"{self.path}: label {label} has no name, {file} has {len(names)} lines")
        return names

    def image(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.samples[index].read(self.path)))

    def captions(self, index: int) -> list[str]:
        return self.samples[index].captions

    def name_of(self, index: int) -> str:
        return f"{self.path}:{self.samples[index].name}"

    def key(self) -> str:
        stat = Path(self.path).stat()
        return f"webdataset {Path(self.path).resolve()} {stat.st_size} {stat.st_mtime_ns}"


@dataclass
class TarSample:
    """Where one sample's picture lies in its shard, and its text."""

    name: str
    offset: int = -1
    size: int = 0
    label: int = -1
    captions: list[str] | None = None

    def read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_names(file: Path) -> list[str]:
    """One name per line: line number = label, so an empty line between others counts."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file of class names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable file of class names: {error}") from None


def index_shard(path: str) -> list[TarSample]:
    """One pass over the headers; text members are read, pictures only located. Nothing is extracted."""
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                sample = samples.setdefault(f"{folder}/{stem}", TarSample(member.name, captions=[]))
                if suffix.lower() in IMAGE_SUFFIXES:
                    sample.name, sample.offset, sample.size = member.name, member.offset_data, member.size
                elif suffix in ("cls", "txt", "json"):
                    add_text(sample, member.name, suffix, tar.extractfile(member).read())
            tar.fileobj.seek(tar.offset)  # tarfile takes a cut or damaged header for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off or damaged, the mark of its end is missing")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable tar shard: {error}") from None
    return [s for s in samples.values() if s.offset >= 0]


def add_text(sample: TarSample, name: str, suffix: str, data: bytes) -> None:
    """`.cls` label, `.txt` one caption, `.json` a list under "captions"; each caption once, `.txt` first."""
    try:
        text = data.decode("utf-8")
        if suffix == "cls":
            sample.label = int(text)
            return
        found = [text] if suffix == "txt" else json_captions(text)
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


@dataclass
class Torchvision(Source):
    """Any classification set of torchvision.datasets; downloads what is missing."""

    name: str
    root: str
    split: str = "train"
    names: list[str] | None = None  # class names, for the sets that carry none (SVHN, GTSRB)
    split_field = "split"

    def __post_init__(self):
        import torchvision.datasets

        cls = getattr(torchvision.datasets, self.name, None)
        if not (inspect.isclass(cls) and issubclass(cls, torchvision.datasets.VisionDataset)):
            raise UserError(
                f"torchvision has no dataset {self.name!r}; its names are case-sensitive, as in MNIST"
            )
        self.dataset = self.open(cls)
        self.labels = np.array(self.read_labels(), dtype=np.int64)
        names = self.names or getattr(self.dataset, "classes", None)
        if not names:
            raise UserError(f"torchvision {self.name} carries no class names, give them with `names: [...]`")
        self.classes = [plain_name(n) for n in names]

    def open(self, cls):
        parameters = inspect.signature(cls.__init__).parameters
        chosen = {"train": self.split == "train"} if "train" in parameters else {"split": self.split}
        fetch = {"download": False} if "download" in parameters else {}
        try:
            return cls(self.root, **fetch, **chosen)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            missing = isinstance(error, (RuntimeError, OSError))
            if not (fetch and missing):
                reason = one_line(error)
                raise UserError(f"torchvision {self.name}, split {self.split!r}: {reason}") from None
        try:
            return cls(self.root, download=True, **chosen)
        except (RuntimeError, OSError) as error:
            problem = f"not under {self.root}, and fetching failed: {one_line(error)}"
            raise UserError(f"torchvision {self.name}: {problem}") from None

    def read_labels(self) -> list[int]:
        for attribute in ("targets", "labels", "_labels", "y"):
            if (labels := getattr(self.dataset, attribute, None)) is not None:
                return [int(label) for label in labels]
        return [int(self.dataset[i][1]) for i in range(len(self.dataset))]

    def image(self, index: int) -> Image.Image:
        return self.dataset[index][0]

    def captions(self, index: int) -> list[str]:
        return []

    def name_of(self, index: int) -> str:
        return f"torchvision {self.name} {self.split} {index}"

    def key(self) -> str:
        return f"torchvision {self.name} {Path(self.root).resolve()} {self.split} {len(self)}"


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def plain_name(name: str | tuple) -> str:
    """Class names as words: "9 - nine" -> "9", "apple_pie" -> "apple pie"."""
    name = name[0] if isinstance(name, tuple) else name
    return name.split(" - ")[0].replace("_", " ").strip()


def rgb(image: Image.Image) -> Image.Image:
    """Any mode, any EXIF orientation -> upright RGB."""
    turn = TURNS.get(image.getexif().get(0x0112))  # ImageOps.exif_transpose fails on damaged EXIF data
    image = image if turn is None else image.transpose(turn)
    if image.mode in ("RGBA", "LA", "PA") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith(("I", "F")):  # 16 and 32 bit
        values = np.asarray(image, dtype=np.float64)
        image = Image.fromarray((values / max(values.max(), 255) * 255).astype(np.uint8))
    return image.convert("RGB")
