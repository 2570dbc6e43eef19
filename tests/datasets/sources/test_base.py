"""What all sources share: which files are pictures, and what is held out for testing."""

import numpy as np
import pytest
from PIL import Image, features

from fomo.datasets.sources import base
from fomo.datasets.sources.base import HELD_OUT, IMAGE_SUFFIXES, SUFFIXES, holdout_mask, readable
from tests.datasets.inputs import Drawn, noise


def test_a_suffix_is_a_pictures_if_this_pillow_opens_it(tmp_path):
    for suffix in IMAGE_SUFFIXES:
        noise(0).save(tmp_path / f"a.{suffix}")
        with Image.open(tmp_path / f"a.{suffix}") as picture:
            assert picture.convert("RGB").size == noise(0).size
    assert {"jpg", "jpeg", "png", "gif", "bmp", "tif", "tiff", "jfif"} <= set(IMAGE_SUFFIXES)
    for suffix, feature in (("webp", "webp"), ("avif", "avif"), ("jp2", "jpg_2000")):
        assert (suffix in IMAGE_SUFFIXES) == bool(features.check(feature))


def test_what_this_pillow_was_built_without_is_no_picture(monkeypatch):
    forms = {end: form for end, form in Image.registered_extensions().items() if form not in ("AVIF", "WEBP")}
    monkeypatch.setattr(base.Image, "registered_extensions", lambda: forms)
    monkeypatch.setattr(base.features, "check", lambda name: False)
    assert set(SUFFIXES) - set(readable(SUFFIXES)) == {"webp", "avif", "jp2", "j2k", "jpx"}


def test_documents_films_and_measurements_are_no_pictures():
    others = {"pdf", "eps", "ps", "mpg", "mpeg", "h5", "hdf", "grib", "psd", "fits", "svg", "pfm", "ico"}
    assert not others & set(IMAGE_SUFFIXES)


def held(count: int, share: float = 0.1, labels: int = -1) -> set[str]:
    source = Drawn("photo", np.full(count, labels), classes=("a",) * (labels >= 0))
    return {source.id_of(i) for i in np.flatnonzero(holdout_mask(source, share))}


@pytest.mark.parametrize("count", [2, 3, 15, 50, 150, 300, 500, 2000])
def test_of_captions_enough_are_held_out_to_test_on(count):
    """Binomial, within four standard deviations of the larger of the share and 50, of a third at most."""
    expected = max(0.1 * count, min(HELD_OUT, count / 3))
    assert abs(len(held(count)) - expected) <= 4 * expected**0.5
    assert 1 <= len(held(count)) < count
    assert len(held(count, labels=0)) <= len(held(count))


def test_a_share_that_is_larger_stays():
    assert abs(len(held(400, share=0.5)) - 200) < 40


@pytest.mark.parametrize("fewer", [20, 100, 200, 400])
def test_of_captions_that_are_added_none_takes_a_picture_from_training_to_testing(fewer):
    for more in (fewer + 1, 2 * fewer, 10 * fewer):
        known = {f"photo {i}" for i in range(fewer)}
        assert held(more) & known <= held(fewer)
        if more <= 150:
            assert held(more) & known == held(fewer)


class Stored(Drawn):
    """Pictures as bytes, some of them copies."""

    def __init__(self, contents: list[bytes], labels: np.ndarray):
        super().__init__("photo", labels, classes=tuple("abcde"))
        self.contents = contents

    def byte_sizes(self):
        return np.array([len(content) for content in self.contents])

    def encoded(self, index):
        return self.contents[index]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("purpose", ["test", "validation"])
def test_copies_of_a_picture_are_on_one_side(seed, purpose):
    """Within a class, and across classes."""
    rng = np.random.default_rng(seed)
    contents = [bytes([n % 256]) * (1 + n % 7) for n in rng.integers(0, 60, 80).tolist()]
    mask = holdout_mask(Stored(contents, rng.integers(0, 3, 80)), 0.3, purpose)
    assert mask.any() and not mask.all()
    taken, left = ({contents[i] for i in np.flatnonzero(side)} for side in (mask, ~mask))
    assert not taken & left


def test_validation_is_drawn_apart_from_testing_and_leaves_small_classes_alone():
    source = Drawn("photo", np.repeat(np.arange(500), 4), classes=tuple(map(str, range(500))))
    test, validation = (holdout_mask(source, 0.1, purpose) for purpose in ("test", "validation"))
    assert test.reshape(500, 4).sum(1).min() == 1  # one of each class is tested
    assert abs(validation.mean() - 0.1) < 0.03 and validation.reshape(500, 4).any(1).mean() < 0.6
    assert abs((test & validation).sum() - test.sum() * validation.mean()) < 60
