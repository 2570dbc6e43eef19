"""One data file with every source goes through a whole run, with a cache and without one to the same end."""

import json
import runpy
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets
import yaml
from click.testing import CliRunner

from fomo.datasets.datafile import SOURCES, read
from tests.datasets.inputs import draw, encoded, noise, shard, table

ROOT = Path(__file__).parents[3]


class Shapes(torchvision.datasets.VisionDataset):
    """A set that torchvision is made to know."""

    classes, targets = ("circle", "square"), (0, 1) * 4

    def __init__(self, root, train=True):
        super().__init__(root)

    def __getitem__(self, index):
        return noise(index, 40, 32), index % 2


def numbered(count: int, first: int = 0, **texts) -> dict[str, str | bytes]:
    """Members of a shard."""
    members = {f"{i}.png": encoded(noise(first + i, 40, 32)) for i in range(count)}
    return members | {f"{i}.{suffix}": text(i) for suffix, text in texts.items() for i in range(count)}


def everything(root: Path) -> dict:
    """A data file of all sources."""
    for split in ("train", "test"):
        shard(root / "cb" / split / "0.tar", numbered(6, 10 * len(split), cls=lambda i: str(i % 2)))
        (root / "cb" / split / "nshards.txt").write_text("1")
        entries = {}
        for i in range(6):
            for folder in (root / "pets" / split / ("cat", "dog")[i % 2], root / "flux" / "TOYS" / split):
                draw(folder / f"{i}.png", noise(i + 100 * (split == "test"), 40, 32))
            texts = {"default_caption": None, "synthetic_merged_caption": [f"toy {i}", f"a toy, {i}"]}
            entries[f"{split}/{i}.png"] = texts | {"classname": ("car", "doll")[i % 2], "target": i % 2}
            entries[f"{split}/{i}.png"]["primer_caption"] = "a toy"
        (root / "flux" / f"TOYS_{split}.json").write_text(json.dumps(entries))
        for form, separator in (("csv", ","), ("tsv", "\t")):
            rows = [[f"pets/{split}/cat/{i}.png", f"picture {i}", "ab"[i // 2]] for i in (0, 2)]
            table(root / f"{split}.{form}", [["filepath", "title", "kind"], *rows], separator)
        rows = [
            {"file_name": f"pets/{split}/dog/{i}.png", "text": f"dog {i}", "kind": "cd"[i // 3]}
            for i in (1, 3)
        ]
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pictures = [{"bytes": encoded(noise(50 + i, 40, 32)), "path": None} for i in range(4)]
        pq.write_table(pa.table({"image": pictures, "kind": ["e", "f"] * 2}), root / f"{split}.parquet")
    (root / "cb" / "classnames.txt").write_text("banded\nblotchy\n")
    shard(root / "pool" / "0.tar", numbered(5, txt=lambda i: f"number {i}"))
    shard(root / "pool" / "1.tar", numbered(5, txt=lambda i: f"number {5 + i}"))
    return {
        "image_size": 32,
        "pretraining": [
            {"source": "webdataset", "path": "pool/{0..1}.tar", "weight": 2, "limit": 8},
            {"source": "tsv", "path": "train.tsv"},
        ],
        "adaptation": {
            "digits": {"source": "world", "domain": "digits", "concepts": 2, "train": 3, "test": 2},
            "shapes": {"source": "torchvision", "name": "Shapes", "root": "."},
            "pets": {"source": "folder", "train": "pets/train", "test": "pets/test"},
            "shop": {"source": "csv", "train": "train.csv", "test": "test.csv", "concept": "kind"},
            "words": {"source": "json", "train": "train.jsonl", "test": "test.jsonl", "concept": "kind"},
            "rows": {
                "source": "parquet",
                "train": "train.parquet",
                "test": "test.parquet",
                "concept": "kind",
                "caption": None,
            },
            "textures": {"source": "clip_benchmark", "root": "cb"},
            "toys": {"source": "fomo_in_flux", "root": "flux", "folder": "TOYS"},
        },
        "evaluation": {"held": {"source": "webdataset", "test": "pool/1.tar", "task": "retrieval"}},
    }


@pytest.fixture
def content(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(torchvision.datasets, "Shapes", Shapes, raising=False)
    Shapes.__len__ = lambda self: 8
    return everything(tmp_path)


def test_every_source_opens_from_one_file(tmp_path, content):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    data = read(tmp_path / "data.yaml")
    entries = [*data.pretraining, *data.adaptation.values(), *data.evaluation.values()]
    assert {entry.spec["source"] for entry in entries} == set(SOURCES)
    for entry in entries:
        for split in ("train", "test"):
            source = entry.open(split)
            if source is not None:
                assert len(source.labels) == len(source) == len(source.caption_counts()) > 0
                assert source.caption_counts().tolist() == [
                    len(source.captions(i)) for i in range(len(source))
                ]
                assert source.image(len(source) - 1).size[0] > 0 and source.key() and source.name_of(0)
                assert source.labels.max() < len(source.classes) or source.labels.max() == -1


def test_a_run_over_every_source_ends_alike_with_and_without_a_cache(tmp_path, content, small_scale):
    cli, runs = runpy.run_path(str(ROOT / "fomo.py"))["cli"], {}
    for keep in ("always", "never"):
        path = tmp_path / f"{keep}.yaml"
        path.write_text(yaml.safe_dump(content | {"cache": keep}))
        out = tmp_path / keep
        arguments = ["update", "--recipe", str(ROOT / "recipes" / "finetune.yaml"), "--out", str(out)]
        arguments += ["--data", str(path), "--scale", str(small_scale), "--set", "mixture.limit=5"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        runs[keep] = [(line["ka"], line["zs"], line["datasets"]) for line in lines]
        runs[keep].append((out / "weights" / "update_003.safetensors").read_bytes())
    assert runs["always"] == runs["never"]
