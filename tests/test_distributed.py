"""Two processes that train together do what one does alone."""

from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    CPU,
    ROOT,
    Child,
    after_steps,
    class_folders,
    environments,
    lines,
    on_ranks,
    recipe_of,
    run,
    terminate,
    weights_of,
)
from torch import Tensor

import fomo.datasets.features
from fomo.datasets import datafile
from fomo.datasets.features import image_features, text_features
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.devices import Precision
from fomo.distributed import ALONE, Ranks
from fomo.errors import FieldError, Interrupted, UserError
from fomo.eval.zero_shot import class_features
from fomo.methods import Method
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer, Recipe
from fomo.train import train

# --- messages --------------------------------------------------------------------------------------------


def messages(ranks: Ranks) -> dict:
    rows = torch.arange(4.0).view(2, 2) + 10 * ranks.rank
    rows.requires_grad_()
    whole = ranks.all_gather(rows)
    (whole.square().sum() / ranks.world_size).backward()
    sums = [torch.full((3,), 1.0 + ranks.rank), torch.ones(2**19), torch.ones(4, 2).T[:, ::2]]
    ranks.all_reduce_(sums)
    return {
        "highest": ranks.all_reduce_max(ranks.rank == 1),
        "first": ranks.broadcast_object(
            lambda: {"number": ranks.rank, "tensor": torch.ones(2), "path": ROOT}
        ),
        "whole": whole.detach(),
        "rows of it": ranks.own_rows(whole).equal(rows),
        "gradients": rows.grad.equal(2 * rows.detach()),
        "sums": [s.unique().tolist() for s in sums],
        "rows": rows_of(ranks),
    }


def rows_of(ranks: Ranks) -> Tensor:
    """A large matrix with few rows that are not zero, and other ones on each rank."""
    matrix = torch.zeros(2**13, 64)
    matrix[ranks.rank] = torch.linspace(-1, 0, 64)
    matrix[5, 3], matrix[6, 63] = 1 + ranks.rank, -0.0
    if ranks.rank:
        matrix[7, 8] = torch.nan
    ranks.all_reduce_([matrix, torch.zeros(1)])
    return matrix


def test_ranks_gather_in_the_order_of_the_batch_and_gradients_come_back():
    for found in on_ranks(messages):
        assert found["highest"] == 1 and found["rows of it"] and found["gradients"]
        assert found["first"] == {"number": 0, "tensor": found["first"]["tensor"], "path": ROOT}
        assert found["whole"].tolist() == [[0, 1], [10, 11], [2, 3], [12, 13]]
        assert found["sums"] == [[3], [2], [2]]
        expected = torch.zeros(2**13, 64)
        expected[:2] = torch.linspace(-1, 0, 64)
        expected[5, 3], expected[7, 8] = 3, torch.nan
        torch.testing.assert_close(found["rows"], expected, rtol=0, atol=0, equal_nan=True)


# --- batches and steps -----------------------------------------------------------------------------------


def clip_and_batches(scale: Path, size: int, count: int) -> tuple:
    recipe = recipe_of(scale)
    clip = starting_model(recipe.model, CPU)
    data = datafile.read(recipe.data)
    pool = Collection([Samples(s, clip, clip.image_size, "pool") for s in data.pool()])
    new = Collection([Samples(data.adaptation["flags"].open("train"), clip, 40, "new")])  # wider canvas
    draws = [
        ("pretraining", pool_of(pool, (0,)), size // 2),
        ("update", pool_of(new, (1,)), size - size // 2),
    ]
    return clip, Batches(draws, 3, 1, count)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_rows_of_all_ranks_are_the_batch(small_scale, count):
    _, batches = clip_and_batches(small_scale, 15, 3)
    for step in range(3):
        whole = batches[step]
        parts = [batches.rows(number, count)[step] for number in range(count)]
        rows = [
            row for each in zip_longest(*(zip(*part, strict=True) for part in parts)) for row in each if row
        ]
        assert len(rows) == 15 and sum(len(part.pools) for part in parts) == 15
        for (canvas, box, tokens, pool), *expected in zip(rows, *whole, strict=True):
            height, width = canvas.shape[:2]
            assert canvas.equal(expected[0][:height, :width]) and not expected[0][height:, width:].any()
            assert box.equal(expected[1]) and pool == expected[3]
            assert tokens.tolist() == expected[2][: len(tokens)].tolist()
            assert not expected[2][len(tokens) :].any()


def train_steps(ranks: Ranks, scale: Path, count: int, options: dict) -> dict:
    clip, batches = clip_and_batches(scale, 8, count)
    optimizer = Method().optimizer(list(clip.model.parameters()), Optimizer(lr=1e-3, batch_size=8))
    done = train(clip, Method(), optimizer, batches.rows(ranks.rank, ranks.world_size).loader(), lambda step: 1e-3,
                 device=CPU, precision=Precision("float32", CPU), clip_norm=1.0, max_scale=100.0, ranks=ranks,
                 **options)  # fmt: skip
    read = [(step.loss.item(), step.grad_norm.item(), clip.model.logit_scale.item()) for step in done]
    return {"read": np.array(read).tolist(), "proj": clip.model.visual.proj.detach()}


@pytest.mark.parametrize(
    ("count", "options"),
    [(20, {}), (4, {"accumulate": 3}), (4, {"accumulate": 2, "equal_captions": "positives"})],
)
def test_losses_norms_and_scales_are_those_of_one_process(small_scale, count, options):
    alone = train_steps(ALONE, small_scale, count, {**options, "accumulate": 1})
    first, second = on_ranks(train_steps, small_scale, count, options)
    assert first["read"] == second["read"] and first["proj"].equal(second["proj"])
    losses, norms, scales = (np.array([run["read"] for run in (first, alone)])[..., i] for i in range(3))
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(*scales, rtol=0, atol=1e-5)
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert alone["read"][0][2] != pytest.approx(alone["read"][-1][2], abs=1e-3)  # the scale has moved


# --- evaluation ------------------------------------------------------------------------------------------


def features(ranks: Ranks, scale: Path) -> dict:
    """Of 7 pictures and 7 texts, in blocks of 2 a rank, and of one alone."""
    fomo.datasets.features.IMAGES = fomo.datasets.features.TEXTS = 2
    recipe = recipe_of(scale)
    clip = starting_model(recipe.model, CPU)
    clip.model.eval()
    samples = Samples(datafile.read(recipe.data).pool()[0], clip, clip.image_size, "pool")
    texts = clip.tokenize(["a", "a cat", "two black dogs", "a b c d e", "x", "a red circle", "green"])
    ticks: list[int] = []
    images = image_features(clip, samples, np.arange(7), CPU, ticks.append, ranks)
    return {
        "images": images,
        "texts": text_features(clip, texts, CPU, ranks),
        "classes": class_features(clip, [texts[:1], texts[1:2]], CPU, ranks),
        "ticks": ticks,
    }


def test_encoding_is_shared_and_every_rank_has_all_of_it(small_scale, monkeypatch):
    for name in ("IMAGES", "TEXTS"):
        monkeypatch.setattr(fomo.datasets.features, name, 2)
    alone, ranks = features(ALONE, small_scale), on_ranks(features, small_scale)
    assert len(alone["images"]) == 7 and sum(alone["ticks"]) == 7 and ranks[0]["ticks"] == [4, 3]
    for name in ("images", "texts", "classes"):
        for there in ranks:
            torch.testing.assert_close(there[name], alone[name], rtol=0, atol=2e-6)
        assert ranks[0][name].equal(ranks[1][name])


# --- runs ------------------------------------------------------------------------------------------------


def two_updates(scale: Path, method: str, *more: str) -> Recipe:
    # Some gradients are pure rounding (the key's bias in an attention): AdamW would make whole steps of them.
    settings = ["optimizer.lr=1e-3", "optimizer.eps=1e-4", "evaluation.frozen=false", "stream.updates=2"]
    return recipe_of(scale, *settings, f"method={method}", *more)


def ended(
    ranks: Ranks, recipe: Recipe, folder: Path, cut: tuple[int, int] = (0, 0), resume=False, workers=0
) -> int:
    """-> the signal that ended a run. cut: which rank gets one after how many steps."""
    with after_steps(cut[1] if cut[0] == ranks.rank else 0, terminate):
        try:
            run(recipe, folder, resume=resume, workers=workers, ranks=ranks)
        except Interrupted as stop:
            return stop.signum
    return 0


@pytest.fixture
def alone(small_scale, tmp_path):
    """The run of a method in one process."""

    def of(method: str) -> tuple[Recipe, Path]:
        recipe = two_updates(small_scale, method)
        run(recipe, tmp_path / "alone")
        return recipe, tmp_path / "alone"

    return of


def assert_close(a: Path, b: Path) -> None:
    """Deployed weights of the last update, and everything that the logs say of the model."""
    one, two = (weights_of(folder, 2) for folder in (a, b))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert losses(a) == pytest.approx(losses(b), abs=1e-5)
    scores = [
        [[line[k] for k in ("ka", "zs", "drift")] for line in lines(x / "metrics.jsonl")] for x in (a, b)
    ]
    np.testing.assert_allclose(*scores, atol=1e-5)


def losses(folder: Path) -> dict[int, float]:
    """The sum over an update's steps, however many a line of the log is about."""
    sums, done = {}, {}
    for line in lines(folder / "train.jsonl"):
        update, step = line["update"], line["step"] + 1
        sums[update] = sums.get(update, 0) + line["loss"] * (step - done.get(update, 0))
        done[update] = step
    return sums


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)).split("-")[0] for p in folder.rglob("*"))


@pytest.mark.parametrize(
    "method",
    [
        "{name: lora}",
        "{name: ewc, strength: 100, samples: 24}",
        "{name: merge, deploy: all, rule: ties}",
        "{name: distill}",
        "{name: si}",
    ],
    ids=lambda method: method.split(",")[0].strip("{}").split()[1],
)
def test_a_run_of_two_ranks_ends_as_that_of_one(method, alone, tmp_path):
    """TIES of all experts keeps them in the folder, which only the first rank may write."""
    recipe, one = alone(method)
    two = tmp_path / "two"
    assert on_ranks(ended, recipe, two) == [0, 0]
    assert_close(one, two)
    assert names(one) == names(two)
    start, end = weights_of(two, 0), weights_of(two, 2)
    assert max((start[n] - end[n]).abs().max() for n in start) > 1e-3


@pytest.mark.parametrize("cut", [(1, 2), (0, 6)])
def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(cut, alone, tmp_path):
    recipe, whole = alone("{name: merge}")
    assert on_ranks(ended, recipe, tmp_path / "cut", cut) == [15, 15]
    newest = torch.load(max((tmp_path / "cut/state").glob("0*.pt")))["position"]
    assert 4 * newest["update"] + newest["step"] == cut[1] and "ranks" not in newest
    run(recipe, tmp_path / "cut", resume=True)
    assert_close(whole, tmp_path / "cut")


def test_two_ranks_go_on_where_one_stopped(alone, tmp_path):
    recipe, whole = alone("{name: lora}")
    assert ended(ALONE, recipe, tmp_path / "cut", (0, 5)) == 15
    assert on_ranks(ended, recipe, tmp_path / "cut", (0, 0), True, 1) == [0, 0]
    assert_close(whole, tmp_path / "cut")


def test_ranks_agree_on_the_steps_that_an_hour_buys(small_scale, tmp_path):
    recipe = two_updates(small_scale, "{name: finetune}", "stream.updates=1", "budget.hours=0.0008")
    assert on_ranks(ended, recipe, tmp_path / "run") == [0, 0]
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["steps"] > 5


@pytest.mark.parametrize("field, value", [("optimizer.batch_size", 13), ("optimizer.accumulate", 7)])
def test_a_batch_must_be_divisible_among_the_ranks(field, value, small_scale, tmp_path):
    recipe = two_updates(small_scale, "{name: finetune}", f"{field}={value}")
    with pytest.raises(FieldError, match=f"{field}: {value} p") as caught:
        run(recipe, tmp_path / "run", ranks=Ranks(1, 2))
    assert caught.value.field == field


# --- the command -----------------------------------------------------------------------------------------


def command(place: Path, *arguments: object, fault=None) -> tuple[list[int], list[str]]:
    """The command line on two ranks -> their exit statuses and what they say. fault: of the second."""
    arguments = ["update", *arguments, "--out", place / "run", "--device", "cpu"]
    children = [
        Child(place / f"rank{number}", *arguments, fault=fault if number else None, **environment)
        for number, environment in enumerate(environments())
    ]
    return [child.end() for child in children], [child.log.read_text() for child in children]


def lose_pictures() -> None:
    def lost(batches, step):
        raise UserError("no picture of the update pool can be read")

    Batches.__getitem__ = lost


def test_the_first_rank_speaks_for_all(small_scale, tmp_path):
    pictures = class_folders(tmp_path / "pictures", ["red", "blue", "green"], 10)
    arguments = ["--data", pictures, "--scale", small_scale, "--set", "budget.steps=2"]
    statuses, (first, second) = command(tmp_path, *arguments)
    assert statuses == [0, 0] and "in 1 update: accuracy on 3 classes of pictures, " in first and second == ""


@pytest.mark.parametrize(
    ("setting", "fault", "statuses", "line"),
    [
        ("optimizer.batch_size=13", None, [2, 2], "optimizer.batch_size: 13 pairs"),
        ("optimizer.batch_size=0", None, [2, 1], "optimizer.batch_size"),
        ("seed=1", lose_pictures, [1, 2], "no picture of the update pool can be read"),
    ],
)
def test_a_failure_of_any_rank_ends_all_with_one_line(setting, fault, statuses, line, small_scale, tmp_path):
    arguments = ["--recipe", ROOT / "recipes/finetune.yaml", "--scale", small_scale, "--set", setting]
    found, logs = command(tmp_path, *arguments, fault=fault)
    assert found == statuses
    told = "".join(logs)
    assert told.count("fomo: ") == 1 and line in told and "Traceback" not in told
