"""The six orders: what each puts first, that the seed decides the rest, and what they refuse."""

import itertools
import json
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fomo.clip import Features, contrastive_loss
from fomo.datasets import orders
from fomo.datasets.datafile import DataFile, Entry, read
from fomo.datasets.orders import (
    ORDERS,
    Context,
    count_names,
    lightest_path,
    loss_among,
    nearest_path,
    order_concepts,
    read_counts,
)
from fomo.datasets.stream import Concept, switches
from fomo.errors import UserError
from fomo.load_recipe import ROOT, load
from fomo.recipe import Stream
from fomo.report.previews import stream_section

STREAMS = Path(__file__).parents[3] / "shared" / "fomo_in_flux" / "streams"
YEARS = {"set 0": 2014, "set 1": 2008, "set 2": 2014, "set 3": None}


def concepts(count: int, sets: int = 4) -> list[Concept]:
    return [Concept(f"set {i % sets}", i // sets, f"class {i}") for i in range(count)]


def context(order: str = "random", seed: int = 0, years: dict | None = None, **how) -> Context:
    """What the orders may ask; asking for a model is a failure."""
    years = YEARS if years is None else years
    specs = {name: {"year": year} if year else {} for name, year in years.items()}
    entries = {name: Entry(name, "adaptation", spec, Path("d.yaml")) for name, spec in specs.items()}
    data = DataFile(Path("d.yaml"), None, [], entries, {})
    return Context(Stream(order=order, **how), seed, data, lambda: pytest.fail("a model was asked for"))


def test_the_recipe_knows_exactly_the_orders_there_are():
    assert tuple(ORDERS) == get_args(Stream.__annotations__["order"])


@pytest.mark.parametrize("order", ["random", "dataset", "time"])
def test_orders_without_a_model_hold_every_concept_once_and_follow_the_seed(order):
    first, again, other = (order_concepts(concepts(500), context(order, seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert sorted(first) == sorted(concepts(500))
    backward = order_concepts(concepts(500), context(order, 3, reverse=True))
    assert backward == first[::-1]


def test_the_random_order_mixes_the_sets():
    first, other = (order_concepts(concepts(300, 3), context(seed=seed)) for seed in (0, 1))
    assert sum(a != b for a, b in zip(first, other, strict=True)) > 270
    assert 160 < switches(first) < 240  # of 299 neighbours two thirds come from different sets


def test_dataset_keeps_every_set_whole_and_shuffles_sets_and_classes():
    found = [order_concepts(concepts(200), context("dataset", seed)) for seed in range(8)]
    assert {switches(stream) for stream in found} == {3}
    assert len({tuple(dict.fromkeys(c.dataset for c in stream)) for stream in found}) > 4
    assert [c.label for c in found[0][:50]] != sorted(c.label for c in found[0][:50])


def test_time_goes_by_years_mixes_those_of_a_year_and_puts_the_undated_last(capsys):
    stream = order_concepts(concepts(200), context("time"))
    years = [YEARS[c.dataset] or 9999 for c in stream]
    assert years == sorted(years)
    assert switches(stream[50:150]) > 30  # sets 0 and 2 are of one year
    assert "d.yaml: stream.order time: no year, so they keep the order of the file and come last: set 3" in (
        capsys.readouterr().err
    )


def test_time_with_whole_keeps_the_sets_of_a_year_apart():
    found = [order_concepts(concepts(200), context("time", seed, whole=True)) for seed in range(8)]
    assert {switches(stream) for stream in found} == {3}
    firsts = {stream[50].dataset for stream in found}
    assert firsts == {"set 0", "set 2"}  # which of a year comes first is the seed's


def test_without_any_year_time_is_the_order_of_the_data_file(capsys):
    stream = order_concepts(
        concepts(40), context("time", years=dict.fromkeys(["set 2", "set 0", "set 3", "set 1"]))
    )
    assert list(dict.fromkeys(c.dataset for c in stream)) == ["set 2", "set 0", "set 3", "set 1"]
    assert "come last" not in capsys.readouterr().err


def test_a_stream_file_takes_the_place_of_the_order_and_can_be_reversed(tmp_path):
    lines = [f"{c.dataset}+++{c.name}" for c in concepts(12)][::2]
    (tmp_path / "s.json").write_text(json.dumps(lines))
    forward = order_concepts(concepts(12), context(file=str(tmp_path / "s.json")))
    assert forward == concepts(12)[::2]
    assert order_concepts(concepts(12), context(file=str(tmp_path / "s.json"), reverse=True)) == forward[::-1]


# frequency
def test_names_are_counted_as_whole_words_once_per_caption_in_any_case():
    captions = ["A red fox and a Red Fox.", "foxes are red", "the oak_tree by an oak", "oak tree; fox", ""]
    names = ["fox", "red fox", "oak tree", "Oak_Tree", "oak", "wolf", "?"]
    assert count_names(names, captions) == [2, 1, 2, 2, 2, 0, 0]


def test_frequency_is_rare_first_by_the_file_and_ties_follow_the_seed(tmp_path, capsys):
    (tmp_path / "c.csv").write_text('name,count\n"class 0",5\nCLASS_1,2\nset 2+++class 2,9\nclass 2,0\n')
    counts = str(tmp_path / "c.csv")
    streams = [order_concepts(concepts(6), context("frequency", seed, counts=counts)) for seed in range(6)]
    for stream in streams:
        assert [c.name for c in stream[-3:]] == ["class 1", "class 0", "class 2"]
    assert len({tuple(stream[:3]) for stream in streams}) > 1
    assert "3 class names are not in it and count 0: class 3, class 4, class 5" in capsys.readouterr().err


def test_counts_may_be_json_or_tabs(tmp_path):
    (tmp_path / "c.json").write_text('{"Red_Fox": 3, "oak": 1e6}')
    (tmp_path / "c.tsv").write_text("red fox\t3\noak, big\t1000000")
    assert read_counts(str(tmp_path / "c.json")) == {"red fox": 3, "oak": 1e6}
    assert read_counts(str(tmp_path / "c.tsv")) == {"red fox": 3, "oak, big": 1e6}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("c.csv", "a,1\nb", r"entry 2: expected a class name and a count of 0 or more, got \['b'\]"),
        ("c.csv", "a,many", "entry 1: .*'many'"),
        ("c.csv", "a,-1", "entry 1"),
        ("c.csv", "a,nan", "entry 1"),
        ("c.csv", "a,inf", "entry 1"),
        ("c.csv", "a,1,2", "entry 1"),
        ("c.json", '["a"]', "entry 1"),
        ("c.json", '["a", 1]', "entry 1"),
        ("c.json", "5", "entry 1"),
        ("c.json", '{"a": true}', "entry 1"),
        ("c.json", '{"a": [1]}', "entry 1"),
        ("c.json", "{", "not a readable file of counts"),
        ("c.csv", "other,1", r"names none of the 4 concepts of d\.yaml, as 'class"),
        ("c.csv", "", "names none of the 4 concepts"),
    ],
)
def test_a_malformed_file_of_counts_is_refused(file, content, expected, tmp_path):
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=rf"{file}: {expected}"):
        order_concepts(concepts(4), context("frequency", counts=str(tmp_path / file)))


def test_a_missing_file_of_counts_and_a_missing_pool_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv: cannot be read: No such file"):
        order_concepts(concepts(4), context("frequency", counts=str(tmp_path / "gone.csv")))
    with pytest.raises(UserError, match=r"frequency: .* no pretraining pool .* stream\.counts: FILE"):
        order_concepts(concepts(4), context("frequency"))


def test_frequency_counts_in_the_captions_of_the_pool(tmp_path):
    (tmp_path / "d.yaml").write_text(
        "pretraining: [{source: world, domain: shapes, per_concept: 3, concepts: [ring]},"
        " {source: world, domain: shapes, per_concept: 9, concepts: [square]}]\n"
        "adaptation: {shapes: {source: world, domain: shapes, train: 1, test: 1, concepts: 3}}"
    )
    here = [Concept("shapes", i, name) for i, name in enumerate(["square", "moon of iron", "ring"])]
    found = order_concepts(here, replace(context("frequency"), data=read(tmp_path / "d.yaml")))
    assert [c.name for c in found] == ["moon of iron", "ring", "square"]


# similarity
def test_the_nearest_path_along_a_line_of_directions_is_the_line():
    angles = np.linspace(0, 1, 40)
    shuffled = np.random.default_rng(0).permutation(40)
    points = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)[shuffled]
    path = shuffled[lightest_path(points, starts=40, seed=0)]
    assert path.tolist() in (list(range(40)), list(range(40))[::-1])


def test_the_path_agrees_with_plain_python_and_the_lightest_is_no_heavier_than_any():
    points = np.random.default_rng(1).standard_normal((30, 5)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    similarity = points @ points.T
    weights = []
    for start in range(30):
        left, path = set(range(30)) - {start}, [start]
        while left:
            path.append(max(left, key=lambda i: similarity[path[-1], i]))
            left.remove(path[-1])
        found, closeness = nearest_path(similarity, start)
        assert found.tolist() == path
        weights.append(sum(1 - similarity[a, b] for a, b in itertools.pairwise(path)))
        assert 29 - closeness == pytest.approx(weights[-1], abs=1e-4)
    best = lightest_path(points, starts=30, seed=0)
    weight = sum(1 - similarity[a, b] for a, b in itertools.pairwise(best))
    assert weight == pytest.approx(min(weights), abs=1e-4)
    assert sorted(best) == list(range(30))
    few = lightest_path(points, starts=3, seed=0)
    assert sum(1 - similarity[a, b] for a, b in itertools.pairwise(few)) >= weight - 1e-4


# performance
def test_the_loss_of_pairs_without_others_is_the_contrastive_loss():
    rng = torch.Generator().manual_seed(0)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(7, 4, generator=rng), dim=-1) for _ in range(2)
    )
    empty = (images[:0], texts[:0])
    whole = contrastive_loss(Features(images, texts, torch.tensor(9.0))).item()
    assert loss_among((images, texts), empty, 9.0) == pytest.approx(whole, rel=1e-5)


def test_the_loss_counts_the_own_pairs_only():
    own, others = torch.eye(4)[:1], torch.eye(4)[1:]
    assert loss_among((own, own), (others, others), 100.0) == pytest.approx(0, abs=1e-6)
    wrong = (others, others.roll(1, 0))  # confused among themselves, not with the own pair
    assert loss_among((own, own), wrong, 100.0) == pytest.approx(0, abs=1e-6)
    assert loss_among((own, -own), (others, others), 1.0) > loss_among((own, own), (others, others), 1.0)


@pytest.fixture(scope="module")
def small(small_scale):
    from fomo.pretrain import starting_model

    recipe = load(None, scale=str(small_scale))
    return recipe, starting_model(recipe.model, torch.device("cpu"))


def test_performance_is_easy_first_and_draws_50_own_and_50_pooled_pairs(small, monkeypatch):
    recipe, clip = small
    data = read(recipe.data)
    asked_for = []

    def features(context, samples, numbers):
        """Concept c of a set of 10 has pairs that agree the less, the higher c is."""
        asked_for.append(len(numbers))
        label = torch.from_numpy(samples.labels[numbers] % 10).float()
        angle = label * 0.15 * (len(numbers) <= orders.PAIRS)
        images = torch.nn.functional.one_hot(torch.arange(len(numbers)) % 6, 12).float()
        return images, images * angle.cos()[:, None] + images.roll(6, 1) * angle.sin()[:, None]

    monkeypatch.setattr(orders, "pair_features", features)
    here = [Concept(name, i, f"{name} {i}") for name in ("symbols", "flags") for i in range(10)]
    stream = order_concepts(here, Context(Stream(order="performance"), 0, data, lambda: clip))
    assert [c.label for c in stream] == sorted(c.label for c in here)
    assert asked_for[1:] == [6] * 20  # each concept has 6 pairs
    assert asked_for[0] <= orders.POOLED


def test_without_a_pool_performance_mixes_the_concepts_with_each_other(small, capsys):
    recipe, clip = small
    data = replace(read(recipe.data), pretraining=[])
    here = [Concept("symbols", i, f"s{i}") for i in range(10)]
    how = Context(Stream(order="performance"), 0, data, lambda: clip)
    assert sorted(order_concepts(here, how)) == here
    assert "performance: no pretraining pool" in capsys.readouterr().err


# the command line
@pytest.fixture(scope="module")
def command():
    cli = runpy.run_path(str(ROOT.parent / "fomo.py"))["cli"]
    return lambda *words: CliRunner().invoke(cli, ["stream", *map(str, words)])


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_writes_a_stream_and_its_exact_reversal(order, command, small_scale, tmp_path):
    both = []
    for flags in ([], ["--reverse"]):
        file = tmp_path / f"{len(flags)}.json"
        result = command("--scale", small_scale, "--order", order, "--updates", 4, "-o", file, *flags)
        assert result.exit_code == 0, result.output
        both.append(json.loads(file.read_text()))
    assert both[0] == both[1][::-1]
    assert Counter(line.partition("+++")[0] for line in both[0]) == {"symbols": 10, "flags": 10}
    again = command("--scale", small_scale, "--order", tmp_path / "0.json", "-o", tmp_path / "again.json")
    assert again.exit_code == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "0.json").read_bytes()


def test_the_command_prints_a_line_per_update_and_draws(command, small_scale, tmp_path):
    result = command(
        "--scale", small_scale, "--order", "dataset", "--per-dataset", "--plot", tmp_path / "p.png"
    )
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()[1:]]
    assert [row[:5] for row in rows] == [
        ["1", "10", "60", "1", "0"],
        ["2", "10", "60", "1", "0"],
        ["all", "20", "120", "2", "1"],
    ]
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--order", "sideways"], "stream.order: unknown 'sideways'"),
        (["--updates", "21"], "stream.updates: 21 updates need as many concepts, the data has 20"),
        (["--updates", "0"], "stream.updates: got 0"),
        (["--order", "gone.json"], "gone.json: cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, expected, command, small_scale):
    result = command("--scale", small_scale, *words)
    assert result.exit_code == 2
    assert expected in result.stderr and len(result.stderr.splitlines()) == 1


def test_the_official_stream_says_that_none_of_its_18381_concepts_are_in_other_data(command, small_scale):
    if not STREAMS.is_dir():
        pytest.skip(f"{STREAMS} is not here")
    result = command("--scale", small_scale, "--order", STREAMS / "random_sequence_1.json")
    assert result.exit_code == 2
    assert "18,381 concepts not in the data:" in result.stderr and "2,500 of iNATURALIST2021" in result.stderr


def test_the_command_line_goes_over_the_recipe():
    how = Stream(order="time", updates=7, file="a.json")
    assert stream_section(how, None, None, False, False) == how
    assert stream_section(how, "random", 3, True, True) == Stream(
        order="random", updates=3, reverse=True, per_dataset=True
    )
    assert stream_section(how, "b.json", None, False, False).file == "b.json"


# the scales
@pytest.mark.parametrize("scale", ["b16", "b32", "s16", "l14", "h14", "g14"])
def test_the_scales_load_with_the_papers_budget_and_any_data(scale):
    recipe = load(ROOT / "guide.yaml", scale=scale)
    assert recipe.stream.updates == 20 and recipe.optimizer.batch_size == 512
    assert recipe.budget.gflops == {"b16": 1.8e9, "b32": 4.53e7}.get(scale)
    assert recipe.steps == (None if scale in ("b16", "b32") else 1420)
    assert recipe.optimizer.lr == 1e-5 and recipe.method["keep"] == 0.9
    assert recipe.evaluation.subset == 0.1 and recipe.evaluation.keep_weights == 3
    assert Path(recipe.data).name == ("hub.yaml" if scale == "b32" else "fomo_in_flux.yaml")
    assert Path(recipe.data).is_file()
    real = load(None, scale=scale, data="tests/real.yaml", overrides=["stream.updates=4"])
    assert Path(real.data).name == "real.yaml" and real.model == recipe.model


@pytest.mark.parametrize("scale", ["b16", "b32", "l14", "h14", "g14"])
def test_open_clip_knows_the_models_of_the_scales(scale):
    import open_clip

    model = load(None, scale=scale).model
    assert model.pretrained in open_clip.list_pretrained_tags_by_model(model.name)
