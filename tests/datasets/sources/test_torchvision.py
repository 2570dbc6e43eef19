"""Sources: shards are read in place and completely or not at all; torchvision's sets through their own classes."""

import gzip
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from fomo.datasets.sources.torchvision import Torchvision, plain_name
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import UserError


def picture(level: int = 0, form: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (level,) * 3).save(file, form)
    return file.getvalue()


def write_shard(path: Path, members: dict[str, str | bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def one_line(call, *arguments, **fields) -> str:
    """The message of the mistake that a call makes."""
    with pytest.raises(UserError) as error:
        call(*arguments, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def files_under(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_members_that_share_a_name_are_one_sample(tmp_path):
    path = write_shard(
        tmp_path / "train.tar",
        {
            "000.jpg": picture(10),
            "000.cls": "1",
            "000.txt": "a cat",
            "001.cls": "0\n",
            "001.png": picture(200, "PNG"),
            "002.JPEG": picture(90),
        },
    )
    source = Webdataset(path)
    assert len(source) == 3
    assert source.labels.tolist() == [1, 0, -1]
    assert [source.captions(i) for i in range(3)] == [["a cat"], [], []]
    levels = [np.asarray(source.image(i)).mean() for i in range(3)]
    assert levels == pytest.approx([10, 200, 90], abs=2)
    assert source.name_of(1) == f"{path}:001.png"


def test_members_of_a_sample_need_not_follow_each_other(tmp_path):
    members = {"0.txt": "zero", "1.txt": "one", "1.jpg": picture(99), "0.jpg": picture(5)}
    source = Webdataset(write_shard(tmp_path / "a.tar", members))
    found = {source.captions(i)[0]: np.asarray(source.image(i)).mean() for i in range(2)}
    assert found == pytest.approx({"zero": 5, "one": 99}, abs=2)


def test_folders_in_member_names_keep_samples_apart(tmp_path):
    members = {
        "a/b.c/0.jpg": picture(10),
        "a/b.c/0.txt": "first",
        "d/0.jpg": picture(90),
        "d/0.txt": "second",
    }
    source = Webdataset(write_shard(tmp_path / "a.tar", members))
    assert [source.captions(i) for i in range(2)] == [["first"], ["second"]]
    assert source.name_of(1).endswith("a.tar:d/0.jpg")


@pytest.mark.parametrize("order", [("txt", "json"), ("json", "txt")])
def test_the_txt_caption_is_first_and_each_caption_stands_once(tmp_path, order):
    texts = {
        "txt": " one cat \n",
        "json": json.dumps({"id": 7, "captions": ["a dog", "one cat", "", "a dog "]}),
    }
    members = {"0.jpg": picture(), **{f"0.{suffix}": texts[suffix] for suffix in order}}
    assert Webdataset(write_shard(tmp_path / "a.tar", members)).captions(0) == ["one cat", "a dog"]


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ('{"captions": ["two", "words"]}', ["two", "words"]),
        ('{"captions": []}', []),
        ('{"captions": null}', []),
        ('{"width": 8}', []),
    ],
)
def test_json_captions_are_a_list_or_absent(tmp_path, text, captions):
    source = Webdataset(write_shard(tmp_path / "a.tar", {"0.jpg": picture(), "0.json": text}))
    assert source.captions(0) == captions


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("3.json", '{"captions": "letters one by one"}'),
        ("3.json", '{"captions": [1, 2]}'),
        ("3.json", '["a", "b"]'),
        ("3.json", "{"),
        ("3.cls", "tulip"),
        ("3.txt", b"\xff\xfe\xfa"),
    ],
)
def test_text_of_another_kind_is_a_mistake_that_names_the_member(tmp_path, member, content):
    path = write_shard(tmp_path / "a.tar", {"3.jpg": picture(), member: content})
    message = one_line(Webdataset, path)
    assert message.startswith(f"{path}: ") and member in message


@pytest.mark.parametrize("name", ["classes.txt", "classnames.txt"])
def test_class_names_stand_beside_the_shard_by_line_number(tmp_path, name):
    path = write_shard(tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": "2", "0.txt": "something"})
    (tmp_path / name).write_text("red fox\n\nblue fox\n")
    assert Webdataset(path).classes[2] == "blue fox"


def test_a_classes_file_that_is_named_comes_first_and_must_exist(tmp_path):
    path = write_shard(tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": "1", "0.txt": "something"})
    (tmp_path / "classes.txt").write_text("red\nblue\n")
    (tmp_path / "other.txt").write_text("rot\nblau\n")
    assert Webdataset(path, classes_file=str(tmp_path / "other.txt")).classes == ["rot", "blau"]
    assert "nowhere.txt" in one_line(Webdataset, path, classes_file=str(tmp_path / "nowhere.txt"))


def test_without_a_file_the_first_caption_of_a_class_names_it(tmp_path):
    labels = {"0": (2, "tulip"), "1": (0, "rose"), "2": (2, "late tulip")}
    members = {}
    for key, (label, text) in labels.items():
        members |= {f"{key}.jpg": picture(), f"{key}.cls": str(label), f"{key}.txt": text}
    assert Webdataset(write_shard(tmp_path / "a.tar", members)).classes == ["rose", "class 1", "tulip"]


@pytest.mark.parametrize("names", ["red\nblue\n", "red\nblue\n\nblack"])
def test_a_label_without_a_name_is_one_clear_mistake(tmp_path, names):
    path = write_shard(
        tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": "2", "1.jpg": picture(), "1.cls": "0"}
    )
    (tmp_path / "classes.txt").write_text(names)
    message = one_line(Webdataset, path)
    assert path in message and "label 2 has no name" in message and "classes.txt" in message


def shard_of_ten(path: Path) -> bytes:
    members = {}
    for i in range(10):
        members |= {f"{i}.jpg": picture(i), f"{i}.txt": f"number {i}"}
    return Path(write_shard(path, members)).read_bytes()


def member_offsets(path: Path) -> list[tarfile.TarInfo]:
    with tarfile.open(path) as tar:
        return tar.getmembers()


@pytest.mark.parametrize("where", ["in a picture", "in a header", "between members", "before the end mark"])
def test_a_shard_cut_in_the_middle_is_refused_wherever_the_cut_is(tmp_path, where):
    path = tmp_path / "a.tar"
    whole = shard_of_ten(path)
    sixth, *_, last = member_offsets(path)[10:]
    cut = {
        "in a picture": sixth.offset_data + 100,
        "in a header": sixth.offset + 100,
        "between members": sixth.offset,
        "before the end mark": last.offset_data + 512,
    }[where]
    assert len(Webdataset(str(path))) == 10
    path.write_bytes(whole[:cut])
    assert str(path) in one_line(Webdataset, str(path))


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    path = tmp_path / "a.tar"
    whole = bytearray(shard_of_ten(path))
    start = member_offsets(path)[10].offset
    whole[start : start + 20] = b"x" * 20
    path.write_bytes(whole)
    assert str(path) in one_line(Webdataset, str(path))


@pytest.mark.parametrize(
    "content", [b"", b"not a tar file at all", gzip.compress(b"0" * 2000, mtime=0), bytes(10240)]
)
def test_what_is_no_shard_is_refused(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert str(path) in one_line(Webdataset, str(path))
    assert "no such tar file" in one_line(Webdataset, str(tmp_path / "absent.tar"))


def test_absolute_and_climbing_member_names_never_touch_the_disk(tmp_path):
    outside = tmp_path / "outside"
    names = [f"{outside}/0", "../1", "../../outside/2", "a/../../3"]
    members = {}
    for i, name in enumerate(names):
        members |= {f"{name}.jpg": picture(10 * i), f"{name}.txt": str(i)}
    path = write_shard(tmp_path / "deep" / "inside" / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    before = files_under(tmp_path)
    source = Webdataset(path)
    assert [source.captions(i) for i in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    assert [np.asarray(source.image(i)).mean() for i in range(4)] == pytest.approx([0, 10, 20, 30], abs=2)
    assert len(source) == 4
    assert files_under(tmp_path) == before and not outside.exists()


def test_another_content_of_the_same_shard_is_another_key(tmp_path):
    first = write_shard(tmp_path / "a.tar", {"0.jpg": picture(1)})
    key = Webdataset(first).key()
    assert Webdataset(first).key() == key
    assert Webdataset(write_shard(tmp_path / "b.tar", {"0.jpg": picture(1)})).key() != key
    write_shard(tmp_path / "a.tar", {"0.jpg": picture(1), "1.jpg": picture(2)})
    assert Webdataset(first).key() != key


def counts_of_readme(folder: Path) -> dict[str, tuple[str, int, int]]:
    """name -> (number of classes or "-", train, test) from the table in the README of the test data."""
    row = re.compile(r"^\| `(\w+)` \|[^|]*\|[^|]*\| (\d+|-) \| (\d+) \| (\d+) \|", re.M)
    found = row.findall((folder / "README.md").read_text())
    return {name: (classes, int(train), int(test)) for name, classes, train, test in found}


def test_all_thirteen_real_shards_open_with_the_counts_of_their_readme(real_data):
    counts = counts_of_readme(real_data)
    shards = {name for name in counts if (real_data / name / "train.tar").is_file()}
    assert len(shards) == 13
    for name in shards:
        classes, *expected = counts[name]
        train, test = (Webdataset(str(real_data / name / f"{split}.tar")) for split in ("train", "test"))
        assert [len(train), len(test)] == expected, name
        assert len(train.classes) == len(test.classes) == (0 if classes == "-" else int(classes)), name
        for source in (train, test):
            assert all(source.captions(i) for i in range(len(source))), name
            assert min(source.image(0).size) > 20
            if source.classes:
                names = (real_data / name / "classes.txt").read_text().split("\n")
                assert {source.captions(i)[0] for i in range(len(source))} <= set(names)
                for i in range(0, len(source), 7):
                    assert source.captions(i) == [names[source.labels[i]]], (name, i)


def test_coco_pictures_have_their_five_captions(real_data):
    source = Webdataset(str(real_data / "coco_captions" / "test.tar"))
    assert source.classes == [] and (source.labels == -1).all()
    assert {len(source.captions(i)) for i in range(len(source))} == {5}


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
        return Image.new("RGB", (4, 4), (index,) * 3), index % 2


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
