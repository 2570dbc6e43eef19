"""Sets that torchvision.datasets knows and fetches."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fomo.datasets.sources.base import Source
from fomo.errors import UserError, one_line


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


def plain_name(name: str | tuple) -> str:
    """Class names as words: "9 - nine" -> "9", "apple_pie" -> "apple pie"."""
    name = name[0] if isinstance(name, tuple) else name
    return name.split(" - ")[0].replace("_", " ").strip()
