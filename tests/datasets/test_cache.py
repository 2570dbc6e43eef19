"""The pixel cache: pixels are what open_clip makes of a file, and a cache is whole or absent."""

import hashlib
import io
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageOps
from torchvision.transforms import Compose

from fomo.datasets.cache import Decoded, Pixels, folder_of, open_pixels, shrink
from fomo.datasets.crops import central_crops, crop, random_crops
from fomo.datasets.features import central_square
from fomo.datasets.sources.base import Part, peculiarities
from tests.datasets.inputs import Drawn, encoded, noise, one_line

ROOT = Path(__file__).parents[2]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
QUARTERS = (
    "red",
    "lime",
    "blue",
    "white",
)  # of a picture, row by row: tells every orientation from the others


def squares(count: int, name: str = "squares", **fields) -> Drawn:
    """Coloured pictures; `read` has the numbers of those that were asked for."""

    def image(index: int) -> Image.Image:
        source.read.append(index)
        return Image.new("RGB", (12 + index % 3, 10), (index, 0, 255 - index))

    source = Drawn(name, [0] * count, image, **fields)
    source.read = []
    return source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def square(size: int, mode: str = "shortest", **fields) -> PreprocessCfg:
    return PreprocessCfg(size=size, resize_mode=mode, **fields)


def quarters(width: int = 60, height: int = 40) -> Image.Image:
    image = Image.new("RGB", (width, height))
    for i, colour in enumerate(QUARTERS):
        image.paste(colour, (i % 2 * width // 2, i // 2 * height // 2, width, height))
    return image


def reread(image: Image.Image, form: str, **options) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, form, **options)))


def corners(pixels: np.ndarray) -> list[list[int]]:
    """The colours a little inside the four corners."""
    h, w = pixels.shape[:2]
    return [pixels[y, x].tolist() for y in (h // 5, -h // 5) for x in (w // 5, -w // 5)]


def assert_like(pixels: np.ndarray, expected: list, slack: int = 3):
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert np.abs(np.array(corners(pixels)) - expected).max() <= slack, corners(pixels)


RGB = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
GRAY = [[level] * 3 for level in (76, 150, 29, 255)]  # ITU-R 601 luma of the four colours


@pytest.mark.parametrize(
    ("image", "expected", "slack"),
    [
        (reread(quarters(), "PNG"), RGB, 0),
        (reread(quarters(), "JPEG", quality=95), RGB, 8),
        (reread(quarters(), "WEBP", lossless=True), RGB, 0),
        (reread(quarters().convert("L"), "PNG"), GRAY, 0),
        (reread(quarters().convert("1", dither=0), "PNG"), [[0] * 3, [255] * 3, [0] * 3, [255] * 3], 0),
        (reread(quarters().convert("P"), "PNG"), RGB, 0),
        (reread(quarters().convert("RGBA"), "PNG"), RGB, 0),
        (reread(quarters().convert("LA"), "PNG"), GRAY, 0),
        (reread(quarters().convert("CMYK"), "JPEG", quality=95), RGB, 10),
        (reread(quarters().convert("YCbCr"), "JPEG", quality=95), RGB, 8),
    ],
    ids=["png", "jpeg", "webp", "gray", "bits", "palette", "rgba", "la", "cmyk", "ycbcr"],
)
def test_pictures_of_every_mode_become_rgb_bytes_of_the_right_colours(image, expected, slack):
    pixels = shrink(image, square(20))
    assert pixels.shape == (20, 30, 3)
    assert_like(pixels, expected, slack)


def odd_pictures() -> dict[str, Image.Image]:
    """Of which readers make different pixels."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 61, 3), dtype=np.uint8))
    levels = np.linspace(0, 65535, 60 * 40).reshape(40, 60)
    glass = noise.convert("RGBA")
    glass.putalpha(Image.fromarray(rng.integers(0, 256, (40, 61), dtype=np.uint8)))
    few = noise.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    odd = {
        "alpha": reread(glass, "PNG"),
        "gray alpha": reread(glass.convert("LA"), "PNG"),
        "palette": reread(few, "PNG"),
        "palette with a hole": reread(few, "PNG", transparency=1),
        "colour for a hole": reread(noise, "PNG", transparency=(0, 0, 0)),
        "sixteen bits": reread(Image.fromarray(levels.astype(np.uint16)), "PNG"),
        "float": reread(Image.fromarray(levels.astype(np.float32)), "TIFF"),
        "bits": reread(noise.convert("1"), "PNG"),
        "cmyk": reread(noise.convert("CMYK"), "JPEG", quality=90),
        "gif": reread(few, "GIF", transparency=2),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        odd[f"orientation {orientation}"] = reread(noise, "JPEG", exif=exif)
    return odd


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("name", odd_pictures())
def test_a_picture_is_read_as_open_clip_reads_it(name, mode):
    """What lies under transparency is seen, and EXIF turns nothing."""
    for how in (square(20, mode), square(20, mode, interpolation="bilinear", fill_color=128)):
        *steps, _, _ = image_transform_v2(how, is_train=False).transforms
        expected = Compose(steps)(odd_pictures()[name])
        np.testing.assert_array_equal(central_square(shrink(odd_pictures()[name], how)), np.asarray(expected))


def test_a_picture_with_damaged_exif_data_is_still_a_picture():
    """Cameras and editors write such things; PIL can read the orientation but not write the rest again."""
    entries = [(0x0112, 3, 1, 6), (0x011A, 2, 4, 0x00616161)]  # orientation 6; resolution as text
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
    tiff += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    stored = reread(quarters(), "JPEG", exif=b"Exif\0\0" + tiff)
    with pytest.raises((TypeError, struct.error)):
        ImageOps.exif_transpose(stored.copy())
    assert list(peculiarities(stored)) == ["turned"]
    assert_like(shrink(stored, square(20)), RGB, slack=16)


@pytest.mark.parametrize(
    "shape", [(33, 33), (40, 60), (60, 40), (20, 500), (500, 20), (7, 9), (1, 300), (64, 64)]
)
def test_the_short_side_becomes_the_models_size_and_the_long_side_is_limited(shape):
    height, width = shape
    for size in (16, 33):
        pixels = shrink(Image.new("RGB", (width, height)), square(size))
        long = max(shape) * size / min(shape)
        assert min(pixels.shape[:2]) == size
        assert abs(max(pixels.shape[:2]) - min(long, 1.5 * size + 3)) <= 3
        if height != width:
            assert (pixels.shape[0] > pixels.shape[1]) == (height > width)


@pytest.mark.parametrize("size", [16, 32, 33, 34, 224])
def test_random_crops_of_a_cut_picture_are_those_of_the_whole_picture(size):
    """The claim of the module's docstring, for pictures of every width from square to a panorama."""
    for long in range(size, 3 * size, max(1, size // 24)):
        for height, width in ((size, long), (long, size)):
            kept = np.array([shrink(Image.new("RGB", (width, height)), square(size)).shape[:2]] * 100)
            whole = np.array([[height, width]] * 100)
            offset = np.concatenate([(whole - kept) // 2, np.zeros_like(kept)], 1)
            for seed in (0, 1):
                ours = random_crops(kept, np.random.default_rng(seed)) + offset
                np.testing.assert_array_equal(ours, random_crops(whole, np.random.default_rng(seed)))
            assert (offset % 2 == 0).all()  # so that halves are rounded to the same side


@pytest.mark.parametrize("width", [32, 45, 48, 50, 51, 77, 200])
def test_crops_of_a_cut_picture_show_the_same_pixels(width):
    size = 32
    whole = np.random.default_rng(width).integers(0, 256, (size, width, 3), dtype=np.uint8)
    views = [whole, shrink(Image.fromarray(whole), square(size))]
    results = []
    for view in views:
        shapes = np.array([view.shape[:2]] * 20)
        boxes = np.concatenate([random_crops(shapes, np.random.default_rng(0)), central_crops(*shapes[:1].T)])
        canvas = torch.from_numpy(np.stack([view] * len(boxes)))
        results.append(crop(canvas, torch.from_numpy(boxes), size, **PLAIN))
    torch.testing.assert_close(*results, rtol=0, atol=1e-3)


SHAPES = [
    (height, width) for height in (32, 33, 61, 64, 96, 97) for width in (7, 32, 35, 48, 64, 99, 131, 257)
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_the_test_crop_is_open_clips_bit_by_bit(mode, interpolation):
    how = square(32, mode, interpolation=interpolation, fill_color=9)
    *steps, _, _ = image_transform_v2(how, is_train=False).transforms
    for shape in SHAPES + [(width, height) for height, width in SHAPES]:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
        pixels = shrink(picture, how)
        assert mode == "shortest" or pixels.shape == (32, 32, 3)
        np.testing.assert_array_equal(central_square(pixels), np.asarray(Compose(steps)(picture)), str(shape))


def test_the_key_of_a_cache_has_what_decides_its_pixels(cache):
    """Rendered squares with the usual preprocessing keep the folder that they had before there was a choice."""
    source = squares(1)
    usual = folder_of(source, square(8))
    same = [
        square(8, mean=(0, 0, 0), std=(1, 1, 1)),
        square(8, fill_color=7),
        square(8, interpolation="random"),
    ]
    assert {folder_of(source, how) for how in same} == {usual}
    others = [square(8, "squash"), square(8, "longest"), square(8, interpolation="bilinear"), square(9)]
    others += [square(8, "longest", fill_color=7), square(8, "squash", interpolation="bilinear")]
    assert len({usual, *(folder_of(source, how) for how in others)}) == 1 + len(others)
    source.rendered = True
    key = f"3 8 pillow {PIL.__version__} {source.key()}"
    assert folder_of(source, square(8)).name == hashlib.sha256(key.encode()).hexdigest()[:20]
    part = Part(source, np.arange(1))
    assert part.rendered


def test_a_cache_is_built_once_for_each_source_and_size_and_used_again(cache):
    first, second, larger, other = squares(5), squares(5), squares(5), squares(5, "others")
    for source, size in ((first, 8), (second, 8), (larger, 16), (other, 8)):
        pixels = open_pixels(source, square(size), "squares")
        for index in range(5):
            np.testing.assert_array_equal(pixels[index], shrink(squares(5).image(index), square(size)))
    assert [len(source.read) for source in (first, second, larger, other)] == [5, 0, 5, 5]
    assert len(list((cache / "pixels").iterdir())) == 3


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), MemoryError(), RuntimeError()])
def test_an_interrupted_build_leaves_nothing_behind(stop, cache):
    def interrupt(index: int):
        raise stop

    with pytest.raises(type(stop)):
        open_pixels(Drawn("squares", [0] * 5, interrupt), square(8), "squares")
    assert list((cache / "pixels").iterdir()) == []
    whole = open_pixels(squares(5), square(8), "squares")
    assert len(whole.shapes) == 5 and whole.shapes.all()


def test_a_build_that_was_killed_is_not_taken_for_whole(cache):
    code = (
        "import os, numpy\n"
        "from PIL import Image\n"
        "from fomo.datasets.cache import PreprocessCfg, Source, open_pixels\n"
        "class Killed(Source):\n"
        "    labels = numpy.zeros(5, int)\n"
        "    def image(self, index):\n"
        "        return Image.new('RGB', (10, 10)) if index < 3 else os.kill(os.getpid(), 9)\n"
        "    def key(self):\n"
        f"        return {squares(5).key()!r}\n"
        "open_pixels(Killed(), PreprocessCfg(size=8), 'squares')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert [path.suffix for path in (cache / "pixels").iterdir()] == [".part"]  # what it had begun
    open_pixels(squares(3, "others"), square(8), "others")
    assert [path.suffix for path in (cache / "pixels").iterdir()] == [""]  # whoever builds next tidies up
    source = squares(5)
    whole = open_pixels(source, square(8), "squares")
    assert source.read == [0, 1, 2, 3, 4]
    assert len(whole.shapes) == 5 and whole.shapes.all()


def test_a_few_broken_pictures_are_named_and_skipped_in_every_run(capsys):
    for source in (squares(200, broken=(7, 30)), squares(200, broken=(7, 30))):
        pixels = open_pixels(source, square(8), "squares (test)")
        assert np.flatnonzero(pixels.shapes[:, 0] == 0).tolist() == [7, 30]
        np.testing.assert_array_equal(
            pixels[31], shrink(source.image(31), square(8))
        )  # the others keep their places
        out, err = capsys.readouterr()
        assert out == ""  # which belongs to --json
        assert "squares (test): 2 of 200 pictures cannot be read, first: squares 7" in err


def test_more_broken_pictures_than_the_limit_are_an_error_and_no_cache_is_left(cache):
    message = one_line(open_pixels, squares(200, broken=(7, 30, 199)), square(8), "squares")
    assert "squares: 3 of 200 pictures" in message
    assert "first: squares 7: " in message and "limit of 1%" in message
    assert list((cache / "pixels").iterdir()) == []


def test_the_refusal_names_a_few_counts_all_and_says_how_to_go_on(cache):
    source = squares(40, broken=(3, 7, 11, 20, 39))
    source.data_file = Path("my/data.yaml")
    message = one_line(open_pixels, source, square(8), "squares")
    named = "; ".join(f"squares {n}: truncated" for n in (3, 7, 11))
    assert f"squares: 5 of 40 pictures cannot be read, first: {named}; and 2 more" in message
    assert "`data check my/data.yaml --bad LIST.txt` lists all" in message and "--skip-bad" in message


def test_pictures_that_are_to_be_skipped_have_no_limit_but_one_must_be_readable(cache, capsys):
    for form in ("always", "never"):
        source = squares(40, form, broken=tuple(range(1, 40)), cache=form)
        source.skip_bad = True
        pixels = open_pixels(Part(source, np.arange(40)), square(8), "squares")
        assert [n for n in range(40) if pixels[n].size] == [0]
        assert np.flatnonzero(pixels.shapes[:, 0]).tolist() == [0]
    assert "39 of 40 pictures cannot be read, first: always 1: truncated; " in capsys.readouterr().err
    nothing = squares(40, "nothing", broken=tuple(range(40)))
    nothing.skip_bad = True
    assert "40 of 40 pictures cannot be read" in one_line(open_pixels, nothing, square(8), "squares")


def test_a_cache_that_was_made_without_a_limit_does_not_lift_it_elsewhere(cache):
    source = squares(40, broken=(3,))
    source.skip_bad = True
    open_pixels(source, square(8), "squares")
    assert "limit of 1%" in one_line(open_pixels, squares(40, broken=(3,)), square(8), "squares")


def shapes(count: int, broken: tuple = (), **fields) -> Drawn:
    """Noise of several shapes."""
    return Drawn("noise", [0] * count, lambda i: noise(i, 9 + i % 5, 9 + i % 3), broken=broken, **fields)


def test_processes_write_the_same_bytes_as_one(monkeypatch):
    source = shapes(700, broken=(300, 699))
    alone = open_pixels(source, square(8), "noise")
    written = {file.name: file.read_bytes() for file in alone.folder.iterdir()}
    monkeypatch.setattr("fomo.datasets.arrays.PARALLEL", 1)
    monkeypatch.setattr("fomo.datasets.arrays.cores", lambda: 2)
    os.rename(alone.folder, alone.folder.with_name("elsewhere"))
    state = torch.get_rng_state()
    together = open_pixels(source, square(8), "noise")
    assert torch.equal(torch.get_rng_state(), state)  # a run must not depend on whether it built a cache
    assert {file.name: file.read_bytes() for file in together.folder.iterdir()} == written


def test_pictures_decoded_when_drawn_are_those_of_the_cache(capsys):
    source = shapes(200, broken=(7, 30))
    cached = open_pixels(source, square(8), "noise")
    source.cache = "never"
    capsys.readouterr()
    decoded = open_pixels(source, square(8), "noise")
    assert isinstance(cached, Pixels) and isinstance(decoded, Decoded)
    for index in range(200):
        np.testing.assert_array_equal(cached[index], decoded[index])
    assert decoded[7].size == cached[7].size == 0
    err = capsys.readouterr().err
    assert err.count("noise 7: truncated") == err.count("noise 30: truncated") == 1
    np.testing.assert_array_equal(decoded.shapes, cached.shapes)
    assert not (cached.folder.parent.parent / "shapes" / cached.folder.name / "pixels.bin").exists()


def test_too_many_broken_pictures_are_an_error_without_a_cache_too():
    pixels = open_pixels(shapes(1000, broken=tuple(range(0, 1000, 20)), cache="never"), square(8), "noise")
    message = one_line(lambda: [pixels[index] for index in range(1000)])
    assert "pictures cannot be read among" in message and "limit of 1%" in message
    assert "limit of 1%" in one_line(lambda: pixels.shapes)


def test_auto_caches_up_to_its_limit_and_always_beyond(cache, monkeypatch, capsys):
    monkeypatch.setattr("fomo.datasets.cache.AUTO_LIMIT", 8 * 8 * 3 * 100)
    assert isinstance(open_pixels(squares(50), square(8), "small"), Pixels)
    assert isinstance(open_pixels(squares(60, "others"), square(8), "others"), Decoded)
    assert "others: with its 0.0 GB the pixel caches would pass" in capsys.readouterr().err
    source = squares(60, "others")
    source.cache = "always"
    assert isinstance(open_pixels(source, square(8), "others"), Pixels)
    assert isinstance(
        open_pixels(squares(60, "others"), square(8), "others"), Pixels
    )  # what is there is used


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in ("pixels.bin", "shapes.bin", "meta.json")
        for damage in ("cut", "gone", "other")
    ],
)
def test_a_cache_that_is_not_as_it_was_written_is_noticed_and_made_again(name, damage, capsys):
    pixels = open_pixels(squares(5), square(8), "squares")
    file, expected = pixels.folder / name, pixels[3].copy()
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:  # or that of another source
        other = open_pixels(squares(6, "others"), square(8), "others").folder / name
        file.write_bytes(whole[:-1] if damage == "cut" else other.read_bytes())
    capsys.readouterr()
    again = open_pixels(squares(5), square(8), "squares")
    assert f"squares: its cache {pixels.folder}" in capsys.readouterr().err
    np.testing.assert_array_equal(again[3], expected)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_one_clear_mistake(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "file"))
    message = one_line(open_pixels, squares(5), square(8), "squares")
    assert "file: the cache cannot be written: " in message and "set FOMO_CACHE" in message


def test_two_builders_of_one_cache_take_turns(cache):
    """Two threads here; the lock is on an open file, so it keeps processes apart as well."""
    sources = [squares(400), squares(400)]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda source: open_pixels(source, square(8), "squares"), sources))
    assert sorted(len(source.read) for source in sources) == [0, 400]
    assert made[0].folder == made[1].folder and list((cache / "pixels").iterdir()) == [made[0].folder]
