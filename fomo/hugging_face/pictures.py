"""How pictures are prepared: the image processors of transformers and open_clip's preprocess_cfg."""

import json
from pathlib import Path
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

from fomo.errors import FieldError
from fomo.schema import convert, one_of

HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
USUAL = {
    "clip": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD, "resize_mode": "shortest"},
    "siglip": HALF,
}
COMPARED = ("do_resize", "size", "resample", "do_center_crop", "do_rescale", "rescale_factor")


def image_processor(pictures: dict, size: int) -> dict:
    """The fields of an image processor that does to pictures what a preprocess_cfg says."""
    one_of("preprocess_cfg.resize_mode", pictures["resize_mode"], ("shortest", "squash"))
    square, crop = {"height": size, "width": size}, pictures["resize_mode"] == "shortest"
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size} if crop else square,
        "resample": 2 if pictures["interpolation"] == "bilinear" else 3,  # as Pillow counts; 3 is bicubic
        "do_center_crop": crop,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pictures["mean"]),
        "image_std": list(pictures["std"]),
    }


def preprocess_cfg(folder: Path, kind: str, size: int) -> tuple[dict, list[str]]:
    """Of the processor that lies in a folder, and what of it open_clip does otherwise.

    kind: transformers' model_type; size: of the pictures that the model takes.
    """
    usual, found = image_processor({**USUAL[kind], "interpolation": "bicubic"}, size), processor_of(folder)
    said = {**usual, **{key: found[key] for key in usual if found.get(key) is not None}}
    if isinstance(said["size"], int):  # as older files have it
        side = said["size"]
        said["size"] = {"shortest_edge": side} if kind == "clip" else {"height": side, "width": side}
    pictures = {
        "mean": numbers(said["image_mean"], "image_mean") if said["do_normalize"] else [0.0] * 3,
        "std": numbers(said["image_std"], "image_std") if said["do_normalize"] else [1.0] * 3,
        "interpolation": "bilinear" if said["resample"] == 2 else "bicubic",
        "resize_mode": "shortest" if said["do_center_crop"] else "squash",
        "fill_color": 0,
    }
    here = image_processor(pictures, size)
    odd = [f"{key} {said[key]} is {here[key]} here" for key in COMPARED if said[key] != here[key]]
    remarks = [f"pictures are prepared otherwise than by its processor: {', '.join(odd)}"] if odd else []
    if not found:
        remarks.append(
            "no preprocessor_config.json lies beside it: pictures are prepared as usual for its kind"
        )
    return pictures, remarks


def processor_of(folder: Path) -> dict:
    """What a folder's image processor says: in version 5's file, else in the older one."""
    for name, inner in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        try:
            said = json.loads((folder / name).read_text("utf-8", "replace"))
            said = said[inner] if inner else said
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(said, dict):
            return said
    return {}


def numbers(values: Any, where: str) -> list[float]:
    found = convert(values, list[float], where)
    if len(found) != 3:
        raise FieldError(where, f"got {values}, accepted: three numbers")
    return found
