"""The layout that CLIP_benchmark exports (clip_benchmark_export_wds) and hosts on the hub."""

from dataclasses import dataclass
from pathlib import Path

from fomo.datasets.sources.hub import fetch, fetch_text
from fomo.datasets.sources.webdataset import Shards
from fomo.errors import UserError


@dataclass
class ClipBenchmark(Shards):
    """`name: vtab/dtd` on the hub, or `root: DIR`, with SPLIT/nshards.txt, SPLIT/0.tar, ..., classnames.txt."""

    name: str | None = None
    root: str | None = None
    split: str = "train"
    split_field = "split"

    def __post_init__(self):
        if (self.name is None) == (self.root is None):
            raise UserError("say either name (of a set on the hub, as vtab/dtd) or root (a folder)")
        base = self.root or f"hf://datasets/clip-benchmark/wds_{self.name.replace('/', '-')}"
        if self.root and not Path(self.root).is_dir():
            raise UserError(f"{self.root}: no such folder")
        paths = [f"{base}/{self.split}/{i}.tar" for i in range(self.count(base))]
        retrieval = (fetch_text(f"{base}/dataset_type.txt") or "").strip() == "retrieval"
        names = None if retrieval else f"{base}/classnames.txt"
        self.open_shards(paths, fetch(names) if names and fetch_text(names) is not None else None)
        templates = (fetch_text(f"{base}/zeroshot_classification_templates.txt") or "").splitlines()
        self.prompts = tuple(t.replace("{c}", "{}").strip() for t in templates if "{c}" in t) or self.prompts

    def count(self, base: str) -> int:
        """How many shards the split has."""
        file = f"{base}/{self.split}/nshards.txt"
        text = fetch_text(file)
        if text is None:
            raise UserError(f"{file}: no such file, so there is no {self.split} split of this layout")
        if not text.strip().isdigit() or not int(text):
            raise UserError(f"{file}: expected the number of shards, got {text.strip()[:40]!r}")
        return int(text)
