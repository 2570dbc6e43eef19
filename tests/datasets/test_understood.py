"""What is said before training, and what is refused."""

import pytest
import yaml

from fomo.datasets.datafile import read
from fomo.datasets.understood import copies, leaks, open_all, opened_and_said, overlaps, problems, understood
from tests.datasets.inputs import draw, encoded, gray, noise, one_line, samples, write
from tests.datasets.inputs import shard as write_shard


def written(folder, **content):
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content))
    return read(file)


def folders(root, first=0, count=4, names=("cat", "dog")):
    for k, name in enumerate(names):
        for i in range(count):
            draw(root / name / f"{i}.png", noise(first + 100 * k + i))


def test_a_line_for_each_dataset_with_its_use(tmp_path):
    folders(tmp_path / "pets", count=10)
    write_shard(tmp_path / "pool.tar", samples(5, txt=lambda i: f"picture {i}"))
    write_shard(tmp_path / "held.tar", samples(range(10, 13), txt=lambda i: f"thing {i}"))
    data = written(
        tmp_path,
        pretraining=[{"source": "webdataset", "path": "pool.tar"}],
        adaptation={
            "pets": {"source": "folder", "train": "pets"},
            "digits": {"source": "world", "domain": "digits", "train": 3, "test": 2},
        },
        evaluation={"held": {"source": "webdataset", "test": "held.tar", "task": "retrieval"}},
    )
    train, test = (read(data.path).adaptation["pets"].open(split) for split in ("train", "test"))
    lines = list(understood(data, open_all(data)))
    assert lines[0] == "data.yaml: 1 set of rendered pictures (digits)"
    assert lines[1] == "pretraining[0]: 5 pictures with captions ('picture 0', ...); replayed"
    assert lines[2].startswith("pets: 2 classes of 10 pictures (cat: ")
    assert lines[2].endswith(
        f"; {len(train)} pictures to learn from, {len(test)} to test on (10% of every class, held out)"
    )
    assert lines[3] == "held: 3 pictures with captions ('thing 10', ...); 3 pictures scored, never trained on"


def test_one_class_is_refused_unless_it_is_accepted(tmp_path):
    folders(tmp_path / "pets", names=("cat",))
    entry = {"source": "folder", "train": "pets"}
    message = one_line(opened_and_said, written(tmp_path, adaptation={"pets": entry}))
    assert "adaptation.pets: one class only (cat)" in message and "`one_class: true`" in message
    opened = open_all(written(tmp_path, adaptation={"pets": entry | {"one_class": True}}))
    assert not list(problems(opened, overlaps(opened)))
    held = {"source": "folder", "test": "pets"}
    assert "evaluation.pets: one class" in one_line(
        opened_and_said, written(tmp_path, evaluation={"pets": held})
    )


def test_a_test_split_that_is_trained_on_is_refused_and_a_part_of_it_is_warned_of(tmp_path, capsys):
    folders(tmp_path / "train")
    folders(tmp_path / "test", first=500)
    entry = {"source": "folder", "train": "train", "test": "train"}
    message = one_line(opened_and_said, written(tmp_path, adaptation={"pets": entry}))
    assert "every test picture is also trained on, first: " in message and "leave `test` out" in message
    (tmp_path / "test/cat/again.png").write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    data = written(tmp_path, adaptation={"pets": entry | {"test": "test"}})
    (leak,) = leaks(overlaps(open_all(data)))
    assert leak.startswith("adaptation.pets: 1 of 9 test pictures also trained on in pets, first: ")
    assert leak.endswith("again.png")
    opened_and_said(data)
    assert f"warning: {leak}" in capsys.readouterr().err


def test_copies_are_found_in_shards_and_other_sets_too(tmp_path):
    write_shard(tmp_path / "a.tar", samples(6, cls=lambda i: str(i % 2), txt=lambda i: f"thing {i % 2}"))
    write(
        tmp_path / "other",
        {f"{c}/{n}.png": encoded(gray(10 * n + k)) for k, c in enumerate("xy") for n in (1, 2)},
    )
    write(tmp_path / "other", {"x/3.png": encoded(gray(3))})
    data = written(
        tmp_path,
        adaptation={
            "a": {"source": "webdataset", "train": "a.tar"},
            "o": {"source": "folder", "train": "other"},
        },
        evaluation={"e": {"source": "webdataset", "test": "a.tar"}},
    )
    said = list(leaks(overlaps(open_all(data))))
    train, test = (read(data.path).adaptation["a"].open(split) for split in ("train", "test"))
    assert f"evaluation.e: {len(train)} of 6 test pictures also trained on in a" in said[-2]
    assert said[-1].startswith("evaluation.e: 1 of 6 test pictures also trained on in o, first: ")
    assert not copies(test, train)


def test_classes_that_do_not_meet_are_refused(tmp_path):
    folders(tmp_path / "train")
    folders(tmp_path / "test", first=500, names=("emu", "yak"))
    entry = {"source": "folder", "train": "train", "test": "test"}
    message = one_line(opened_and_said, written(tmp_path, adaptation={"pets": entry}))
    assert "no class of test is one of train (emu, yak)" in message


@pytest.mark.parametrize("broken", [b"", b"not a picture"])
def test_pictures_that_cannot_be_read_are_no_copies_of_each_other(tmp_path, broken):
    folders(tmp_path / "train")
    folders(tmp_path / "test", first=500)
    for split in ("train", "test"):
        (tmp_path / split / "cat/x.png").write_bytes(broken)
    entry = {"source": "folder", "train": "train", "test": "test"}
    found = list(leaks(overlaps(open_all(written(tmp_path, adaptation={"pets": entry})))))
    assert len(found) == 1  # the same bytes are a copy, whatever they are
