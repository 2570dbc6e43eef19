"""`data check` and `data cache`: what is wrong is found before a run, with exit status 2 or as a warning."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from fomo.datasets.check import HEAD, as_cached, check
from fomo.errors import UserError
from fomo.recipe import Model
from tests.datasets.inputs import draw, encoded, noise, table
from tests.datasets.inputs import shard as write_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cli():
    return runpy.run_path(str(ROOT / "fomo.py"))["cli"]


def folders(root: Path, classes: dict[str, list[int]]) -> None:
    for name, seeds in classes.items():
        for seed in seeds:
            draw(root / name / f"{seed}.png", noise(seed))


def shard(path: Path, samples: dict[int, dict[str, str]]) -> None:
    members = {}
    for seed, texts in samples.items():
        members[f"{seed}.png"] = encoded(noise(seed))
        members |= {f"{seed}.{suffix}": text for suffix, text in texts.items()}
    write_shard(path, members)


@pytest.fixture
def data(tmp_path) -> dict:
    """A good data file: pets in class folders, a shop's table, captions in a shard."""
    folders(tmp_path / "pets" / "train", {"cat": [1, 2, 3], "dog": [4, 5, 6]})
    folders(tmp_path / "pets" / "test", {"cat": [7], "dog": [8]})
    shard(tmp_path / "pool.tar", {n: {"txt": f"picture {n}"} for n in range(20, 25)})
    shard(tmp_path / "held.tar", {n: {"txt": f"picture {n}"} for n in range(30, 34)})
    return {
        "image_size": 8,
        "pretraining": [{"source": "webdataset", "path": "pool.tar"}],
        "adaptation": {"pets": {"source": "folder", "train": "pets/train", "test": "pets/test"}},
        "evaluation": {"held": {"source": "webdataset", "test": "held.tar", "task": "retrieval"}},
    }


def written(folder: Path, content: dict) -> str:
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "data.yaml")


def test_good_data_is_counted_and_nothing_is_said(tmp_path, data, cli):
    result = CliRunner().invoke(cli, ["data", "check", written(tmp_path, data)])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert tuple(rows[0]) == HEAD
    assert rows[1:] == [
        ["pretraining[0]", "train", "5", "0", "5", "0", "1", "-"],
        ["pets", "train", "6", "0", "0", "6", "2", "-"],
        ["pets", "test", "2", "0", "0", "2", "2", "0"],
        ["held", "test", "4", "0", "4", "0", "1", "0"],
    ]


def test_missing_paths_and_cut_shards_are_errors_all_of_them(tmp_path, data, cli):
    whole = (tmp_path / "held.tar").read_bytes()
    (tmp_path / "held.tar").write_bytes(whole[: len(whole) // 2])
    data["adaptation"]["pets"]["test"] = "gone"
    result = CliRunner().invoke(cli, ["data", "check", written(tmp_path, data)])
    assert result.exit_code == 2
    errors = [line for line in result.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "adaptation.pets" in errors[0] and "gone: no such folder" in errors[0]
    assert "held.tar: not a readable tar shard" in errors[1]
    assert result.stderr.splitlines()[-1].startswith(f"fomo: {tmp_path}/data.yaml: 2 errors, first: ")


def test_a_test_class_without_a_name_is_an_error(tmp_path, data):
    shard(tmp_path / "held.tar", {1: {"cls": "0", "txt": "cat"}, 2: {"cls": "2"}})
    data["evaluation"]["held"].pop("task")
    found = check(written(tmp_path, data))
    assert found.errors == ["evaluation.held (test): label 2 has no name: no classes.txt, no caption"]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (error,) = check(written(tmp_path, data)).errors
    assert "label 2 has no name" in error and "classes.txt has 2" in error


def test_unreadable_pictures_are_a_warning_up_to_the_limit_and_an_error_beyond(tmp_path, data):
    many = tmp_path / "pets" / "train" / "cat"
    for seed in range(100, 220):
        draw(many / f"{seed}.png", noise(seed))
    (many / "100.png").write_bytes((many / "100.png").read_bytes()[:60])
    found = check(written(tmp_path, data))
    assert not found.errors and "1 of 126 pictures cannot be read, first: " in found.warnings[0]
    for seed in (101, 102):
        (many / f"{seed}.png").write_bytes(b"")
    (error,) = check(written(tmp_path, data)).errors
    assert "adaptation.pets (train): 3 of 126 pictures" in error and "the limit of 1%" in error
    data["skip_bad"] = True
    found = check(written(tmp_path, data))
    assert not found.errors and "3 of 126 pictures cannot be read, first: " in found.warnings[0]


def test_bad_lists_every_picture_that_cannot_be_read(tmp_path, data, cli):
    """A line each, whatever the limit says and wherever it lies: path, tab, why."""
    broken = [tmp_path / "pets" / place for place in ("train/cat/1.png", "train/dog/4.png", "test/dog/8.png")]
    for n, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[: 20 * n])
    members = {"1.png": encoded(noise(1)), "1.txt": "a", "2.png": b"nothing", "2.txt": "b"}
    write_shard(tmp_path / "held.tar", members)
    arguments = ["data", "check", written(tmp_path, data), "--bad", str(tmp_path / "list.txt")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2 and f"{tmp_path}/list.txt: 4 pictures that cannot be read" in result.stdout
    rows = [line.split("\t") for line in (tmp_path / "list.txt").read_text().splitlines()]
    assert [row[0] for row in rows] == [*map(str, broken), f"{tmp_path}/held.tar:2.png"]
    assert all(len(row) == 2 and row[1] for row in rows)
    for path in broken:
        path.unlink()
    write_shard(tmp_path / "held.tar", {"1.png": encoded(noise(1)), "1.txt": "a"})
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    assert (tmp_path / "list.txt").read_bytes() == b"" and not list(tmp_path.glob("*.part"))


def test_copies_of_test_pictures_are_found_by_their_pixels(tmp_path, data):
    draw(tmp_path / "pets" / "test" / "cat" / "same.bmp", noise(2))
    draw(tmp_path / "pets" / "test" / "dog" / "of the pool.png", noise(21))
    found = check(written(tmp_path, data))
    assert not found.errors and len(found.warnings) == 2
    assert "pets (test): 1 picture is also in pretraining[0] (train)" in found.warnings[0]
    assert "pets (test): 1 picture is also in adaptation.pets (train)" in found.warnings[1]
    assert "same.bmp" in found.warnings[1]
    assert [split.copies for split in found.splits] == [0, 0, 2, 0]


def test_classes_of_one_split_only_are_warnings(tmp_path, data):
    folders(tmp_path / "pets" / "test", {"yak": [50]})
    folders(tmp_path / "pets" / "train", {"ant": [51], "bee": [52]})
    found = check(written(tmp_path, data))
    assert not found.errors
    assert found.warnings == [
        "adaptation.pets: 1 class is scored but never trained: yak",
        "adaptation.pets: 2 classes are trained but never scored: ant, bee",
    ]


def test_empty_and_endless_captions_are_warnings(tmp_path, data):
    rows = [["pets/train/cat/1.png", "word " * 3000], ["pets/train/cat/2.png", ""]]
    table(tmp_path / "shop.csv", [["filepath", "title"], *rows])
    data["pretraining"] = [{"source": "csv", "path": "shop.csv"}]
    found = check(written(tmp_path, data))
    assert not found.errors
    assert "pretraining[0] (train): 1 of 2 pictures have no caption" in found.warnings
    (long,) = (warning for warning in found.warnings if "longer" in warning)
    cut = "1 of 1 captions (100.0%) are longer than the 77 tokens that the model reads, the longest has "
    assert long.startswith(f"pretraining[0] (train): {cut}")


def test_transparent_and_turned_pictures_are_counted(tmp_path, data):
    """open_clip's preprocessing neither flattens nor turns them; an alpha channel that hides nothing is none."""
    exif = Image.Exif()
    exif[0x0112] = 6
    glass = noise(60).convert("RGBA")
    glass.putpixel((3, 3), (0, 0, 0, 254))
    for name, image, options in (
        ("a.png", glass, {}),
        ("b.png", glass.convert("LA"), {}),
        ("opaque.png", noise(61).convert("RGBA"), {}),
        ("deep.png", Image.fromarray(np.full((8, 8), 40_000, np.uint16)), {}),
        ("c.png", noise(62).convert("P", palette=Image.Palette.ADAPTIVE, colors=4), {"transparency": 1}),
        ("d.jpg", noise(63), {"exif": exif}),
    ):
        image.save(tmp_path / "pets" / "train" / "cat" / name, **options)
    turned, transparent, deep = check(written(tmp_path, data)).warnings
    assert turned.startswith("adaptation.pets (train): 1 of 12 pictures carry an EXIF orientation")
    assert transparent.startswith("adaptation.pets (train): 3 of 12 pictures are transparent")
    assert deep.startswith("adaptation.pets (train): 1 of 12 pictures have 16 or 32 bits")


def test_plot_draws_a_contact_sheet_of_each_dataset(tmp_path, data, cli):
    arguments = ["data", "check", written(tmp_path, data), "--plot", str(tmp_path / "sheets")]
    assert CliRunner().invoke(cli, arguments).exit_code == 0
    sheets = {file.name: Image.open(file).size for file in (tmp_path / "sheets").iterdir()}
    assert set(sheets) == {"pets.png", "held.png", "pretraining_0.png"}
    assert sheets["pets.png"] == (6 * 128, 176)


def test_cache_makes_everything_once(tmp_path, data, cli, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    path = written(tmp_path, data)
    for _ in range(2):
        result = CliRunner().invoke(cli, ["data", "cache", path])
        assert result.exit_code == 0, result.output
        assert len(result.stdout.splitlines()) == 4
        assert len(list((tmp_path / "cache" / "pixels").iterdir())) == 4
    folder = next((tmp_path / "cache" / "pixels").iterdir())
    content = (folder / "pixels.bin").read_bytes()
    (folder / "pixels.bin").write_bytes(content[:-1])
    (warning,) = check(path).warnings
    assert f"{folder} is not as it was written" in warning
    data["cache"] = "never"
    result = CliRunner().invoke(cli, ["data", "cache", written(tmp_path, data)])
    assert result.exit_code == 2 and "says never" in result.stderr


def test_the_side_of_a_cache_is_the_models_where_the_file_says_none(tmp_path, data, cli, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    del data["image_size"]
    result = CliRunner().invoke(cli, ["data", "cache", written(tmp_path, data), "--scale", "tiny"])
    assert result.exit_code == 0, result.output
    meta = next((tmp_path / "cache" / "pixels").glob("*/meta.json"))
    assert yaml.safe_load(meta.read_text())["size"] == 32
    file = written(tmp_path, data)
    assert as_cached(file, Model(name="ViT-L-14-336", pretrained="openai")).size == 336
    squashing = as_cached(file, Model(name="ViT-B-16-SigLIP", pretrained="webli"), 64)
    assert (squashing.size, squashing.resize_mode, list(squashing.mean)) == (64, "squash", [0.5] * 3)
    with pytest.raises(UserError, match="no such file"):
        as_cached(file, Model(pretrained="some/file.safetensors"))
