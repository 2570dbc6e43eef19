"""Evaluation: scores of models whose scores are known, recall by brute force, subsets that never shrink."""

import hashlib
import itertools
import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fomo import clip as fomo_clip
from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.crops import central_crops, crop
from fomo.datasets.eval_sets import TestSet, open_tests, subset
from fomo.datasets.features import central_images, image_features, text_features
from fomo.datasets.samples import Collection, Samples, canvas_of
from fomo.datasets.sources.base import Source
from fomo.errors import UserError
from fomo.eval.zero_shot import (
    Score,
    Scores,
    accuracy,
    class_features,
    drift,
    drift_features,
    drift_sample,
    evaluate,
    recall,
    recall_error,
    score_test,
    summarise,
)

TestSet.__test__ = False  # a data class, not tests
CPU = torch.device("cpu")
COLOURS = [tuple(255 * bit for bit in bits) for bits in itertools.product((0, 1), repeat=3)]  # 8 classes
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def nothing(n: int) -> None:
    """A progress bar that nobody looks at."""


class Pictures(Source):
    """Pictures in memory, by array; the key is made from their bytes."""

    def __init__(self, arrays, labels=None, classes=(), captions=None, prompts=("a {}.",)):
        self.arrays = [np.asarray(array, np.uint8) for array in arrays]
        self.labels = np.full(len(arrays), -1) if labels is None else np.array(labels)
        self.classes, self.texts, self.prompts = list(classes), captions, prompts

    def image(self, index: int) -> Image.Image:
        if not self.arrays[index].size:
            raise OSError("empty")
        return Image.fromarray(self.arrays[index])

    def captions(self, index: int) -> list[str]:
        return self.texts[index] if self.texts else []

    def name_of(self, index: int) -> str:
        return f"picture {index}"

    def key(self) -> str:
        shapes = str([array.shape for array in self.arrays]).encode()
        return hashlib.sha256(shapes + b"".join(array.tobytes() for array in self.arrays)).hexdigest()


def noise(count: int, seed: int, side: int = 16) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


class Seeing(nn.Module):
    """Sees the mean colour of a picture and knows what colour each class number has."""

    def __init__(self):
        super().__init__()
        self.visual = SimpleNamespace(image_size=4)
        self.register_buffer("colours", torch.tensor(COLOURS) / 255 - 0.5)

    def encode_image(self, images):
        return images.mean((2, 3)) - 0.5

    def encode_text(self, tokens):
        return self.colours[tokens[:, 0]]


class Guessing(Seeing):
    """Features that have nothing to do with the picture or the text."""

    def encode_image(self, images):
        return torch.randn(len(images), 16)

    def encode_text(self, tokens):
        return torch.randn(len(tokens), 16, generator=torch.Generator().manual_seed(1))


class Stuck(Seeing):
    """One answer to everything."""

    def encode_image(self, images):
        return torch.ones(len(images), 3)

    def encode_text(self, tokens):
        return torch.ones(len(tokens), 3) * (1 + (tokens == 5).float())  # normalised away


def stub(model: nn.Module) -> Clip:
    def tokenizer(texts):
        return torch.tensor([[int(re.search(r"\d+", text).group())] for text in texts])

    return Clip(
        model,
        {"preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}, "model_cfg": {"embed_dim": 3}},
        tokenizer,
    )


def coloured(clip: Clip, labels: list[int], name: str = "colours", role: str = "adaptation") -> TestSet:
    arrays = [np.full((4, 4, 3), COLOURS[label]) for label in labels]
    source = Pictures(arrays, labels, [f"colour {i}" for i in range(8)])
    prompts = [clip.tokenize([f"a {i}." for i in range(8)])]
    samples = Samples(source, clip, 4, name)
    return TestSet(name, role, "classification", samples, np.arange(len(labels)), prompts)


@pytest.fixture(scope="module")
def tiny() -> Clip:
    clip = fomo_clip.new(CONFIG, seed=0)
    clip.model.eval()
    return clip


def as_test(clip: Clip, source: Source, name: str, task: str, role: str = "evaluation") -> TestSet:
    samples = Samples(source, clip, clip.image_size, name)
    names = [[p.replace("{}", c) for c in source.classes] for p in source.prompts]
    prompts = [clip.tokenize(texts) for texts in names] if task == "classification" else []
    return TestSet(name, role, task, samples, np.arange(len(source)), prompts)


# Classification


def scores_of(model: nn.Module, labels: list[int], called: dict[int, int] | None = None) -> Score:
    """On pictures of these colours; `called`: labels that some have instead."""
    clip = stub(model)
    test = coloured(clip, labels)
    for index, label in (called or {}).items():
        test.samples.labels[index] = label
    (score,) = score_test(clip, test, [test.usable], CPU, nothing)
    return score


def test_a_perfect_model_scores_100_percent():
    perfect = {"top5": 100.0, "mean_per_class_recall": 100.0}
    score = scores_of(Seeing(), [i % 8 for i in range(100)])
    assert score == Score("accuracy", 100.0, 100, 0.0, perfect, [100.0] * 8)


def test_a_model_that_sees_scores_what_it_sees():
    """20 of 80 pictures are labelled as another colour."""
    score = scores_of(Seeing(), [i % 8 for i in range(80)], {i: (i + 1) % 8 for i in range(20)})
    assert score.score == 75
    assert score.stderr == pytest.approx(100 * math.sqrt(0.75 * 0.25 / 80))


def test_a_model_that_guesses_scores_chance():
    torch.manual_seed(0)
    score = scores_of(Guessing(), [i % 8 for i in range(2400)])
    assert abs(score.score - 100 / 8) < 3 * score.stderr
    assert score.stderr == pytest.approx(100 * math.sqrt(1 / 8 * 7 / 8 / 2400), rel=0.1)
    assert abs(score.details["top5"] - 500 / 8) < 3 * 100 * math.sqrt(5 / 8 * 3 / 8 / 2400)
    assert score.details["mean_per_class_recall"] == pytest.approx(score.score)  # 300 pictures of each
    assert all(abs(value - 100 / 8) < 4 * 100 * math.sqrt(1 / 8 * 7 / 8 / 300) for value in score.by_class)


def test_a_model_that_is_stuck_scores_one_class():
    assert scores_of(Stuck(), [0] * 30 + [1] * 10 + [7] * 60).score == 30


def test_accuracy_is_over_all_classes_even_those_without_a_picture():
    images = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0]]), dim=-1)
    classes = torch.tensor([[1.0, 0.0], [0.995, 0.0999]])
    assert accuracy(images, classes[:1], torch.tensor([0, 0])).score == 100
    assert accuracy(images, classes, torch.tensor([0, 0])).score == 50


@pytest.mark.parametrize("count", [3, 5, 6, 40])
def test_top_5_is_what_counting_gives_however_many_are_compared_at_a_time(count, monkeypatch):
    generator = torch.Generator().manual_seed(count)
    images, classes = (torch.randn(n, 8, generator=generator) for n in (70, count))
    labels = torch.randint(count, (70,), generator=generator)
    found = 0
    for image, label in zip(images, labels.tolist(), strict=True):
        found += label in sorted(range(count), key=lambda c: -float(image @ classes[c]))[:5]
    at_once = accuracy(images, classes, labels)
    assert at_once.details["top5"] == pytest.approx(100 * found / 70)
    monkeypatch.setattr("fomo.eval.zero_shot.COMPARED", 16)
    assert accuracy(images, classes, labels) == at_once


def test_recall_by_class_on_an_unbalanced_set():
    """6 pictures of class 0 of which 3 are right, 1 of class 1 that is not, 2 of class 3 that are; none of 2."""
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 3, 3])
    predicted = torch.tensor([0, 0, 0, 1, 2, 3, 0, 3, 3])
    score = accuracy(torch.eye(4)[predicted], torch.eye(4), labels)
    assert score.by_class == [50, 0, None, 100]
    assert score.details["mean_per_class_recall"] == 50
    assert score.score == pytest.approx(100 * 5 / 9)


# Retrieval


def brute_force_recall(images, texts, owner, k) -> tuple[float, float]:
    """T2I and I2T, percent; counted one text and one picture at a time."""
    t2i = i2t = 0
    for text, own in zip(texts, owner, strict=True):
        ranked = sorted(range(len(images)), key=lambda i: -float(text @ images[i]))
        t2i += own in ranked[:k]
    for number, image in enumerate(images):
        ranked = sorted(range(len(texts)), key=lambda t: -float(image @ texts[t]))
        i2t += any(owner[t] == number for t in ranked[:k])
    return 100 * t2i / len(texts), 100 * i2t / len(images)


def assert_recalls(score: Score, images, texts, owner) -> None:
    assert set(score.details) == {f"{way}@{k}" for way in ("t2i", "i2t", "recall") for k in (1, 5, 10)}
    for k in (1, 5, 10):
        t2i, i2t = brute_force_recall(images, texts, owner.tolist(), k)
        found = [score.details[f"{way}@{k}"] for way in ("t2i", "i2t", "recall")]
        assert found == pytest.approx([t2i, i2t, (t2i + i2t) / 2])
    assert (score.metric, score.score) == ("recall@5", score.details["recall@5"])
    assert (score.n, score.by_class) == (len(images), [score.score])


@pytest.mark.parametrize("count", [3, 7, 30])  # fewer than 5, than 10, more
@pytest.mark.parametrize("closeness", [0.0, 0.4, 3.0])
def test_recall_is_what_counting_gives_with_several_captions_per_picture(count, closeness):
    rng = np.random.default_rng(count)
    owner = np.repeat(np.arange(count), rng.integers(1, 6, count))
    images = F.normalize(torch.from_numpy(rng.normal(size=(count, 8))), dim=-1)
    texts = F.normalize(
        closeness * images[owner] + torch.from_numpy(rng.normal(size=(len(owner), 8))), dim=-1
    )
    owner = torch.from_numpy(owner)
    assert_recalls(recall(images, texts, owner), images, texts, owner)


def test_a_perfect_model_retrieves_everything_it_can_tell_apart():
    clip = stub(Seeing())
    captions = [[f"caption {i}", f"another {i}"] for i in range(8)]
    source = Pictures([np.full((4, 4, 3), colour) for colour in COLOURS], captions=captions)
    test = TestSet("r", "evaluation", "retrieval", Samples(source, clip, 4, "r"), np.arange(8), [])
    (score,) = score_test(clip, test, [test.usable], CPU, nothing)
    assert set(score.details.values()) == {100}
    assert (score.score, score.stderr, score.by_class) == (100, 0, [100])


def drawn_hits(rng, n: int) -> tuple:
    """Of pictures of which some are easy, in both directions, and have more captions: t2i, i2t, owner."""
    easy = rng.random(n) < 0.5
    captions = np.where(easy, rng.integers(1, 8, n), 1)
    owner = np.repeat(np.arange(n), captions)
    t2i = rng.random(len(owner)) < np.where(easy, 0.9, 0.2)[owner]
    i2t = rng.random(n) < np.where(easy, 0.95, 0.3)
    return tuple(torch.from_numpy(a) for a in (t2i, i2t, owner))


def test_the_standard_error_of_recall_is_the_spread_over_draws_of_pictures_with_their_captions():
    rng = np.random.default_rng(0)
    draws = [drawn_hits(rng, 100) for _ in range(2000)]
    scores = [50 * (t2i.double().mean() + i2t.double().mean()).item() for t2i, i2t, _ in draws]
    claimed = np.mean([recall_error(*draw) for draw in draws])
    assert claimed == pytest.approx(np.std(scores), rel=0.04)
    t2i, i2t, _ = draws[0]
    alone = [p * (1 - p) / len(hits) for hits in (t2i, i2t) for p in [hits.double().mean().item()]]
    assert claimed > 1.2 * 50 * math.sqrt(sum(alone))  # what it were if all draws were independent


def test_the_standard_error_of_recall_with_one_caption_each():
    """Hits that agree in both directions: the binomial one. 3 of 12."""
    hits = torch.tensor([True] * 3 + [False] * 9)
    error = recall_error(hits, hits, torch.arange(12))
    assert error == pytest.approx(100 * math.sqrt(0.25 * 0.75 / 12))


def features_of(clip: Clip, source: Pictures, numbers) -> tuple:
    """(images, texts, owner) of some pictures, one at a time by open_clip's own methods."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.mean, clip.std))
    images, texts, owner = [], [], []
    with torch.no_grad():
        for place, number in enumerate(numbers):
            pixels = torch.from_numpy(source.arrays[number]).permute(2, 0, 1) / 255
            images.append(clip.model.encode_image((pixels - mean)[None] / std)[0])
            for text in source.texts[number]:
                texts.append(clip.model.encode_text(clip.tokenizer([text]))[0])
                owner.append(place)
    images, texts = (F.normalize(torch.stack(rows), dim=-1) for rows in (images, texts))
    return images, texts, torch.tensor(owner)


@pytest.fixture(scope="module")
def captioned() -> Pictures:
    """30 pictures with one to three captions of different length."""
    captions = [[f"number {i} is {'very ' * j}odd" for j in range(1 + i % 3)] for i in range(30)]
    return Pictures(noise(30, seed=1), captions=captions)


def test_pictures_and_captions_of_a_retrieval_subset_are_cut_together(tiny, captioned):
    test = as_test(tiny, captioned, "captioned", "retrieval")
    part = np.array([1, 4, 5, 11, 17, 20, 21, 28])
    full, cut = score_test(tiny, test, [test.usable, part], CPU, nothing)
    for score, numbers in ((full, test.usable), (cut, part)):
        images, texts, owner = features_of(tiny, captioned, numbers)
        assert len(texts) > len(images)
        assert_recalls(score, images, texts, owner)
        assert score.stderr == pytest.approx(recall(images, texts, owner).stderr)
    assert cut.stderr > full.stderr > 0


def test_full_and_subset_scores_of_one_pass_are_those_of_two_passes(tiny, captioned):
    classes = [f"class {i}" for i in range(5)]
    labelled = Pictures(noise(90, seed=2), [i % 5 for i in range(90)], classes)
    tests = [
        as_test(tiny, captioned, "captioned", "retrieval"),
        as_test(tiny, labelled, "labelled", "classification", "adaptation"),
    ]
    parts = {"captioned": np.arange(3, 30, 4), "labelled": np.arange(0, 90, 7)}
    on_subset, on_full = evaluate(tiny, tests, parts, CPU, full=True)
    alone, none = evaluate(tiny, tests, parts, CPU)
    whole, _ = evaluate(tiny, tests, {test.name: test.usable for test in tests}, CPU)
    assert none is None
    assert on_subset == alone
    assert on_full == whole
    assert [on_full.datasets[name].n for name in parts] == [30, 90]
    assert [on_subset.datasets[name].n for name in parts] == [7, 13]


def test_there_is_no_second_set_of_scores_where_the_subsets_are_everything(tiny, captioned):
    test, seen = as_test(tiny, captioned, "captioned", "retrieval"), []
    scores, full = evaluate(tiny, [test], {"captioned": test.usable}, CPU, full=True, tick=seen.append)
    assert full is None and scores.datasets["captioned"].n == sum(seen) == 30


# Features


def test_text_features_are_those_of_encode_text_one_by_one_in_the_order_given(tiny, monkeypatch):
    rng = np.random.default_rng(0)
    words = ["a", "photo", "of", "red", "big", "small", "cat", "dog", "house", "tree", "seven", "eight"]
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) for _ in range(60)]
    with torch.no_grad():
        alone = [tiny.model.encode_text(tiny.tokenizer([text]))[0] for text in texts]
    alone = F.normalize(torch.stack(alone), dim=-1)
    for order, together in ((range(60), 256), (rng.permutation(60).tolist(), 8)):
        monkeypatch.setattr("fomo.datasets.features.TEXTS", together)
        features = text_features(tiny, tiny.tokenize([texts[i] for i in order]), CPU)
        torch.testing.assert_close(features, alone[list(order)], rtol=0, atol=2e-6)


def test_class_features_are_the_normalised_mean_over_templates(tiny):
    names, templates = ["cat", "dog", "a very long name"], ["a photo of a {}.", "{}", "the big {} over there"]
    prompts = [tiny.tokenize([t.replace("{}", n) for n in names]) for t in templates]
    with torch.no_grad():
        for row, name in zip(class_features(tiny, prompts, CPU), names, strict=True):
            tokens = tiny.tokenizer([t.replace("{}", name) for t in templates])
            mean = F.normalize(tiny.model.encode_text(tokens), dim=-1).mean(0)
            torch.testing.assert_close(row, mean / mean.norm(), rtol=0, atol=2e-6)


def test_image_features_are_those_of_the_papers_test_pipeline(tiny):
    """open_clip's own inference transform: resize, central crop, normalise."""
    rng = np.random.default_rng(0)
    shapes = [(16, 16), (16, 20), (24, 16), (16, 40), (16, 90)]
    arrays = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    source = Pictures(arrays)
    transform = open_clip.image_transform(16, is_train=False, mean=tiny.mean, std=tiny.std)
    features = image_features(tiny, Samples(source, tiny, 16, "shapes"), np.arange(5), CPU, nothing)
    with torch.no_grad():
        alone = tiny.model.encode_image(torch.stack([transform(source.image(i)) for i in range(5)]))
    torch.testing.assert_close(features, F.normalize(alone, dim=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sides", [(16, 16), (16, 24), (20, 24)])
def test_pictures_of_the_models_size_are_cut_and_others_resized_as_training_crops_are(tiny, sides):
    pictures = [np.random.default_rng(i).integers(0, 256, (*sides[:: 1 - 2 * (i % 2)], 3)) for i in range(6)]
    canvas, shapes = canvas_of(pictures)
    boxes = torch.from_numpy(central_crops(shapes[:, 0].astype(float), shapes[:, 1].astype(float)))
    expected = crop(canvas, boxes, 16, tiny.mean, tiny.std)
    torch.testing.assert_close(central_images(tiny, pictures, CPU), expected, rtol=0, atol=1e-5)


# Drift


@pytest.fixture(scope="module")
def pool(tiny) -> Collection:
    """130 pictures from three sources; those at 3 and 45 cannot be read."""
    arrays = [noise(count, seed=count) for count in (40, 60, 30)]
    arrays[0][3] = arrays[1][5] = np.zeros((0, 0, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fomo.datasets.cache.LIMIT", 0.1)
        return Collection([Samples(Pictures(a, captions=[["x"]] * len(a)), tiny, 16, "pool") for a in arrays])


def test_drift_is_the_mean_cosine():
    original = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
    now = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.8, 0.6]])
    assert drift(original, now) == pytest.approx((1 + 0 - 1 + 0.96) / 4)


def test_the_pictures_of_drift_are_decided_by_the_seed_and_can_be_read(pool):
    everything = drift_sample(pool, seed=0)
    assert everything.tolist() == [i for i in range(130) if i not in (3, 45)]
    some = drift_sample(pool, seed=0, n=50)
    assert 48 <= len(some) <= 50 and (np.diff(some) > 0).all() and some[-1] > 100 and some[0] < 30
    np.testing.assert_array_equal(some, drift_sample(pool, seed=0, n=50))
    assert set(some) != set(drift_sample(pool, seed=1, n=50))
    assert len(drift_sample(Collection([]), seed=0)) == 0


def test_drift_features_are_those_of_the_numbers_in_each_part(tiny, pool):
    numbers = np.array([0, 39, 40, 99, 100, 129])
    features = drift_features(tiny, pool, numbers, CPU)
    for row, (part, index) in zip(features, [(0, 0), (0, 39), (1, 0), (1, 59), (2, 0), (2, 29)], strict=True):
        alone = image_features(tiny, pool.parts[part], np.array([index]), CPU, nothing)
        torch.testing.assert_close(row[None], alone, rtol=0, atol=1e-6)


# Subsets


def labelled_test(labels: np.ndarray, usable: np.ndarray | None = None, name: str = "set") -> TestSet:
    usable = np.arange(len(labels)) if usable is None else usable
    return TestSet(name, "adaptation", "classification", SimpleNamespace(labels=labels), usable, [])


@pytest.mark.parametrize(
    ("classes", "each", "share", "wanted"),
    [
        (211, 100, 0.1, 2110),
        (10, 50, 0.1, 300),  # at least 300
        (211, 10, 0.1, 422),  # at least 2 per class: the 422 of Country211 in the released results
        (10, 20, 0.1, 200),  # but not more than there are
        (100, 100, 0.1, 1000),
        (10, 500, 1.0, 5000),
    ],
)
def test_a_subset_has_the_papers_size_and_the_same_number_of_every_class(classes, each, share, wanted):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))
    chosen = subset(labelled_test(labels), share, seed=0)
    assert len(chosen) == len(set(chosen)) == wanted
    assert (np.diff(chosen) > 0).all()
    counts = np.bincount(labels[chosen], minlength=classes)
    assert counts.min() >= wanted // classes
    assert counts.max() <= wanted // classes + 30  # the rest is drawn at random


def test_rare_classes_are_in_the_subset_completely():
    labels = np.array([0] * 3000 + [1] * 1000 + [2] * 40 + [3])
    counts = np.bincount(labels[subset(labelled_test(labels), 0.1, seed=0)])
    assert counts.sum() == round(0.1 * 4041)
    assert counts[3] == 1 and counts[2] == 40
    assert counts[0] >= 101 and counts[1] >= 101


def test_a_subset_is_decided_by_seed_and_dataset_and_never_shrinks():
    labels, usable = np.repeat(np.arange(10), 200), np.arange(1, 2000, 2)
    test = labelled_test(labels, usable)
    first = subset(test, 0.4, seed=0)
    for _ in range(3):
        np.testing.assert_array_equal(subset(test, 0.4, seed=0), first)
    assert len(first) == 400 and len(test.usable) == 1000 and set(first) <= set(usable)
    assert set(subset(test, 0.4, seed=1)) != set(first)
    assert set(subset(labelled_test(labels, usable, "other"), 0.4, seed=0)) != set(first)


def test_a_retrieval_subset_is_drawn_from_all_pictures():
    test = labelled_test(np.full(5000, -1))
    chosen = subset(test, 0.1, seed=0)
    assert len(chosen) == len(set(chosen)) == 500
    assert 2200 < chosen.mean() < 2800


# KA, ZS, GM


def scored(values: dict[str, float], role: str) -> tuple[list[TestSet], dict[str, Score]]:
    tests = [TestSet(name, role, "classification", None, np.arange(3), []) for name in values]
    return tests, {name: Score("accuracy", value, 3, 1.5) for name, value in values.items()}


def test_ka_and_zs_are_means_over_datasets_and_gm_their_geometric_mean():
    tests, scores = scored({"a": 10.0, "b": 30.0, "c": 35.0}, "adaptation")
    held_out, more = scored({"d": 60.0, "e": 68.0}, "evaluation")
    result = summarise(tests + held_out, scores | more)
    assert (result.ka, result.zs, result.gm) == (25, 64, 40)
    assert result.datasets == scores | more


def test_a_score_without_sets_is_none_rather_than_zero():
    tests, scores = scored({"a": 10.0}, "adaptation")
    expected = Scores(10, None, None, {"ka": None, "zs": None}, scores, ["KA: accuracy on a"])
    assert summarise(tests, scores) == expected
    tests, scores = scored({"a": 10.0}, "evaluation")
    assert summarise(tests, scores) == replace(
        expected, ka=None, zs=10, datasets=scores, announced=["ZS: accuracy on a"]
    )


def test_means_over_concepts_weigh_every_class_alike_and_a_retrieval_set_as_one(tiny, captioned):
    """80 classes at 25 and 1 at 90 on the one side, 3 classes of which one has no picture on the other."""
    tests, scores = scored({"a": 25.0, "r": 90.0}, "adaptation")
    held_out, more = scored({"b": 50.0}, "evaluation")
    scores["a"].by_class.extend([20.0, 30.0] * 40)
    scores["r"].by_class.append(90.0)
    more["b"].by_class.extend([100.0, None, 20.0])
    result = summarise(tests + held_out, scores | more)
    assert (result.ka, result.zs) == (57.5, 50)
    assert result.concept_means == {"ka": pytest.approx((80 * 25 + 90) / 81), "zs": 60}
    assert result.as_metrics()["concept_means"] == result.concept_means
    per_concept = result.by_class()
    assert per_concept == {"a": [20.0, 30.0] * 40, "r": [90.0], "b": [100.0, None, 20.0]}


def test_concept_scores_are_the_accuracies_of_each_class_on_the_subset(tiny, captioned):
    clip = stub(Seeing())
    test = coloured(clip, [0, 1, 1, 1, 2, 2, 5, 0, 0])
    test.samples.labels[3] = 0  # seen as 1
    scores, _ = evaluate(clip, [test], {"colours": np.arange(8)}, CPU)
    assert scores.by_class() == {"colours": [pytest.approx(66.6667), 100, 100, None, None, 100, None, None]}
    assert json.loads(json.dumps(scores.by_class())) == scores.by_class()
    retrieval = as_test(tiny, captioned, "captioned", "retrieval")
    scores, _ = evaluate(tiny, [retrieval], {"captioned": np.arange(30)}, CPU)
    assert scores.by_class() == {"captioned": [round(scores.datasets["captioned"].score, 4)]}


def test_metrics_lines_and_json_have_the_promised_fields():
    tests, scores = scored({"a": 16.0}, "adaptation")
    held_out, more = scored({"b": 25.0}, "evaluation")
    scores["a"].details["top5"], more["b"].details["top5"] = 80.0, 90.0
    result = summarise(tests + held_out, scores | more)
    line = result.as_metrics()
    assert json.loads(json.dumps(line)) == line
    assert (line["ka"], line["zs"], line["gm"]) == (16, 25, 20)
    assert (line["datasets"], line["stderr"]) == ({"a": 16, "b": 25}, {"a": 1.5, "b": 1.5})
    assert line["details"] == {"a": {"top5": 80}, "b": {"top5": 90}}
    document = json.loads(result.as_json())
    assert (document["ka"], document["zs"], document["gm"]) == (16, 25, 20)
    row = {"metric": "accuracy", "score": 25, "n": 3, "stderr": 1.5, "details": {"top5": 90}}
    assert document["datasets"]["b"] == row and document["datasets"].keys() == {"a", "b"}
    assert "16.00" in result.as_text()


def test_recall_at_1_stands_beside_recall_at_5_wherever_a_score_is_told(tiny, captioned):
    """Among five pictures recall@5 is 100 whatever the model is, and a line says so."""
    test = as_test(tiny, captioned, "captioned", "retrieval")
    scores, _ = evaluate(tiny, [test], {"captioned": np.arange(5)}, CPU)
    first = scores.datasets["captioned"].details["recall@1"]
    score = scores.datasets["captioned"]
    assert score.details["t2i@5"] == 100 and 0 <= first <= 100
    announced, warning, line, *_ = scores.as_text().splitlines()
    assert announced == "ZS: recall@5 among 5 pictures on captioned"
    assert warning.startswith("warning: captioned: 5 test pictures are few, ") and "in 100%" in warning
    assert f"recall@5    {score.score:.2f} +- {score.stderr:.2f}  n=5  recall@1 {first:.2f}" in line
    assert json.loads(scores.as_json())["datasets"]["captioned"]["details"]["recall@1"] == first
    assert scores.as_metrics()["details"]["captioned"]["recall@1"] == first


# Opening


@pytest.fixture
def opened(monkeypatch, tmp_path, tiny):
    """open_tests on sources in memory: {role: {name: (source, task)}} -> test sets."""

    def call(**roles):
        entries = {
            role: {
                name: SimpleNamespace(name=name, role=role, task=task, open=lambda split, s=source: s)
                for name, (source, task) in roles.get(role, {}).items()
            }
            for role in ("adaptation", "evaluation")
        }
        path = tmp_path / "data.yaml"
        return open_tests(datafile.DataFile(path, None, [], **entries), tiny, 16)

    return call


def test_test_sets_leave_out_what_cannot_be_scored(opened, tiny):
    arrays = noise(250, seed=3)
    arrays[4] = np.zeros((0, 0, 3))
    labels = [i % 2 for i in range(250)]
    labels[9] = -1
    captions = [["words"]] * 250
    captions[7] = []
    classified, retrieved = opened(
        adaptation={
            "c": (Pictures(arrays, labels, ["cat", "dog"], captions, ("a {}.", "{}!")), "classification")
        },
        evaluation={"r": (Pictures(arrays, captions=captions), "retrieval")},
    )
    assert sorted(set(range(250)) - set(classified.usable)) == [4, 9]
    assert sorted(set(range(250)) - set(retrieved.usable)) == [4, 7]
    assert (classified.role, retrieved.role) == ("adaptation", "evaluation")
    for template, texts in zip(classified.prompts, [["a cat.", "a dog."], ["cat!", "dog!"]], strict=True):
        for row, expected in zip(template, tiny.tokenize(texts), strict=True):
            np.testing.assert_array_equal(row, expected)
    assert retrieved.prompts == []


@pytest.mark.parametrize(
    ("source", "task", "expected"),
    [
        (Pictures(noise(2, seed=4), captions=[["a"], ["b"]]), "classification", "task: retrieval"),
        (Pictures(noise(2, seed=4)), "retrieval", "caption"),
        (Pictures(noise(2, seed=4), [-1, -1], ["a"]), "classification", "label"),
    ],
)
def test_a_set_of_which_nothing_can_be_scored_is_a_mistake(opened, source, task, expected):
    with pytest.raises(UserError, match=rf"data\.yaml: evaluation\.x: .*{expected}"):
        opened(evaluation={"x": (source, task)})


def test_sets_without_a_test_split_are_not_scored(opened):
    source = Pictures(noise(2, seed=5), [0, 1], ["a", "b"])
    tests = opened(adaptation={"x": (None, "classification"), "y": (source, "classification")})
    assert [test.name for test in tests] == ["y"]
