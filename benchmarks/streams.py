"""How long the orders take over the 18,381 concepts of the official streams, and similarity at their size.

    python benchmarks/streams.py [STREAM.json]   # default: the random one of ../shared/fomo_in_flux

Targets: random, frequency, time and dataset under 2 s; similarity (18,381 embeddings of 512 numbers, 64 starts)
under 60 s on 2 cores and 4 GB. The embeddings are random: the work is the same for any.
"""

import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fomo.datasets.datafile import DataFile, Entry  # noqa: E402
from fomo.datasets.orders import STARTS, Context, lightest_path, make_stream  # noqa: E402
from fomo.datasets.sources.catalogue import catalogue  # noqa: E402
from fomo.datasets.stream import Concept, read_stream  # noqa: E402
from fomo.recipe import Stream  # noqa: E402

OFFICIAL = ROOT.parent / "shared" / "fomo_in_flux" / "streams" / "random_sequence_1.json"


def official(path: Path) -> tuple[list[Concept], DataFile]:
    """The concepts of a stream file, and a data file of their datasets."""
    rows = {row.folder: row for row in catalogue().values()}
    labels: dict[str, int] = defaultdict(int)
    concepts, entries = [], {}
    for line in read_stream(path):
        folder, _, name = line.partition("+++")
        row = rows[folder]
        spec = {"source": "fomo_in_flux", "dataset": row.name, "year": row.year}
        entries[row.name] = Entry(row.name, "adaptation", spec, path)
        concepts.append(Concept(row.name, labels[row.name], name, row.prompt))
        labels[row.name] += 1
    return concepts, DataFile(path, None, [], entries, {})


def main(path: Path) -> None:
    concepts, data = official(path)
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        counts.write_text(json.dumps({c.name: len(c.name) for c in concepts}))
        for order in ("random", "frequency", "time", "dataset", "file"):
            chosen = {"file": str(path)} if order == "file" else {"order": order}
            how = Stream(**chosen, counts=str(counts) if order == "frequency" else None)
            start = time.perf_counter()
            make_stream(concepts, Context(how, 0, data, load=lambda: None))
            print(f"{order:10} {len(concepts):,} concepts {time.perf_counter() - start:8.2f} s")
    features = np.random.default_rng(0).standard_normal((len(concepts), 512), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    start = time.perf_counter()
    lightest_path(features, STARTS, seed=0)
    print(
        f"similarity {len(concepts):,} embeddings of 512, {STARTS} starts {time.perf_counter() - start:8.2f} s"
    )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OFFICIAL)
