"""Many shards by one index that is built once, and the layout of CLIP_benchmark."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fomo.datasets.sources import webdataset
from fomo.datasets.sources.clip_benchmark import ClipBenchmark
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (level,) * 3).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, members: dict[str, str | bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def numbered(folder: Path, shards: int, each: int = 3) -> str:
    """Picture n has gray level n and the caption "number n"; -> the brace range."""
    for s in range(shards):
        members = {}
        for n in range(s * each, (s + 1) * each):
            members |= {f"{n}.png": picture(n), f"{n}.txt": f"number {n}", f"{n}.cls": str(n % 2)}
        shard(folder / f"{s:04d}.tar", members)
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
        webdataset, "scan", lambda files, lines, n: scanned.append(n) or scan(files, lines, n)
    )
    keys = {Webdataset(path).key() for _ in range(3)}
    assert scanned == [0, 1] and len(keys) == 1
    assert len(list((cache / "indexes").iterdir())) == 1
    shard(tmp_path / "0001.tar", {"9.png": picture(9), "9.txt": "nine"})
    assert len(Webdataset(path)) == 4 and scanned == [0, 1, 0, 1]


def test_the_index_is_mapped_not_loaded(tmp_path):
    source = Webdataset(numbered(tmp_path, 2))
    for array in (source.offsets, source.texts.flat, source.names.flat, source.rows):
        assert isinstance(array.base, np.memmap)


def test_a_missing_and_a_cut_shard_are_named(tmp_path):
    path = numbered(tmp_path, 12)
    whole = (tmp_path / "0007.tar").read_bytes()
    (tmp_path / "0007.tar").write_bytes(whole[:2000])
    with pytest.raises(UserError, match=r"0007\.tar: not a readable tar shard") as error:
        Webdataset(path)
    assert "\n" not in str(error.value)
    (tmp_path / "0007.tar").unlink()
    with pytest.raises(UserError, match=r"0007\.tar: no such tar file \(1 of 12 shards are missing\)"):
        Webdataset(path)


def test_samples_without_a_known_picture_are_counted_and_the_first_is_named(tmp_path):
    members = {"0.png": picture(0), "0.txt": "a", "1.heic": b"?", "1.txt": "b", "2.svg": b"?"}
    shard(tmp_path / "a.tar", members)
    source = Webdataset(str(tmp_path / "a.tar"))
    assert len(source) == 1
    assert "2 samples have no picture, first: " in source.notes[0] and "a.tar:1.heic" in source.notes[0]


def test_splits_without_a_classes_file_share_their_names(tmp_path):
    train, test = tmp_path / "train.tar", tmp_path / "test.tar"
    shard(train, {"0.png": picture(0), "0.cls": "1", "0.txt": "tulip"})
    shard(test, {"0.png": picture(0), "0.cls": "1", "0.txt": "late tulip", "1.png": picture(1), "1.cls": "2"})
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
            members = {f"s{i}.webp": picture(i) for i in range(2)} | {f"s{i}.cls": str(i) for i in range(2)}
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
    shard(tmp_path / "test" / "0.tar", {"0.webp": picture(0), "0.txt": "a cat\na small cat\n"})
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
