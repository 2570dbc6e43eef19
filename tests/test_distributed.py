"""Two processes that train together do what one does alone."""

import json
import os
import runpy
import socket
import sys
from collections.abc import Callable
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from lives import stop_after, terminate
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import fomo.datasets.features
import fomo.update
from fomo.datasets import datafile
from fomo.datasets.features import image_features, text_features
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.distributed import ALONE, Ranks, joined
from fomo.errors import FieldError, Interrupted, UserError
from fomo.eval.zero_shot import class_features
from fomo.load_recipe import load
from fomo.methods import Method
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer
from fomo.runs.folder import Run
from fomo.train import Precision, train
from fomo.update import live_through

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
FORKS = get_context("forkserver")  # from a process that has imported everything
LIFE = ["stream.updates=2", "evaluation.frozen=false", "optimizer.lr=1e-3"]
# Some gradients are pure rounding (the key's bias in an attention): AdamW would make whole steps of them.
SETTLED = "optimizer.eps=1e-4"


def together(function: Callable, *arguments, count: int = 2) -> list:
    """function(ranks, *arguments) on every rank, or command(*arguments) -> what each returned."""
    FORKS.set_forkserver_preload(["pytest", "fomo.update"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "FOMO_CACHE": os.environ["FOMO_CACHE"]}
    pipes, processes = [], []
    for number in range(count):
        ours, theirs = FORKS.Pipe()
        environment = {**place, "RANK": str(number)}
        processes.append(FORKS.Process(target=enter, args=(theirs, environment, function, arguments)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        assert all(pipe.poll(120) for pipe in pipes), "a rank hangs"
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def enter(pipe, environment: dict, function: Callable, arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if function is command:  # joins by itself
        pipe.send(command(*arguments))
        return
    with joined("cpu") as ranks:
        pipe.send(function(ranks, *arguments))
        pipe.recv()  # tensors are fetched from a process that lives; `together` kills it


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
        "own": ranks.own_rows(whole).equal(rows),
        "slopes": rows.grad.equal(2 * rows.detach()),
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


def test_ranks_gather_in_the_order_of_the_batch_and_slopes_come_back():
    for said in together(messages):
        assert said["highest"] == 1 and said["own"] and said["slopes"]
        assert said["first"] == {"number": 0, "tensor": said["first"]["tensor"], "path": ROOT}
        assert said["whole"].tolist() == [[0, 1], [10, 11], [2, 3], [12, 13]]
        assert said["sums"] == [[3], [2], [2]]
        expected = torch.zeros(2**13, 64)
        expected[:2] = torch.linspace(-1, 0, 64)
        expected[5, 3], expected[7, 8] = 3, torch.nan
        torch.testing.assert_close(said["rows"], expected, rtol=0, atol=0, equal_nan=True)


# --- batches and steps -----------------------------------------------------------------------------------


def clip_and_batches(scale: Path, size: int, count: int) -> tuple:
    recipe = load(None, scale=str(scale))
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


@pytest.mark.parametrize(("count", "options"), [(50, {}), (4, {"accumulate": 3})])
def test_losses_norms_and_scales_are_those_of_one_process(small_scale, count, options):
    alone = train_steps(ALONE, small_scale, count, {})
    first, second = together(train_steps, small_scale, count, options)
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
    recipe = load(None, scale=str(scale))
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
    alone, ranks = features(ALONE, small_scale), together(features, small_scale)
    assert len(alone["images"]) == 7 and sum(alone["ticks"]) == 7 and ranks[0]["ticks"] == [4, 3]
    for name in ("images", "texts", "classes"):
        for own in ranks:
            torch.testing.assert_close(own[name], alone[name], rtol=0, atol=2e-6)
        assert ranks[0][name].equal(ranks[1][name])


# --- lives -----------------------------------------------------------------------------------------------


def recipe_of(scale: Path, method: str, *more: str):
    return load(None, scale=str(scale), overrides=[*LIFE, SETTLED, f"method={method}", *more])


def lived(
    ranks: Ranks,
    recipe,
    folder: Path,
    cut: tuple[int, int] | None = None,
    resume: bool = False,
    workers: int = 0,
) -> int:
    """-> the signal that ended it. cut: which rank gets one after how many steps."""
    with pytest.MonkeyPatch.context() as patch:
        if cut and cut[0] == ranks.rank:
            stop_after(patch, cut[1], terminate)
        try:
            live_through(recipe, folder, resume=resume, device="cpu", workers=workers, ranks=ranks)
        except Interrupted as stop:
            return stop.signum
    return 0


def assert_close(a: Path, b: Path, update: int = 2) -> None:
    """Deployed weights of an update, and everything that the logs say of the model."""
    one, two = (load_file(folder / f"weights/update_{update:03d}.safetensors") for folder in (a, b))
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


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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
def test_a_life_of_two_ranks_ends_as_that_of_one(method, small_scale, tmp_path):
    """TIES of all experts keeps them in the folder, which only the first rank may write."""
    recipe = recipe_of(small_scale, method)
    lived(ALONE, recipe, tmp_path / "one")
    assert together(lived, recipe, tmp_path / "two") == [0, 0]
    assert_close(tmp_path / "one", tmp_path / "two")
    assert names(tmp_path / "one") == names(tmp_path / "two")
    start = load_file(tmp_path / "two/weights/update_000.safetensors")
    end = load_file(tmp_path / "two/weights/update_002.safetensors")
    assert max((start[n] - end[n]).abs().max() for n in start) > 1e-3


@pytest.mark.parametrize("cut", [(1, 2), (0, 6)])
def test_a_signal_to_one_rank_stops_all_and_another_number_of_ranks_goes_on(cut, small_scale, tmp_path):
    recipe = recipe_of(small_scale, "{name: merge}")
    lived(ALONE, recipe, tmp_path / "whole")
    assert together(lived, recipe, tmp_path / "cut", cut) == [15, 15]
    run, checkpoint = Run.open(tmp_path / "cut", recipe, resume=True)
    run.close()
    assert 4 * run.position.update + run.position.step == cut[1] and "ranks" not in checkpoint["position"]
    lived(ALONE, recipe, tmp_path / "cut", resume=True)
    assert_close(tmp_path / "whole", tmp_path / "cut")


def test_two_ranks_go_on_where_one_stopped(small_scale, tmp_path):
    recipe = recipe_of(small_scale, "{name: lora}")
    lived(ALONE, recipe, tmp_path / "whole")
    lived(ALONE, recipe, tmp_path / "cut", (0, 5))
    assert together(lived, recipe, tmp_path / "cut", None, True, 1) == [0, 0]
    assert_close(tmp_path / "whole", tmp_path / "cut")


def test_ranks_agree_on_the_steps_that_an_hour_buys(small_scale, tmp_path):
    recipe = recipe_of(small_scale, "{name: finetune}", "stream.updates=1", "budget.hours=0.0008")
    assert together(lived, recipe, tmp_path / "run") == [0, 0]
    assert lines(tmp_path / "run/metrics.jsonl")[-1]["steps"] > 5


def test_a_batch_must_be_divisible_among_the_ranks(small_scale, tmp_path):
    for found, problem in (("batch_size=13", "13 pairs for 2 ranks, accepted: a multiple of 2"),
                           ("accumulate=7", "7 parts of the 6 pairs of a rank")):  # fmt: skip
        recipe = recipe_of(small_scale, "{name: finetune}", f"optimizer.{found}")
        with pytest.raises(FieldError, match=problem):
            live_through(recipe, tmp_path / "run", resume=False, device="cpu", ranks=Ranks(1, 2))


# --- the command -----------------------------------------------------------------------------------------


def command(place: Path, arguments: list[str], fault: Callable[[], None] | None = None) -> int:
    """`fomo.py` on one rank, which says what it says into a file; -> its exit status. fault: of rank 1."""
    with open(place / f"rank{os.environ['RANK']}.txt", "w") as file:
        sys.stdout = sys.stderr = file
        if fault and os.environ["RANK"] == "1":
            fault()
        try:
            runpy.run_path(str(ROOT / "fomo.py"))["cli"](arguments)
        except SystemExit as end:
            return end.code
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def lose_pictures() -> None:
    def lost(self, step):
        raise UserError("no picture of the update pool can be read")

    Batches.__getitem__ = lost


def test_the_first_rank_speaks_for_all(small_scale, tmp_path):
    pictures = tmp_path / "pictures"
    for name in ("red", "blue", "green"):
        (pictures / name).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (40, 32), name).save(pictures / name / f"{number}.png")
    arguments = [
        "update",
        "--data",
        str(pictures),
        "--scale",
        str(small_scale),
        "--out",
        str(tmp_path / "run"),
    ]
    assert together(command, tmp_path, [*arguments, "--set", "budget.steps=2", "--device", "cpu"]) == [0, 0]
    first, second = ((tmp_path / f"rank{number}.txt").read_text() for number in (0, 1))
    assert "in 1 update; report:" in first and second == ""


@pytest.mark.parametrize(
    ("said", "fault", "statuses", "line"),
    [
        ("optimizer.batch_size=13", None, [2, 2], "fomo: optimizer.batch_size: 13 pairs for 2 ranks"),
        ("optimizer.batch_size=0", None, [2, 1], "fomo: command line: optimizer.batch_size: must be"),
        ("seed=1", lose_pictures, [1, 2], "fomo: no picture of the update pool can be read"),
    ],
)
def test_a_failure_of_any_rank_ends_all_with_one_line(said, fault, statuses, line, small_scale, tmp_path):
    arguments = ["update", "--recipe", str(ROOT / "recipes/finetune.yaml"), "--scale", str(small_scale)]
    arguments += ["--set", said, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert together(command, tmp_path, arguments, fault) == statuses
    told = "".join((tmp_path / f"rank{number}.txt").read_text() for number in (0, 1))
    assert told.count("fomo: ") == 1 and line in told and "Traceback" not in told
