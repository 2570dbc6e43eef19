"""Data files: every mistake is one line that names the file and the field, paths are relative to the file."""

from pathlib import Path

import pytest
import torchvision.datasets
import yaml

from fomo.datasets.datafile import read
from tests.datasets.inputs import draw, one_line, samples
from tests.datasets.inputs import shard as write_shard

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "real.yaml"


def data_file(folder: Path, content: dict | str) -> Path:
    path = folder / "data.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def shard(folder: Path, name: str, count: int = 1) -> None:
    """Roses and tulips in turn."""
    write_shard(
        folder / name, samples(count, cls=lambda n: str(n % 2), txt=lambda n: ("rose", "tulip")[n % 2])
    )


def open_everything(path: Path) -> None:
    data = read(path)
    data.pool()
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        entry.open("train")
        entry.open("test")


FLOWERS = {"source": "webdataset", "train": "train.tar", "test": "test.tar"}


def learn(fields: dict) -> dict:
    """A data file with one set to learn: the flowers with these fields too."""
    return {"adaptation": {"x": FLOWERS | fields}}


def keep(**fields) -> dict:
    return {"evaluation": {"x": fields}}


def pool(**fields) -> dict:
    return {"pretraining": [fields]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"adaption": {}}, ["adaption", "did you mean adaptation", "evaluation"]),
        (learn({"source": "webdatset"}), ["adaptation.x.source", "mean webdataset"]),
        ({"adaptation": {"x": {"train": "train.tar"}}}, ["adaptation.x", "source"]),
        ({"adaptation": {"x": "train.tar"}}, ["adaptation.x", "train.tar"]),
        ({"adaptation": ["train.tar"]}, ["adaptation", "named fields", "train.tar"]),
        ({"evaluation": "test.tar"}, ["evaluation", "named fields", "test.tar"]),
        ({"pretraining": {"source": "world"}}, ["pretraining", "list", "world"]),
        (pool(source="wrld"), ["pretraining[0].source", "wrld", "mean world"]),
        ({"image_size": "64px"}, ["image_size", "64px"]),
        ({"image_size": True}, ["image_size", "True"]),
        ({"image_size": 0}, ["image_size", "0"]),
        (learn({"prompt": "a photo"}), ["adaptation.x.prompt", "a photo", "{}"]),
        (learn({"prompt": ["a {}", "b"]}), ["adaptation.x.prompt", "'b'"]),
        (learn({"prompt": 5}), ["adaptation.x.prompt", "5"]),
        (learn({"prompt": ["a {}", 5]}), ["adaptation.x.prompt", "5"]),
        ({"evaluation": {"x": FLOWERS | {"task": "retrival"}}}, ["evaluation.x.task", "mean retrieval"]),
        (learn({"promt": "a {}"}), ["adaptation.x.promt", "mean prompt"]),
        (learn({"year": "last"}), ["adaptation.x.year", "whole number", "last"]),
        (learn({"holdout": 0.5}), ["adaptation.x.holdout", "test is given too"]),
        ({"adaptation": {"x": {"source": "folder", "train": "a", "holdout": 0}}}, ["x.holdout", "0 and 1"]),
        ({"adaptation": {"x": {"source": "folder", "train": "a", "holdout": 1.5}}}, ["x.holdout", "0 and 1"]),
        ({"adaptation": {"x": {"source": "folder", "train": "a", "holdout": "a"}}}, ["x.holdout", "number"]),
        ({"adaptation": {"x": {"source": "folder", "holdout": 0.1}}}, ["adaptation.x.train", "missing"]),
        ({"evaluation": {"x": FLOWERS | {"holdout": 0.1}}}, ["evaluation.x.holdout", "unknown field"]),
        (keep(source="webdataset", tset="test.tar"), ["x.tset", "mean test"]),
        (pool(source="world", domains="base"), ["pretraining[0].domains", "mean domain"]),
        (keep(source="webdataset", train="train.tar"), ["evaluation.x.test", "missing"]),
        ({"adaptation": {"x": {"source": "webdataset"}}}, ["adaptation.x.train or test", "missing"]),
        (pool(source="webdataset"), ["pretraining[0].path", "missing"]),
        ({"cache": "sometimes"}, ["cache", "sometimes", "auto, always, never"]),
        (
            {"adaptation": {"x": {"source": "webdataset", "path": "a.tar"}}},
            ["adaptation.x.path", "learnt and tested on", "train and test"],
        ),
        (learn({"path": "a.tar"}), ["adaptation.x.path", "train and test"]),
        (
            {"adaptation": {"x": {"source": "world", "domain": "digits", "train": 4, "split": "train"}}},
            ["adaptation.x.split", "train and test"],
        ),
        (learn({"weight": 2}), ["adaptation.x.weight", "unknown field"]),
        (pool(source="webdataset", path="a.tar", weight=0), ["pretraining[0].weight", "0", "more than 0"]),
        (pool(source="webdataset", path="a.tar", limit="many"), ["pretraining[0].limit", "whole number"]),
        (pool(source="webdataset", path="a.tar", limit=0), ["pretraining[0].limit", "at least 1"]),
        (
            {"adaptation": {"x": FLOWERS}, "evaluation": {"x": FLOWERS}},
            ["evaluation.x", "adaptation", "name"],
        ),
    ],
)
def test_mistakes_are_found_when_the_file_is_read(tmp_path, content, expected):
    path = data_file(tmp_path, content)
    message = one_line(read, path)
    assert message.startswith(f"{path}: ")
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (learn({"train": "gone.tar"}), ["adaptation.x", "gone.tar", "no such"]),
        (learn({"train": 5}), ["adaptation.x.train", "text", "5"]),
        (learn({"classes_file": "gone.txt"}), ["adaptation.x", "gone.txt"]),
        (pool(source="webdataset", path="gone.tar"), ["pretraining[0]", "gone.tar"]),
        (keep(source="world", test=4), ["evaluation.x.domain", "missing"]),
        (keep(source="world", domain="digit", test=4), ["evaluation.x.domain", "did you mean digits"]),
        (keep(source="world", domain="digits", test="many"), ["evaluation.x.test", "whole number", "many"]),
        (keep(source="torchvision", name="Mnist", root="."), ["evaluation.x", "'Mnist'"]),
    ],
)
def test_mistakes_in_what_a_source_is_told_are_found_when_it_is_opened(tmp_path, content, expected):
    shard(tmp_path, "train.tar")
    shard(tmp_path, "test.tar")
    path = data_file(tmp_path, content)
    message = one_line(open_everything, path)
    assert message.startswith(f"{path}: ")
    for part in expected:
        assert part in message


def test_a_missing_file_and_a_file_that_is_no_yaml_are_one_line(tmp_path):
    assert "no such file" in one_line(read, tmp_path / "none.yaml")
    path = data_file(tmp_path, "adaptation: {x: [")
    assert one_line(read, path).startswith(f"{path}: not valid YAML")
    path = data_file(tmp_path, "- a list")
    assert str(path) in one_line(read, path)


def test_an_unset_variable_is_named_and_a_set_one_expands(tmp_path, monkeypatch):
    shard(tmp_path / "there", "train.tar", 3)
    fields = {"source": "webdataset", "test": "${NO_SUCH_FOLDER}/train.tar"}
    path = data_file(tmp_path, {"evaluation": {"x": fields}})
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    message = one_line(open_everything, path)
    assert (
        message.startswith(f"{path}: evaluation.x: ") and "NO_SUCH_FOLDER" in message and "not set" in message
    )
    monkeypatch.setenv("NO_SUCH_FOLDER", str(tmp_path / "there"))
    assert len(read(path).evaluation["x"].open("test")) == 3


@pytest.mark.parametrize("name", ["pay$day", "$HOME", "$(date)", "a${b", "%TEMP%"])
def test_what_is_no_variable_in_braces_is_a_name(tmp_path, name):
    shard(tmp_path / name, "train.tar", 3)
    path = data_file(tmp_path, {"evaluation": {"x": {"source": "webdataset", "test": f"{name}/train.tar"}}})
    assert len(read(path).evaluation["x"].open("test")) == 3


def test_what_is_learned_and_has_no_test_split_gives_a_tenth(tmp_path):
    shard(tmp_path, "train.tar", 40)
    fields = {"source": "webdataset", "train": "train.tar"}
    entry = read(data_file(tmp_path, {"adaptation": {"x": fields}})).adaptation["x"]
    explicit = read(data_file(tmp_path, {"adaptation": {"x": fields | {"holdout": 0.1}}})).adaptation["x"]
    assert len(entry.open("train")) + len(entry.open("test")) == 40
    assert entry.open("test").key() == explicit.open("test").key()


def test_paths_are_relative_to_the_data_file_wherever_one_stands(tmp_path, monkeypatch):
    shard(tmp_path / "home" / "pictures", "train.tar", 5)
    (tmp_path / "home" / "names.txt").write_text("rosa\ntulipa\n")
    fields = {"source": "webdataset", "test": "pictures/train.tar", "classes_file": "names.txt"}
    path = data_file(tmp_path / "home", {"evaluation": {"x": fields}})
    (tmp_path / "elsewhere").mkdir()
    for place, name in ((tmp_path / "elsewhere", path), (tmp_path, Path("home/data.yaml"))):
        monkeypatch.chdir(place)
        source = read(name).evaluation["x"].open("test")
        assert len(source) == 5
        assert source.classes == ["rosa", "tulipa"]


def test_the_root_of_a_torchvision_set_is_relative_to_the_data_file(tmp_path, monkeypatch):
    class Rooted(torchvision.datasets.VisionDataset):
        classes, targets = ("a", "b"), (0, 1)

        def __init__(self, root, train=True):
            super().__init__(root)
            self.train = train

    monkeypatch.setattr(torchvision.datasets, "Rooted", Rooted, raising=False)
    fields = {"source": "torchvision", "name": "Rooted", "root": "sets"}
    entry = read(data_file(tmp_path, {"evaluation": {"x": fields}})).evaluation["x"]
    assert entry.open("test").dataset.root == str(tmp_path / "sets")
    assert (entry.open("train").dataset.train, entry.open("test").dataset.train) == (True, False)


def test_train_and_test_of_the_world_are_numbers_of_pictures(tmp_path):
    fields = {"source": "world", "domain": "digits", "train": 3, "test": 2}
    entry = read(data_file(tmp_path, {"adaptation": {"x": fields}})).adaptation["x"]
    train, test = entry.open("train"), entry.open("test")
    assert (len(train), len(test)) == (30, 20)
    assert (train.split, test.split) == ("train", "test")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a {}.", ("a {}.",)),
        (["a {}.", "the {}."], ("a {}.", "the {}.")),
        (None, ("a photo of a {}.",)),
    ],
)
def test_prompts_come_from_the_data_file_or_are_the_sources(tmp_path, prompt, expected):
    shard(tmp_path, "train.tar", 4)
    fields = {"source": "webdataset", "train": "train.tar"} | ({"prompt": prompt} if prompt else {})
    path = data_file(tmp_path, {"adaptation": {"x": fields}})
    assert read(path).adaptation["x"].open("train").prompts == expected


def test_the_data_file_of_the_real_pictures_opens_completely(real_data):
    data = read(REAL)
    assert [len(source) for source in data.pool()] == [26, 414, 494, 60]
    sizes = {}
    for entry in [*data.adaptation.values(), *data.evaluation.values()]:
        splits = [entry.open(split) for split in ("train", "test")]
        sizes[entry.name] = tuple(None if source is None else len(source) for source in splits)
        for source in filter(None, splits):
            assert source.image(0).size[0] > 0
            assert bool(source.classes) == (entry.task == "classification")
    assert sizes == {
        "flowers": (300, 100),
        "grocery": (430, 172),
        "omniglot": (560, 240),
        "bccd": (210, 75),
        "pets": (180, 60),
        "plantvillage": (180, 60),
        "mednist": (299, 120),
        "fashion_mnist": (1700, 1000),
        "mnist": (3000, 1000),
        "eurosat": (None, 200),
        "caltech101": (None, 160),
        "coco": (None, 25),
        "nlvr": (None, 239),
        "emoji": (None, 120),
        "grocery_captions": (None, 21),
    }


def test_shards_may_be_a_list_and_a_range_and_lie_on_the_hub(tmp_path, monkeypatch):
    for n in range(3):
        shard(tmp_path / "in", f"{n:03d}.tar", 2)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, file, **_: str(tmp_path / "in" / file)
    )
    fields = {"source": "webdataset", "test": ["in/{000..001}.tar", "hf://datasets/o/r/002.tar"]}
    source = read(data_file(tmp_path, {"evaluation": {"x": fields}})).evaluation["x"].open("test")
    assert len(source) == 6 and source.captions(5) == ["tulip"]


def test_pools_have_weights_and_limits_and_the_files_cache(tmp_path):
    shard(tmp_path, "a.tar", 40)
    pool = [{"source": "webdataset", "path": "a.tar", "weight": 2, "limit": 7}, {"source": "webdataset"}]
    pool[1] |= {"path": "a.tar", "limit": 100}
    data = read(data_file(tmp_path, {"cache": "never", "pretraining": pool}))
    limited, whole = data.pool()
    assert (len(limited), len(whole)) == (7, 40)
    assert (limited.weight, whole.weight) == (2, 1)
    assert limited.cache == whole.cache == "never"
    assert limited.key() != whole.key()
    captions = [whole.captions(i) for i in limited.numbers]
    assert [limited.captions(i) for i in range(7)] == captions
    assert limited.caption_counts().tolist() == [1] * 7 and limited.image(6).size == (8, 6)
    again = read(data.path).pool()[0]
    assert again.numbers.tolist() == limited.numbers.tolist()


def test_train_and_test_agree_on_their_classes(tmp_path):
    for split, names in (("train", ("ant", "cat", "dog")), ("test", ("dog", "eel"))):
        for name in names:
            draw(tmp_path / split / name / "1.png")
    fields = {"source": "folder", "train": "train", "test": "test"}
    entry = read(data_file(tmp_path, {"adaptation": {"x": fields}})).adaptation["x"]
    train, test = entry.open("train"), entry.open("test")
    assert train.classes == test.classes == ["ant", "cat", "dog", "eel"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2], [2, 3])


def test_what_a_source_leaves_out_is_said_once(tmp_path, capsys):
    for name in ("cat/1.png", "stray.png"):
        draw(tmp_path / "in" / name)
    path = data_file(tmp_path, {"evaluation": {"x": {"source": "folder", "test": "in"}}})
    for _ in range(2):
        read(path).evaluation["x"].open("test")
    err = capsys.readouterr().err
    assert err.count("evaluation.x (test): 1 picture is in no class folder, first: stray.png") == 1


def test_mtil_is_zscls_eleven_sets_in_its_order():
    data = read(ROOT / "recipes" / "data" / "mtil.yaml")
    names = "aircraft caltech101 cifar100 dtd eurosat flowers food101 mnist pets cars sun397"
    assert " ".join(sorted(data.adaptation, key=lambda name: data.adaptation[name].spec["year"])) == names
    assert all(entry.has("train") and entry.has("test") for entry in data.adaptation.values())
