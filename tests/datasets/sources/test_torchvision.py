"""torchvision's sets through their own classes."""

import numpy as np
import pytest
import torchvision.datasets

from fomo.datasets.sources.torchvision import Torchvision, plain_name
from tests.datasets.inputs import gray, one_line


@pytest.mark.parametrize(
    ("name", "folder", "split", "count"),
    [
        ("MNIST", "mnist", "train", 3000),
        ("MNIST", "mnist", "test", 1000),
        ("FashionMNIST", "fashion_mnist", "test", 1000),
        ("FashionMNIST", "fashion_mnist", "train", 1700),
    ],
)
def test_torchvision_sets_hold_the_bytes_of_their_files(real_data, name, folder, split, count):
    source = Torchvision(name, str(real_data / folder), split)
    raw = real_data / folder / name / "raw"
    prefix = "train" if split == "train" else "t10k"
    labels = np.frombuffer((raw / f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    pixels = np.frombuffer((raw / f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    assert len(source) == count
    np.testing.assert_array_equal(source.labels, labels)
    for index in (0, 17, count - 1):
        np.testing.assert_array_equal(np.asarray(source.image(index)), pixels.reshape(-1, 28, 28)[index])
    assert source.captions(0) == []
    expected = list("0123456789") if name == "MNIST" else ["T-shirt/top", "Trouser", "Pullover"]
    assert source.classes[: len(expected)] == expected


class Shelf(torchvision.datasets.VisionDataset):
    """A made-up set with a `split`, names with underscores, and labels only in its samples."""

    classes = ("apple_pie", "baked beans")

    def __init__(self, root, split="train", transform=None, target_transform=None, download=False):
        super().__init__(root)
        if split not in ("train", "test"):
            raise ValueError(f"Unknown value '{split}'")
        if root == "empty":
            raise OSError("name resolution failed") if download else RuntimeError("Dataset not found")
        self.size = 4 if split == "train" else 2

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return gray(index), index % 2


class Loose(torchvision.datasets.VisionDataset):
    """A set that cannot fetch itself."""

    def __init__(self, root, split="train"):
        raise RuntimeError("the archive ILSVRC.tar is not present")


def test_torchvision_sets_with_a_split_open_and_speak_in_words(monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "Shelf", Shelf, raising=False)
    train, test = Torchvision("Shelf", "shelf", "train"), Torchvision("Shelf", "shelf", "test")
    assert (len(train), len(test)) == (4, 2)
    assert train.labels.tolist() == [0, 1, 0, 1]
    assert train.classes == ["apple pie", "baked beans"]
    assert Torchvision("Shelf", "shelf", names=["pie", "beans"]).classes == ["pie", "beans"]
    assert train.key() != test.key()


def test_mistakes_with_torchvision_are_one_line(monkeypatch):
    for stub in (Shelf, Loose):
        monkeypatch.setattr(torchvision.datasets, stub.__name__, stub, raising=False)
    assert "Mnist" in one_line(Torchvision, "Mnist", "x")
    assert "wrong_split" in one_line(Torchvision, "Shelf", "x", "wrong_split")
    message = one_line(Torchvision, "Shelf", "empty")
    assert "not under empty" in message and "name resolution failed" in message
    assert "ILSVRC.tar" in one_line(Torchvision, "Loose", "x")
    assert "ImageFolder" in one_line(Torchvision, "ImageFolder", "x")
    monkeypatch.delattr(Shelf, "classes")
    assert "names: [...]" in one_line(Torchvision, "Shelf", "x")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("9 - nine", "9"),
        ("apple_pie", "apple pie"),
        (("tench", "Tinca tinca"), "tench"),
        ("T-shirt/top",) * 2,
    ],
)
def test_class_names_become_words(name, plain):
    assert plain_name(name) == plain
