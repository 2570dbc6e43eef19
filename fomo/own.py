"""Your own pictures in one line: `update --data photos/` teaches them in one update, by the guide's advice.

What a recipe leaves open is chosen by the size of the data, in place of the scale's choice: a batch that is a
quarter of it or less, a peak learning rate scaled to the batch, and as many steps as show each picture ten times,
the paper's length of a finetuning on a single dataset (section 3.4).
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fomo.datasets import datafile
from fomo.datasets.infer import as_data_file
from fomo.datasets.stream import concepts_of
from fomo.recipe import Recipe, load
from fomo.run import refuse_used

PASSES = 10
BATCHES = (16, 512)  # smallest and largest
KEEP = 0.5  # of the original in the one merge there is; its whole curve is in the report


def is_data_file(path: str) -> bool:
    return Path(path).suffix in (".yaml", ".yml")


def fitted(file: Path) -> dict:
    """What a scale would say, for the pictures of a data file without a pretraining pool."""
    pictures = sum(concepts_of(datafile.read(file))[1])
    smallest, largest = BATCHES
    batch = min(max(2 ** int(math.log2(max(pictures / 4, 1))), smallest), largest)
    return {
        "stream": {"updates": 1},
        "optimizer": {"batch_size": batch},
        "budget": {"steps": math.ceil(PASSES * pictures / batch)},
        "defaults": {"keep": KEEP},
    }


@contextmanager
def settled(
    path: str | Path, out: str | None, resume: bool, dry: bool, data: str | None, **said
) -> Iterator[tuple[Recipe, Path]]:
    """The recipe and the run folder of an update; for a folder of pictures, with a data file inferred into it."""
    if data is None or is_data_file(data):
        recipe = load(path, data=data, **said)
        yield recipe, Path(out) if out else default_folder(path, recipe, data)
        return
    folder = Path(out) if out else Path("runs") / Path(data).resolve().stem
    with tempfile.TemporaryDirectory() as nowhere:
        place = Path(nowhere) if dry else folder
        file = place / "data.yaml"
        refuse_used(place, resume)
        if not (resume and file.exists()):  # else it may have been edited
            as_data_file(data, place)
        yield load(path, data=str(file), fitted=fitted(file), **said), folder


def default_folder(recipe_path: str | Path, recipe: Recipe, data: str | None) -> Path:
    parts = [Path(recipe_path).stem, Path(recipe.scale).stem, *([Path(data).stem] if data else [])]
    return Path("runs") / "-".join([*parts, f"seed{recipe.seed}"])
