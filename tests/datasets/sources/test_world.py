"""The rendered world: the same picture everywhere, every domain in every style, true captions."""

import pickle
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from fomo.datasets.sources.world import COLOURS, DOMAINS, POOLS, STYLES, World, caption, render
from fomo.errors import UserError
from fomo.schema import build
from tests.datasets.inputs import one_line

ROOT = Path(__file__).parents[3]


def fingerprint(world: World) -> int:
    """Of all pixels, captions and labels."""
    pixels = b"".join(world.image(i).tobytes() for i in range(len(world)))
    captions = "".join(world.captions(i)[0] for i in range(len(world)))
    return crc32(pixels + captions.encode() + world.labels.tobytes())


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_renders_in_every_style(domain):
    for style in STYLES:
        for concept in DOMAINS[domain].concepts:
            picture = render(domain, concept, 0, style=style)
            assert (picture.mode, picture.size) == ("RGB", (32, 32))
            assert np.ptp(np.asarray(picture.convert("L")).astype(int)) > 20, (concept, style)


@pytest.mark.parametrize("size", [8, 33, 64])
def test_pictures_have_the_size_asked_for(size):
    for domain in DOMAINS:
        assert World(domain, split="test", per_concept=1, size=size).image(0).size == (size, size)


def test_another_process_draws_the_same_pictures():
    code = (
        "from tests.datasets.sources.test_world import *\n"
        "print([fingerprint(World(d, split='test', per_concept=1, style='mixed')) for d in DOMAINS])"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    here = [fingerprint(World(d, split="test", per_concept=1, style="mixed")) for d in DOMAINS]
    assert other.stdout.strip() == str(here)


def test_split_seed_style_and_index_each_give_other_pictures():
    first = {"split": "train", "per_concept": 5, "style": "plain", "seed": 0}
    variants = [first, first | {"split": "test"}, first | {"seed": 1}, first | {"style": "mixed"}]
    pictures = [
        world.image(i).tobytes() for world in (World("digits", **v) for v in variants) for i in range(50)
    ]
    assert len(set(pictures)) == 200
    assert len({World("digits", **v).key() for v in variants}) == 4


def test_key_changes_with_everything_else_that_decides_the_pixels():
    first = {"split": "train", "per_concept": 5, "size": 32, "concepts": None}
    variants = [first, first | {"per_concept": 6}, first | {"size": 64}, first | {"concepts": ["one"]}]
    keys = [World("digits", **v).key() for v in variants] + [World("letters", **first).key()]
    assert len(set(keys)) == 5


@pytest.mark.parametrize("domain", [*DOMAINS, *POOLS])
def test_labels_run_concept_by_concept_and_captions_name_the_class(domain):
    world = World(domain, split="train", per_concept=4, style="mixed")
    assert world.labels.tolist() == np.repeat(np.arange(len(world.classes)), 4).tolist()
    assert len(set(world.classes)) == len(world.classes)
    for i, label in enumerate(world.labels):
        (text,) = world.captions(i)
        assert world.classes[label].removesuffix(" in a scene") in text


def test_a_pool_holds_the_pictures_of_its_domains():
    pool, alone = (World(d, split="test", per_concept=2) for d in ("adaptation", "flags"))
    label = pool.classes.index("flag of Kestria")
    index = pool.labels.tolist().index(label)
    assert pool.image(index).tobytes() == alone.image(2 * alone.classes.index("Kestria")).tobytes()


def test_concepts_restrict_what_is_present_but_not_the_labels():
    named = World("digits", split="train", per_concept=2, concepts=["seven", "two"])
    assert named.labels.tolist() == [2, 2, 7, 7]
    assert len(named.classes) == 10

    counted = World("adaptation", split="train", per_concept=2, concepts=3)
    assert len(counted.classes) == 110
    assert len(counted) == 11 * 3 * 2
    assert counted.labels[-1] == 102  # the third of the ten concepts of the last domain


def test_a_third_of_the_base_captions_has_a_colour_word():
    world = World("base", split="train", per_concept=20, style="mixed")
    words = [set(world.captions(i)[0].strip(".").split()) for i in range(len(world))]
    assert 0.25 < np.mean([bool(w & set(COLOURS)) for w in words]) < 0.45


def test_captions_of_shapes_never_name_a_colour():
    """The colour-shapes domain is held out: its word combinations must be new."""
    world = World("shapes", split="train", per_concept=50, style="mixed")
    words = set(" ".join(world.captions(i)[0] for i in range(len(world))).split())
    assert not words & set(COLOURS)


def test_base_captions_use_adaptation_words_and_stay_short():
    world = World("base", per_concept=100, style="mixed")
    captions = [world.captions(i)[0] for i in range(len(world))]
    used = {text.split(", not ")[1].rstrip(".") for text in captions if ", not " in text}
    assert used == {concept for d in DOMAINS.values() if d.kind == "adaptation" for concept in d.concepts}
    assert max(len(text.split()) for text in captions) < 16


def test_mixed_style_leaves_colours_to_concepts_that_are_colours():
    for i in range(40):
        red, green, blue = np.asarray(render("colours", "red", i, style="mixed"), dtype=int).reshape(-1, 3).T
        assert (red - np.maximum(green, blue)).max() > 90


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"domain": "digit"}, ["domain", "'digit'", "did you mean digits", "flags", "base"]),
        ({"style": "nosy"}, ["style", "'nosy'", "did you mean noisy", "plain", "mixed"]),
        ({"split": "val"}, ["split", "'val'", "train", "test"]),
        ({"concepts": ["eleven"]}, ["concepts", "'eleven'", "seven"]),
        ({"concepts": 0}, ["concepts", "0"]),
        ({"per_concept": 0}, ["per_concept", "0"]),
        ({"size": 4}, ["size", "4"]),
        ({"wrong_captions": 2}, ["wrong_captions", "from 0 to 1"]),
    ],
)
def test_mistakes_are_answered_with_one_line_that_names_what_is_accepted(change, expected):
    message = one_line(build, World, {"domain": "digits", "split": "train", "per_concept": 1} | change)
    assert message.startswith(next(iter(change)))
    for part in expected:
        assert part in message


def test_functions_refuse_unknown_concepts_too():
    for function in (render, caption):
        with pytest.raises(UserError, match=r"concept: unknown 'ten'.*accepted: zero, one"):
            function("digits", "ten", 0)


def test_wrong_captions_are_those_of_other_pictures_and_pixels_stay():
    right = World("digits", 40)
    wrong = World("digits", 40, wrong_captions=0.5)
    captions = [source.captions(i) for source in (right, wrong) for i in range(400)]
    changed = sum(a != b for a, b in zip(captions[:400], captions[400:], strict=True))
    assert 160 < changed < 230  # half of 400, but for those that hit a caption like their own
    assert {caption for (caption,) in captions[400:]} <= {caption for (caption,) in captions[:400]}
    assert right.image(7).tobytes() == wrong.image(7).tobytes() and right.key() != wrong.key()


def test_a_world_can_be_sent_to_a_process_that_is_not_forked():
    again = pickle.loads(pickle.dumps(World("base", 2, style="mixed")))
    assert again.captions(5) == World("base", 2, style="mixed").captions(5)


def test_years_give_pictures_dates_and_each_year_its_style():
    years = {2021: "plain", 2023: "noisy", 2024: "gray"}
    drifting = World("stars", split="test", per_concept=6, years=years)
    assert drifting.dates[:6].tolist() == ["2021", "2021", "2023", "2023", "2024", "2024"]
    for style, numbers in (("plain", (0, 1)), ("noisy", (2, 3)), ("gray", (4, 5))):
        whole = World("stars", split="test", per_concept=6, style=style)
        for index in (*numbers, *(6 * 9 + n for n in numbers)):
            assert drifting.image(index).tobytes() == whole.image(index).tobytes()
            assert drifting.captions(index) == whole.captions(index)
            assert drifting.id_of(index) == whole.id_of(index)
    assert drifting.key() != World("stars", split="test", per_concept=6).key()
    assert World("stars", split="test", per_concept=6).dates is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"years": {2021: "blue"}}, "years.2021: unknown 'blue' (did you mean blurred?), accepted: plain"),
        ({"years": {"May": "gray"}}, "years: got 'May', accepted: years, each with a style"),
        ({"years": {20210: "gray"}}, "years: got 20210"),
        ({"years": {2021: "gray"}, "style": "noisy"}, "style: years say the styles, leave it out"),
        ({"years": [2021]}, "years: expected named fields, got [2021]"),
    ],
)
def test_mistakes_in_years(fields, expected):
    assert expected in one_line(build, World, {"domain": "stars", "per_concept": 2, **fields})
