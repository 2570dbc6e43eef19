"""The catalogue: its numbers against the paper's tables, and what a data file gets from it."""

import inspect
import json
import re
import runpy
from pathlib import Path

import pytest
import torchvision.datasets
from click.testing import CliRunner

from fomo.datasets.datafile import read
from fomo.datasets.sources.catalogue import catalogue, find, listing, with_catalogue
from fomo.errors import FieldError, UserError

ROOT = Path(__file__).parents[3]
PAPER = ROOT.parent / "shared" / "paper.md"
STREAMS = ROOT.parent / "shared" / "fomo_in_flux" / "streams"
HUB = ROOT.parent / "shared" / "hub-data.md"
ROWS = list(catalogue().values())
ADAPTATION, EVALUATION = ([r for r in ROWS if r.role == role] for role in ("adaptation", "evaluation"))


def shared(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path.read_text()


def paper_rows() -> dict[str, list[str]]:
    """Loader name -> the cells of its line in the tables of sections 2.1 and 2.2."""
    text = shared(PAPER)
    tables = text[text.index("### 2.1") : text.index("**torchvision** [")]
    lines = re.findall(r"^\|(.*?\(`(\w+)`\).*)\|$", tables, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for cells, name in lines if name != "loader"}


def test_there_are_41_to_learn_and_22_to_keep_in_the_order_of_the_paper():
    assert (len(ADAPTATION), len(EVALUATION)) == (41, 22)
    assert list(catalogue()) == [row.name for row in ADAPTATION + EVALUATION] == list(paper_rows())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_the_papers(row):
    cells = paper_rows()[row.name]
    assert cells[0].startswith(row.title)
    classes = str(row.classes) + (f" ({row.in_stream})" if row.in_stream not in (None, row.classes) else "")
    assert cells[1:5] == [str(row.train), str(row.test), classes, row.domain]
    if row.role == "adaptation":
        assert cells[5:8] == [row.captions, row.prompt, str(row.year_group)]
    else:
        assert cells[5] == row.prompt and row.year_group is None and row.in_stream is None
    assert ("retrieval" in cells[0]) == (row.task == "retrieval") == (row.metric == "recall@5")
    assert cells[-1].split(" ")[0] == (row.torchvision or "-")


def test_the_papers_checksums():
    assert sum(r.train for r in ADAPTATION) == 1_759_790
    assert sum(r.test for r in ADAPTATION) == 453_062
    assert sum(r.test for r in EVALUATION) == 314_419
    assert sum(r.train + r.test for r in ADAPTATION) + sum(r.test for r in EVALUATION) == 2_527_271
    assert (sum(r.classes for r in ADAPTATION), sum(r.classes for r in EVALUATION)) == (18_392, 4_653)
    assert sum(r.in_stream for r in ADAPTATION) == 18_381


def test_folders_and_classes_are_those_of_the_official_streams():
    lines = json.loads(shared(STREAMS / "random_sequence_1.json"))
    counts: dict[str, int] = {}
    for line in lines:
        folder = line.partition("+++")[0]
        counts[folder] = counts.get(folder, 0) + 1
    assert counts == {row.folder: row.in_stream for row in ADAPTATION}
    assert len({row.folder for row in ROWS}) == 63


def test_year_groups_are_the_order_of_the_official_time_stream():
    groups = {row.folder: row.year_group for row in ADAPTATION}
    lines = json.loads(shared(STREAMS / "time_incremental_rsagg_1.json"))
    order = [groups[line.partition("+++")[0]] for line in lines]
    assert order == sorted(order) and set(order) == set(range(1, 16))
    assert [find(name).year for name in ("flowers102", "ai2diagrams", "quilt")] == [2008, 2016, 2023]


def test_clip_benchmark_names_exist_and_each_says_whether_its_splits_are_the_papers():
    names = set(re.findall(r"[\w/-]+", shared(HUB).split("NAMEs: `")[1].split("`")[0]))
    for row in ROWS:
        assert not row.clip_benchmark or row.clip_benchmark in names
        assert bool(row.clip_benchmark) == bool(row.clip_benchmark_splits)
    # 18 held-out sets fetch themselves; two of them only through torchvision
    fetched = [
        row.name for row in EVALUATION if row.clip_benchmark or row.name in ("fashionmnist", "food101")
    ]
    assert len(fetched) == 18


def test_torchvision_has_every_name_and_takes_every_split_that_the_table_says():
    for row in ROWS:
        if row.torchvision:
            cls = getattr(torchvision.datasets, row.torchvision)
            assert row.split_rule
            if row.train_split:
                parameters = inspect.signature(cls.__init__).parameters
                known = {"train", "test"} if "train" in parameters else set(splits_of(cls))
                assert {row.train_split, row.test_split} <= known, row.name


def splits_of(cls) -> list[str]:
    return re.findall(r'"(\w+)"', inspect.getsource(cls).split("def __getitem__")[0])


def test_flowers_are_swapped_and_sets_with_splits_of_their_own_have_none_in_torchvision():
    spec = with_catalogue({"source": "torchvision", "root": ".", "dataset": "flowers102"}, "a.x")
    assert (spec["name"], spec["train"], spec["test"]) == ("Flowers102", "test", "train")
    for name in ("eurosat", "gtsrb", "caltech101", "caltech256", "sun397", "inaturalist2021"):
        with pytest.raises(FieldError, match=r"a\.x\.source: torchvision .* lacks the paper's splits"):
            with_catalogue({"source": "torchvision", "root": ".", "dataset": name}, "a.x")
    given = {"source": "torchvision", "root": ".", "dataset": "gtsrb", "test": "test"}
    assert with_catalogue(given, "a.x")["name"] == "GTSRB"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"source": "clip_benchmark"}, {"name": "vtab/dtd", "task": "classification", "year": 2014}),
        ({"source": "torchvision", "root": "."}, {"name": "DTD", "train": "train", "test": "test"}),
        ({"source": "fomo_in_flux", "root": "."}, {"folder": "DTD", "prompt": "A photo of a {} texture."}),
        (
            {"source": "webdataset", "train": "a.tar"},
            {"prompt": "A photo of a {} texture.", "train": "a.tar"},
        ),
        ({"source": "clip_benchmark", "prompt": "{}!", "year": 1999}, {"prompt": "{}!", "year": 1999}),
    ],
)
def test_an_entry_gets_what_it_does_not_say_itself(spec, expected):
    found = with_catalogue({"dataset": "dtd", **spec}, "adaptation.x")
    assert expected.items() <= found.items()
    assert with_catalogue(spec, "adaptation.x") == spec  # without `dataset:` nothing is added


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("DTD", "dtd"), ("cub", "cub200"), ("SNAKECLEF", "snake_clef"), ("Quilt-1M", "quilt")],
)
def test_an_unknown_name_suggests_the_nearest_by_name_folder_or_title(name, nearest):
    with pytest.raises(FieldError, match=f"adaptation.x.dataset: '{name}' .*did you mean {nearest}"):
        with_catalogue({"source": "webdataset", "train": "a.tar", "dataset": name}, "adaptation.x")


@pytest.mark.parametrize("wrong", ["zzzzzz", 5, ["dtd"], None])
def test_a_name_that_resembles_nothing_says_where_the_names_are(wrong):
    with pytest.raises(FieldError, match="data list"):
        find(wrong)


def test_an_exported_folder_of_clip_benchmark_is_not_fetched_from_the_hub():
    assert "name" not in with_catalogue({"source": "clip_benchmark", "root": "x", "dataset": "dtd"}, "a.x")


def test_a_source_that_lacks_the_set_is_refused():
    with pytest.raises(FieldError, match="clip_benchmark has no CUB200-2011"):
        with_catalogue({"source": "clip_benchmark", "dataset": "cub200"}, "adaptation.x")


@pytest.mark.parametrize(("name", "counts"), [("fomo_in_flux", (41, 22)), ("hub", (7, 18))])
def test_the_data_files_of_b16_and_b32_can_be_read(name, counts):
    data = read(ROOT / "recipes" / "data" / f"{name}.yaml")
    assert (len(data.adaptation), len(data.evaluation)) == counts
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        row = find(entry.spec["dataset"])
        assert (entry.role, entry.name, entry.task) == (row.role, row.name, row.task)


def test_data_list_prints_the_rows_and_the_sums():
    result = CliRunner().invoke(runpy.run_path(str(ROOT / "fomo.py"))["cli"], ["data", "list"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split()[:6] == ["dataset", "folder", "role", "train", "test", "classes"]
    assert [line.split()[0] for line in lines[1:64]] == list(catalogue())
    assert lines[1].split()[1:6] == ["AI2DIAGRAMS", "adaptation", "2,720", "681", "15"]
    assert "41 adaptation: 1,759,790 train, 453,062 test, 18,392 classes" in lines
    assert any(line.startswith("22 evaluation:") and "314,419 test, 4,653 classes" in line for line in lines)


def test_data_list_says_what_is_under_a_root(tmp_path):
    (tmp_path / "DTD").mkdir()
    (tmp_path / "CUB200").mkdir()
    (tmp_path / "DTD_train.json").write_text("{}")
    (tmp_path / "DTD" / "DTD_test_224.json").write_text("{}")
    text = listing(str(tmp_path))
    by_name = {line.split()[0]: line for line in text.splitlines() if line}
    assert by_name["dtd"].endswith("train test_224")
    assert by_name["cub200"].endswith("pictures, no info file")
    assert by_name["flickr30k"].endswith("-")
    assert f"2 of 63 are under {tmp_path}" in text
    with pytest.raises(UserError, match="no such directory"):
        listing(str(tmp_path / "gone"))
