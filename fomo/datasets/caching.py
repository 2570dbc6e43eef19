"""`python fomo.py data cache`: make the pixel caches of a data file before anything needs them."""

from pathlib import Path

import open_clip

from fomo.datasets.check import wanted
from fomo.datasets.datafile import read
from fomo.datasets.pixels import open_pixels
from fomo.errors import UserError
from fomo.recipe import Model, load


def fill_caches(path: str | Path, size: int) -> str:
    """Make the cache of every split; -> a table of what is there."""
    data = read(path)
    if data.keep == "never":
        raise UserError(f"{path}: cache: it says never, so there is nothing to make")
    lines = []
    for entry, split in wanted(data):
        if (source := entry.open(split)) is None:
            continue
        source.cache = "always"  # that is what the command is for
        pixels = open_pixels(source, size, f"{entry.where} ({split})")
        place = f"{pixels.meta['bytes'] / 2**20:8.1f} MB  {pixels.folder}"
        lines.append(f"{entry.where:24} {split:5} {len(source):9} pictures  {place}")
    return "\n".join(lines)


def side_of(path: str | Path, said: dict) -> int:
    """The side that `update` would cache pictures at: the data file's image_size, else the model's."""
    return read(path).image_size or side_of_model(load(None, data=str(path), **said).model)


def side_of_model(model: Model) -> int:
    """Of a model's configuration alone: nothing is loaded or downloaded."""
    config = model.config or (open_clip.get_model_config(model.name) if model.name else None)
    if config is None:
        what = model.name or model.pretrained
        raise UserError(f"{what}: the image size is not known before the model is loaded, say --size")
    size = config["vision_cfg"].get("image_size", 224)
    return size[0] if isinstance(size, (tuple, list)) else size
