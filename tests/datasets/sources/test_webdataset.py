"""Tar shards: read in place, completely or not at all, by one index that is built once."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fomo.datasets.sources import webdataset
from fomo.datasets.sources.clip_benchmark import ClipBenchmark
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import UserError
from fomo.schema import build
from tests.datasets.inputs import PNG, encoded, gray, one_line, packed, samples, shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_under(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts}


def test_members_that_share_a_name_are_one_sample(tmp_path):
    path = shard(
        tmp_path / "train.tar",
        {
            "000.jpg": encoded(gray(10), "JPEG"),
            "000.cls": "1",
            "000.txt": "a cat",
            "001.cls": "0\n",
            "001.png": encoded(gray(200)),
            "002.JPEG": encoded(gray(90)),
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
    members = {"0.txt": "zero", "1.txt": "one", "1.jpg": encoded(gray(99)), "0.jpg": encoded(gray(5))}
    source = Webdataset(shard(tmp_path / "a.tar", members))
    found = {source.captions(i)[0]: np.asarray(source.image(i)).mean() for i in range(2)}
    assert found == pytest.approx({"zero": 5, "one": 99}, abs=2)


def test_folders_in_member_names_keep_samples_apart(tmp_path):
    members = {
        "a/b.c/0.jpg": encoded(gray(10)),
        "a/b.c/0.txt": "first",
        "d/0.jpg": encoded(gray(90)),
        "d/0.txt": "second",
    }
    source = Webdataset(shard(tmp_path / "a.tar", members))
    assert [source.captions(i) for i in range(2)] == [["first"], ["second"]]
    assert source.name_of(1).endswith("a.tar:d/0.jpg")


@pytest.mark.parametrize("order", [("txt", "json"), ("json", "txt")])
def test_the_txt_caption_is_first_and_each_caption_stands_once(tmp_path, order):
    texts = {
        "txt": " one cat \n",
        "json": json.dumps({"id": 7, "captions": ["a dog", "one cat", "", "a dog "]}),
    }
    members = {"0.jpg": PNG, **{f"0.{suffix}": texts[suffix] for suffix in order}}
    assert Webdataset(shard(tmp_path / "a.tar", members)).captions(0) == ["one cat", "a dog"]


@pytest.mark.parametrize(
    ("member", "content"),
    [
        ("3.json", '{"captions": [1, 2]}'),
        ("3.json", '["a", "b"]'),
        ("3.json", "{"),
        ("3.json", b"\xff"),
        ("3.json", "[" * 10_000),
        ("3.txt", b"\xff\xfe\xfa"),
        ("3.TXT", "Käse".encode("latin-1")),
    ],
)
def test_a_text_that_cannot_be_read_is_left_out_counted_and_named(tmp_path, member, content):
    members = views("1", "2", txt="of {}") | {"3.png": PNG, member: content}
    captions, labels, (note,) = read(tmp_path, members)
    assert captions == {"1.png": ["of 1"], "2.png": ["of 2"], "3.png": []} and labels == [-1] * 3
    assert note.startswith(f"1 texts cannot be read and are left out, first: {tmp_path}/a.tar:{member} (")


def test_of_a_damaged_json_beside_a_txt_the_txt_stays_and_the_other_way_round(tmp_path):
    members = {"1.png": PNG, "1.txt": "a cat", "1.json": "{", "2.png": PNG, "2.txt": b"\xff"}
    captions, _, (note,) = read(tmp_path, members | {"2.json": '{"captions": ["a dog"]}'})
    assert captions == {"1.png": ["a cat"], "2.png": ["a dog"]} and note.startswith("2 texts cannot be read")


@pytest.mark.parametrize("label", ["tulip", "1.5", b"\xff", "", "9" * 40])
def test_a_sample_whose_label_is_no_number_is_left_out_counted_and_named(tmp_path, label):
    """It is not one without a label: what would be learnt of it is wrong."""
    captions, labels, (note,) = read(tmp_path, views("1", "2", cls="1", txt="a cat") | {"2.CLS": label})
    assert captions == {"1.png": ["a cat"]} and labels == [1]
    assert note.startswith("1 samples have a .cls that is no number and are left out, first: ")
    assert f"{tmp_path}/a.tar:2.CLS (" in note
    message = one_line(Webdataset, shard(tmp_path / "b.tar", {"1.png": PNG, "1.cls": label}))
    assert "no samples" in message and "1 samples have a .cls that is no number" in message


@pytest.mark.parametrize("beside", ["classes.txt", "classnames.txt"])
def test_class_names_stand_in_a_file_beside_the_shard_or_in_one_that_is_named(tmp_path, beside):
    path = shard(tmp_path / "a.tar", {"0.jpg": PNG, "0.cls": "1", "0.txt": "something"})
    (tmp_path / beside).write_text("red\nblue\n\ngreen\n")
    assert Webdataset(path).classes == ["red", "blue", "", "green"]
    (tmp_path / "other.txt").write_text("rot\nblau\n")
    assert Webdataset(path, classes_file=str(tmp_path / "other.txt")).classes == ["rot", "blau"]
    assert "nowhere.txt" in one_line(Webdataset, path, classes_file=str(tmp_path / "nowhere.txt"))


def test_without_a_file_the_first_caption_of_a_class_names_it(tmp_path):
    labels = {"0": (2, "tulip"), "1": (0, "rose"), "2": (2, "late tulip")}
    members = {}
    for key, (label, text) in labels.items():
        members |= {f"{key}.jpg": PNG, f"{key}.cls": str(label), f"{key}.txt": text}
    assert Webdataset(shard(tmp_path / "a.tar", members)).classes == ["rose", "class 1", "tulip"]


@pytest.mark.parametrize("names", ["red\nblue\n", "red\nblue\n\nblack"])
def test_a_label_without_a_name_is_one_clear_mistake(tmp_path, names):
    path = shard(tmp_path / "a.tar", {"0.jpg": PNG, "0.cls": "2", "1.jpg": PNG, "1.cls": "0"})
    (tmp_path / "classes.txt").write_text(names)
    message = one_line(Webdataset, path)
    assert path in message and "label 2 has no name" in message and "classes.txt" in message


def shard_of_ten(path: Path) -> bytes:
    return Path(shard(path, samples(10, txt=lambda n: f"number {n}"))).read_bytes()


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


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (
            gzip.compress,
            "compressed (gzip); expected a plain tar file, whose members are read in place: gunzip -c",
        ),
        (bz2.compress, "compressed (bzip2); "),
        (lzma.compress, "compressed (xz); "),
        (lambda data: b"PK\x03\x04" + data, "a zip archive; "),
        (lambda data: b"7z\xbc\xaf\x27\x1c" + data, "a 7z archive; "),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git's note of where"),
        (lambda data: b"<!DOCTYPE html><html>", "a web page, not what was to be fetched"),
    ],
)
def test_other_archives_are_told_by_their_content_whatever_they_are_called(tmp_path, name, pack, told):
    (tmp_path / name).write_bytes(pack(packed(samples(3))))
    assert one_line(Webdataset, str(tmp_path / name)).startswith(f"{tmp_path / name}: it is {told}")


def test_a_member_may_be_called_as_other_archives_begin(tmp_path):
    assert len(Webdataset(shard(tmp_path / "a.tar", {"PK.png": PNG, "<b>.png": PNG}))) == 2


def test_absolute_and_climbing_member_names_never_touch_the_disk(tmp_path):
    outside = tmp_path / "outside"
    names = [f"{outside}/0", "../1", "../../outside/2", "a/../../3"]
    members = {}
    for i, name in enumerate(names):
        members |= {f"{name}.jpg": encoded(gray(10 * i)), f"{name}.txt": str(i)}
    path = shard(tmp_path / "deep" / "inside" / "a.tar", members)
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
    first = shard(tmp_path / "a.tar", {"0.jpg": encoded(gray(1))})
    key = Webdataset(first).key()
    assert Webdataset(first).key() == key
    assert Webdataset(shard(tmp_path / "b.tar", {"0.jpg": encoded(gray(1))})).key() != key
    shard(tmp_path / "a.tar", {"0.jpg": encoded(gray(1)), "1.jpg": encoded(gray(2))})
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


def numbered(folder: Path, shards: int, each: int = 3) -> str:
    """Picture n has gray level n and the caption "number n"; -> the brace range."""
    for s in range(shards):
        numbers = range(s * each, (s + 1) * each)
        shard(
            folder / f"{s:04d}.tar", samples(numbers, txt=lambda n: f"number {n}", cls=lambda n: str(n % 2))
        )
    return str(folder / f"{{0000..{shards - 1:04d}}}.tar")


@pytest.mark.parametrize("shards", [1, 4, 12])
def test_shards_are_read_end_to_end(tmp_path, shards):
    source = Webdataset(numbered(tmp_path, shards))
    assert len(source) == 3 * shards
    for n in range(len(source)):
        assert np.asarray(source.image(n)).max() == n
        assert source.captions(n) == [f"number {n}"]
        assert source.labels[n] == n % 2
        assert source.name_of(n) == f"{tmp_path}/{n // 3:04d}.tar:{n}.png"
    assert source.caption_counts().tolist() == [1] * len(source)


def test_a_list_of_paths_is_in_its_own_order(tmp_path):
    numbered(tmp_path, 3)
    source = Webdataset([str(tmp_path / "0002.tar"), str(tmp_path / "{0000..0001}.tar")])
    assert [source.captions(i)[0] for i in (0, 3, 8)] == ["number 6", "number 0", "number 5"]


def test_the_index_is_built_once_and_again_when_a_shard_changes(tmp_path, cache, monkeypatch):
    path, scanned, scan = numbered(tmp_path, 2), [], webdataset.scan
    monkeypatch.setattr(
        webdataset, "scan", lambda file, keys: scanned.append(Path(file).name) or scan(file, keys)
    )
    keys = {Webdataset(path).key() for _ in range(3)}
    assert scanned == ["0000.tar", "0001.tar"] and len(keys) == 1
    assert len(list((cache / "indexes").iterdir())) == 1
    shard(tmp_path / "0001.tar", {"9.png": encoded(gray(9)), "9.txt": "nine"})
    assert len(Webdataset(path)) == 4 and scanned == ["0000.tar", "0001.tar"] * 2


def test_the_index_is_mapped_not_loaded(tmp_path):
    source = Webdataset(numbered(tmp_path, 2))
    for array in (source.offsets, source.texts.texts.flat, source.names.flat, source.texts.ends):
        assert isinstance(array.base, np.memmap)


def test_a_missing_and_a_cut_shard_are_named(tmp_path):
    path = numbered(tmp_path, 12)
    whole = (tmp_path / "0007.tar").read_bytes()
    (tmp_path / "0007.tar").write_bytes(whole[:2000])
    assert "0007.tar: not a readable tar shard" in one_line(Webdataset, path)
    (tmp_path / "0007.tar").unlink()
    assert "0007.tar: no such tar file (1 of 12 shards are missing)" in one_line(Webdataset, path)


def read(tmp_path: Path, members: dict, **fields) -> tuple[dict[str, list[str]], list[int], tuple[str, ...]]:
    """-> the captions by the pictures' names, the labels, the notes."""
    source = Webdataset(shard(tmp_path / "a.tar", members), **fields)
    for index in range(len(source)):  # each picture is what stands under its name
        file = members[source.id_of(index)]
        assert source.image(index).tobytes() == Image.open(io.BytesIO(file)).tobytes()
    captions = {source.id_of(i): source.captions(i) for i in range(len(source))}
    return captions, source.labels.tolist(), source.notes


def views(*stems: str, **texts: str) -> dict[str, bytes | str]:
    """A picture for each stem, with the text `of STEM` in a member of each suffix."""
    members = {}
    for level, stem in enumerate(stems):
        members[f"{stem}.png"] = encoded(gray(level))
        members |= {f"{stem}.{suffix}": text.format(stem) for suffix, text in texts.items()}
    return members


@pytest.mark.parametrize(
    "stems",
    [
        ("shirt", "shirt.back", "shirt.side", "hat"),
        ("shirt.back", "shirt.v2", "shirt"),
        ("set.v1/000", "set.v1/shirt-4.v2", "set.v2/shirt-4.v2"),
        ("22.05", "22.06", "v1.0.jpg"),
        (".hidden", ".hidden.v2"),
    ],
)
def test_dots_in_names_lose_no_picture_and_no_text(tmp_path, stems):
    captions, labels, notes = read(tmp_path, views(*stems, txt="of {}", cls="0"))
    assert captions == {f"{stem}.png": [f"of {stem}"] for stem in stems}
    assert labels == [0] * len(stems) and not any("left out" in note for note in notes)
    assert list(read(tmp_path, views(*stems))[0]) == [f"{stem}.png" for stem in stems]  # without any text


PICTURES, OF_DOTS = ("a.jpg", "a.b.jpg", "a.b.c.JPG"), ("a.txt", "a.b.TXT", "a.b.c.Txt", "a.cls", "a.b.CLS")


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("pictures", [c for n in (1, 2, 3) for c in itertools.combinations(PICTURES, n)])
def test_with_any_dots_each_member_is_used_or_told_and_own_texts_stay(tmp_path, pictures, order):
    for texts in (c for n in range(6) for c in itertools.combinations(OF_DOTS, n)):
        path = shard(tmp_path / "a.tar", dict.fromkeys([*pictures, *texts][::order], "1"))
        found, noted = webdataset.with_pictures(webdataset.read_members(path))
        told = [name for names in noted.values() for name in names]
        assert sorted([sample.name for sample in found] + [n for n in told if n in pictures]) == sorted(
            pictures
        )
        used = {name for sample in found for name, _ in sample.texts.values()}
        captions = [text for text in texts if text.lower().endswith("txt")]
        assert all((text in used) != (text in told) for text in captions), (pictures, texts)
        for sample in found:
            stem = sample.name.rpartition(".")[0]
            own = {text for text in texts if text.rpartition(".")[0] == stem}
            assert own <= {name for name, _ in sample.texts.values()}, (pictures, texts)


def test_what_macos_adds_to_an_archive_is_no_picture(tmp_path):
    members = views("a", txt="of {}") | {"._a.png": b"resource fork", "._a.txt": b"\xff"}
    assert read(tmp_path, members) == ({"a.png": ["of a"]}, [-1], ())


def test_what_stands_for_the_whole_name_holds_for_its_pictures(tmp_path):
    members = views("0.left", "1.a", "1.b", txt="of {}") | {"1.cls": "3"} | views("2.view")
    del members["0.left.txt"]
    members |= {"0.txt": "zero", "0.cls": "1", "2.json": "{}"}
    captions, labels, notes = read(tmp_path, members)
    assert captions == {
        "0.left.png": ["zero"],
        "1.a.png": ["of 1.a"],
        "1.b.png": ["of 1.b"],
        "2.view.png": [],
    }
    assert dict(zip(captions, labels, strict=True)) == {
        "0.left.png": 1,
        "1.a.png": 3,
        "1.b.png": 3,
        "2.view.png": -1,
    }
    assert not any("left out" in note for note in notes)


@pytest.mark.parametrize(
    ("extra", "note"),
    [
        (
            {"0.mask.png": PNG},
            "1 pictures belong to a sample that has one and are left out, first: {}:0.mask.png",
        ),
        (
            {"0.JPG": PNG, "1.jpg": PNG},
            "2 pictures belong to a sample that has one and are left out, first: {}:0.png",
        ),
        ({"0.meta.json": "[]"}, "1 texts belong to no picture and are left out, first: {}:0.meta.json"),
        ({"0.npy": b"?", "__index__.npz": b"?"}, "1 samples have no picture"),
    ],
)
def test_what_is_left_out_is_counted_and_the_first_is_named(tmp_path, extra, note):
    captions, _, (found,) = read(tmp_path, views("0", "1", txt="of {}") | extra)
    assert list(captions.values()) == [["of 0"], ["of 1"]]
    assert found.startswith(note.format(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    ("fields", "content", "captions"),
    [
        ({}, {"caption": "a", "long_caption": "b", "status": "success"}, ["a"]),
        ({}, {"text": "a", "width": 8}, ["a"]),
        ({}, {"captions": ["a", "b"], "caption": "c"}, ["a", "b"]),
        ({}, {"captions": None, "text": ["a", " a ", ""]}, ["a"]),
        ({}, {"captions": [], "caption": 5, "text": "a"}, ["a"]),
        ({}, {"captions": "letters one by one"}, ["letters one by one"]),
        ({}, {"width": 8}, []),
        ({"caption": "long_caption"}, {"caption": "a", "long_caption": "b"}, ["b"]),
        ({"caption": ["short", "long"]}, {"caption": "a", "long": ["b", "c"], "short": "d"}, ["d", "b", "c"]),
        ({"caption": "long_caption"}, {"caption": "a", "captions": ["b"]}, []),
    ],
)
def test_captions_are_found_by_a_key_of_the_json(tmp_path, fields, content, captions):
    path = shard(tmp_path / "a.tar", {"0.jpg": PNG, "0.json": json.dumps(content)})
    source = build(Webdataset, {"path": path, **fields})
    assert source.captions(0) == captions
    guessed = not fields and not content.get("captions") and captions
    assert [note.partition(" of their .json")[0] for note in source.notes] == (
        [f'1 pictures have the "{"caption" if isinstance(content.get("caption"), str) else "text"}"']
        * bool(guessed)
    )


def test_a_key_that_is_asked_for_stands_above_the_txt(tmp_path):
    members = {"0.jpg": PNG, "0.txt": "alt text", "0.json": json.dumps({"caption": "old", "new": "a cat"})}
    path = shard(tmp_path / "a.tar", members)
    assert Webdataset(path).captions(0) == ["alt text"]
    assert Webdataset(path, caption="new").captions(0) == ["a cat"]
    wrong = shard(tmp_path / "a.tar", {"0.jpg": PNG, "0.json": '{"new": 5}'})
    (note,) = Webdataset(wrong, caption="new").notes
    assert "a.tar:0.json (new: expected a text" in note


def test_samples_without_a_known_picture_are_counted_and_the_first_is_named(tmp_path):
    members = {"0.png": PNG, "0.txt": "a", "1.heic": b"?", "1.txt": "b", "2.svg": b"?"}
    shard(tmp_path / "a.tar", members)
    source = Webdataset(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert source.notes[0].startswith("2 samples have no picture") and "a.tar:1.heic" in source.notes[0]


def test_splits_without_a_classes_file_share_their_names(tmp_path):
    train, test = tmp_path / "train.tar", tmp_path / "test.tar"
    shard(train, {"0.png": PNG, "0.cls": "1", "0.txt": "tulip"})
    shard(test, {"0.png": PNG, "0.cls": "1", "0.txt": "late tulip", "1.png": PNG, "1.cls": "2"})
    both = [Webdataset(str(train)), Webdataset(str(test))]
    for split in both:
        split.agree(both)
        assert split.classes == ["class 0", "tulip", "class 2"]


def test_classes_of_the_same_name_are_noted(tmp_path):
    path = numbered(tmp_path, 1)
    (tmp_path / "classes.txt").write_text("crane\ncrane\n")
    assert Webdataset(path).notes == ("two classes have the same name 'crane', labels 0 and 1",)


def exported(root: Path) -> Path:
    """What clip_benchmark_export_wds writes."""
    for split in ("train", "test"):
        for s in range(2):
            members = {f"s{i}.webp": encoded(gray(i)) for i in range(2)} | {
                f"s{i}.cls": str(i) for i in range(2)
            }
            shard(root / split / f"{s}.tar", members)
        (root / split / "nshards.txt").write_text("2")
    (root / "classnames.txt").write_text("banded\nblotchy\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c} texture.\na {c} thing.\n")
    return root


def test_the_layout_of_clip_benchmark_opens_with_names_and_prompts(tmp_path):
    root = exported(tmp_path / "dtd")
    for split in ("train", "test"):
        source = ClipBenchmark(root=str(root), split=split)
        assert len(source) == 4 and source.classes == ["banded", "blotchy"]
        assert source.prompts == ("a photo of a {} texture.", "a {} thing.")
        assert source.labels.tolist() == [0, 1, 0, 1]


def test_a_retrieval_set_of_clip_benchmark_has_one_caption_per_line(tmp_path):
    shard(tmp_path / "test" / "0.tar", {"0.webp": PNG, "0.txt": "a cat\na small cat\n"})
    (tmp_path / "test" / "nshards.txt").write_text("1\n")
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    source = ClipBenchmark(root=str(tmp_path), split="test")
    assert source.captions(0) == ["a cat", "a small cat"] and source.classes == []
    with pytest.raises(UserError, match=r"train/nshards\.txt: no such file, so there is no train split"):
        ClipBenchmark(root=str(tmp_path))


def test_a_set_of_the_hub_is_the_same_layout(tmp_path, monkeypatch):
    root = exported(tmp_path / "dtd")

    def download(repo, file, **options):
        from huggingface_hub.errors import EntryNotFoundError

        assert repo == "clip-benchmark/wds_vtab-dtd"
        if not (root / file).is_file():
            raise EntryNotFoundError(file)
        return str(root / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(ClipBenchmark(name="vtab/dtd", split="test")) == 4
    with pytest.raises(UserError, match="either name"):
        ClipBenchmark()
