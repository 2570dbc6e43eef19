"""Malformed recipes, scales, data files, shards and pictures: one line each, and nothing left behind.

By hypothesis: 200 of each kind, with FOMO_SOAK=1 2,000. What is tested is that any exception but UserError, any
message of more than a printable line and any new file is a failure.
"""

import io
import os
import tarfile
from copy import deepcopy
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
import yaml
from conftest import SMALL_DATA, SMALL_SCALE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg
from PIL import Image

from fomo.clip import new
from fomo.datasets.cache import decode
from fomo.datasets.datafile import read
from fomo.datasets.sources.base import Source
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import UserError
from fomo.load_recipe import ROOT, load
from tests.datasets.sources.test_all_sources import Shapes, everything

many = settings(
    max_examples=2000 if os.environ.get("FOMO_SOAK") else 200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FILES = [*sorted(ROOT.glob("*.yaml")), *sorted(ROOT.glob("methods/*.yaml"))]
RECIPES = [yaml.safe_load(path.read_text()) for path in FILES]

text = st.text(max_size=8) | st.sampled_from(["", "{}", "..", "random", "a\nb", "${X}", "1e9", "\0", "é🎈"])
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 10**30, 1e308, True, False])
odd = st.sampled_from([date(2024, 2, 29), b"\xff", {1, 2}, {None: 1}, {1: 2}, [[]], [None], {}]).map(deepcopy)
values = st.recursive(
    st.none() | numbers | text | odd,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw, content):
    """One to three changes anywhere in nested content: another value, a field more, a field less."""
    content = deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        holder = content
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], (dict, list)) and draw(st.booleans()):
                holder = holder[key]
                continue
            change = draw(st.sampled_from(["set", "set", "drop", "add"]))
            if change == "set":
                holder[key] = draw(values)
            elif change == "drop":
                del holder[key]
            elif isinstance(holder, dict):
                holder[draw(text | st.integers() | st.none())] = draw(values)
            else:
                holder.append(draw(values))
            break
    return content


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refused_or_fine(call, folder: Path) -> str | None:
    """-> the one line, None if all is well; any other exception, and any new file, fails the test."""
    before = files_under(folder)
    try:
        call()
        message = None
    except UserError as error:
        message = str(error)
        assert message and message.isprintable(), repr(message)
    assert files_under(folder) == before
    return message


def write_yaml(path: Path, content) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data of every source, and the small scale."""
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "data.yaml").write_text(SMALL_DATA)
    (folder / "small.yaml").write_text(SMALL_SCALE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(torchvision.datasets, "Shapes", Shapes, raising=False)
        patch.setattr(Shapes, "__len__", lambda self: 8)
        (folder / "all.yaml").write_text(yaml.safe_dump(sources(folder)))
        yield folder


def sources(folder: Path) -> dict:
    content = everything(folder)
    content["adaptation"]["parted"] = {"source": "folder", "train": "pets/train", "holdout": 0.5}
    return content


def open_everything(path: Path) -> None:
    data = read(path)
    data.pool()
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        for split in ("train", "test"):
            entry.open(split)


@many
@given(st.sampled_from(RECIPES).flatmap(mutated))
def test_recipes(place, content):
    path = write_yaml(place / "it.yaml", content)
    message = refused_or_fine(lambda: load(path, scale=str(place / "small.yaml")), place)
    data = content.get("data")  # which `stream.every` opens, to count its periods
    files = [path, place / "small.yaml", *([place / data] if isinstance(data, str) else [])]
    assert message is None or message.startswith(tuple(f"{file}: " for file in files))


@many
@given(mutated(yaml.safe_load(SMALL_SCALE)))
def test_scales(place, content):
    path = write_yaml(place / "it.yaml", content)
    message = refused_or_fine(lambda: load(FILES[0], scale=str(path)), place)
    assert message is None or message.startswith((f"{path}: ", f"{FILES[0]}: "))


@many
@given(st.data())
def test_data_files(place, data):
    path = place / "it.yaml"
    write_yaml(path, data.draw(mutated(yaml.safe_load((place / "all.yaml").read_text()))))
    message = refused_or_fine(lambda: open_everything(path), place)
    assert message is None or message.startswith(f"{path}: ")


@many
@given(
    st.sampled_from(["optimizer", "method", "model", "stream.seed", "evaluation.every", "seed"]),
    values | text,
)
@example("seed", "2024-13-01")
@example("method", "{name: merge, rule: {}}")
@example("model", "!!int x")
def test_overrides(place, key, value):
    override = f"{key}={value}"
    call = lambda: load(None, scale=str(place / "small.yaml"), overrides=[override])  # noqa: E731
    refused_or_fine(call, place)


SIDES = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"embed_dim": "wide"},
        {"embed_dim": -5},
        {"vision_cfg": {**SIDES, "layers": -1.5}},
        {"vision_cfg": {**SIDES, "patch_size": 0}},
        {"vision_cfg": {**SIDES, "head_width": 0}},
        {"vision_cfg": None},
        {"text_cfg": {"heads": 7, "width": 16}},
        {"colour": 1},
    ],
    ids=str,
)
def test_a_config_that_is_no_clip_is_one_line(change):
    config = {"embed_dim": 16, "vision_cfg": SIDES, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
    new(config, seed=0)
    with pytest.raises(UserError, match=r"^model\.config: "):
        new({**config, **change}, seed=0)


TOKENS = ["2024-13-01", "!!int x", "!!bool x", "!!binary '?'", "!!timestamp x", "[" * 2000, "{a: " * 2000]
TOKENS += [
    "&a [*a]",
    "*b",
    "!!python/object/apply:os.abort []",
    "!!set {1, a}",
    "? [1]\n: 2",
    "\t",
    "=",
    "<<: 1",
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
ENDLESS = "method: &m {name: finetune, tune: *m}\n"


@many
@given(
    st.sampled_from(FILES),
    st.floats(0, 1),
    st.integers(0, 20),
    st.binary(max_size=8) | st.sampled_from(TOKENS).map(str.encode),
)
@example(None, 0, 0, BOMB.encode())
@example(None, 0, 0, ENDLESS.encode())
@example(None, 0, 0, b"\xff\xfe")
def test_texts_that_are_hardly_yaml(place, base, where, cut, insert):
    """A piece of a recipe replaced by bytes that YAML stumbles over; as a recipe and as a data file."""
    content = base.read_bytes() if base else b""
    at = int(where * len(content))
    (place / "it.yaml").write_bytes(content[:at] + insert + content[at + cut :])
    for call in (
        lambda: load(place / "it.yaml", scale=str(place / "small.yaml")),
        lambda: read(place / "it.yaml"),
    ):
        refused_or_fine(call, place)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Cut, with flipped bits, with a piece replaced, or random altogether."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "splice", "random"]))
    if kind == "random":
        return draw(st.binary(max_size=2000))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(content) - 1))
        if kind == "flip":
            damaged[at] ^= 1 << draw(st.integers(0, 7))
        else:
            damaged[at : at + 8] = draw(st.binary(min_size=1, max_size=16))
    return bytes(damaged)


def picture_bytes(form: str) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 16))
    image = Image.merge("RGB", (image, image.rotate(180), image)) if form != "GIF" else image
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(file, form, **({"exif": exif} if form in ("JPEG", "WEBP", "TIFF") else {}))
    return file.getvalue()


def tar_bytes() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(4):
            texts = {"txt": b"a cat", "cls": b"1", "json": b'{"captions": ["one", "two"]}'}
            for suffix, content in {"jpg": picture_bytes("JPEG"), **texts}.items():
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def read_through(source: Source) -> None:
    """Every picture is pixels or a problem on one line, and every caption is text."""
    for index in range(len(source)):
        pixels, problem = decode(source, PreprocessCfg(size=8), index)
        assert (pixels.size == 0) == bool(problem) and (problem is None or problem.isprintable())
        assert all(isinstance(caption, str) for caption in source.captions(index))
    assert source.labels.max() < max(len(source.classes), 1)


@many
@given(damaged(tar_bytes()))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_shards(place, content):
    (place / "it.tar").write_bytes(content)
    message = refused_or_fine(lambda: read_through(Webdataset(str(place / "it.tar"))), place)
    assert message is None or message.startswith(str(place / "it.tar"))


class Bytes(Source):
    """One picture, from memory."""

    classes: list[str] = []  # noqa: RUF012

    def __init__(self, content: bytes):
        self.content, self.labels = content, np.array([-1])

    def image(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.content))

    def captions(self, index: int) -> list[str]:
        return []

    def name_of(self, index: int) -> str:
        return "it"


@many
@given(st.data(), st.sampled_from(["JPEG", "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_pictures(data, form):
    read_through(Bytes(data.draw(damaged(picture_bytes(form)))))
