"""Files of weights, and merging them by hand: what wise-ft and patching users do between two checkpoints."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from open_clip.factory import _find_checkpoint_in_dir, load_state_dict
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from fomo import weights
from fomo.architectures import NOT_TENSORS
from fomo.atomic import OnDisk, staged, write_atomically, write_tensors
from fomo.clip import CONFIG_FILE, Clip, load, save
from fomo.datasets import datafile
from fomo.datasets.eval_sets import open_tests
from fomo.devices import pick_device
from fomo.errors import UserError, one_line
from fomo.eval.zero_shot import evaluate
from fomo.load_recipe import set_path, split_model
from fomo.report.figures import render, sweep_figure
from fomo.text import aligned


def open_weights(text: str) -> Mapping[str, Tensor]:
    """A file of named tensors (.safetensors, .pt, .pth, .bin), a model directory, or an open_clip NAME/TAG.

    `state_dict` wrappers and `module.` prefixes of training checkpoints are taken off.
    """
    path = Path(text)
    if path.is_dir():
        found = _find_checkpoint_in_dir(path)
        if found is None:
            raise UserError(f"{text}: no file of weights in this directory")
        path = Path(found)
    if not path.is_file():
        section = split_model(text)
        if path.suffix in (".safetensors", ".pt", ".pth", ".bin") or "pretrained" not in section:
            raise UserError(f"{text}: no such file; an open_clip model is written NAME/TAG")
        return load(section.get("name"), section["pretrained"]).model.state_dict()
    try:
        if path.suffix == ".safetensors":
            return OnDisk(path)
        tensors = load_state_dict(str(path))
    except (*NOT_TENSORS, SafetensorError) as error:
        raise UserError(f"{text}: not a file of tensors: {one_line(error)}") from None
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def build_rule(name: str, settings: Sequence[str]) -> weights.Rule:
    """--rule ties --set density=0.2 -> Ties(density=0.2)."""
    spec: dict = {}
    for setting in settings:
        set_path(spec, setting)
    return weights.build_rule({**spec, "rule": name})


def merge(
    name: str,
    settings: Sequence[str],
    base: str | None,
    models: Sequence[str],
    out: Path,
    dtype: str | None = None,
) -> Path:
    """Merge `models`, oldest first, into a file, or into a model directory if `out` has no suffix.

    dtype: torch's name of what floating-point tensors are stored in; by default the widest among the models.
    """
    rule = build_rule(name, settings)
    opened = [open_weights(model) for model in models]
    merged = weights.merge(rule, opened, open_weights(base) if base else None)
    result = dict(tqdm(merged, total=len(opened[-1]), desc=f"merging by {name}", unit="tensor", leave=False))
    if dtype:
        result = {
            key: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for key, t in result.items()
        }
    elif (
        len(dtypes := sorted({str(t.dtype)[6:] for m in opened for t in m.values() if t.is_floating_point()}))
        > 1
    ):
        widest = "each tensor is stored in the widest; another: --dtype"
        tqdm.write(f"warning: the models have tensors in {' and '.join(dtypes)}; {widest}", file=sys.stderr)
    if not out.suffix:
        clip = model_of(models[-1])
        if dtype:
            clip.model.to(getattr(torch, dtype))
        clip.model.load_state_dict(result)
        save(clip, out)
    elif out.suffix == ".safetensors":
        write_tensors(result, out)
    else:
        with staged(out) as staging:
            torch.save(result, staging)
    return out


def model_of(text: str) -> Clip:
    """The architecture that a checkpoint's weights fit."""
    section = split_model(text)
    path = Path(text)
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        raise UserError(f"{text}: no {CONFIG_FILE} in this directory")
    return load(section.get("name"), section.get("pretrained"))


def sweep(
    name: str,
    settings: Sequence[str],
    values: str,
    base: str | None,
    models: Sequence[str],
    data_path: str | None,
    out: Path,
    device: str,
) -> str:
    """Score the merge for each value of a parameter (`values`: KEY=A,B,C), draw the curve, -> a table."""
    key, _, listed = values.partition("=")
    texts = [value for value in listed.split(",") if value]
    if not texts or not data_path or out.suffix not in (".png", ".svg"):
        problem = "write KEY=A,B,C, with --data FILE to score on and -o FILE.png for the curve"
        raise UserError(f"--sweep: {problem}")
    rules = [build_rule(name, [*settings, f"{key}={value}"]) for value in texts]
    place = pick_device(device)
    clip = model_of(models[-1])
    clip.model.to(place)
    data = datafile.read(data_path)
    tests = open_tests(data, clip, data.image_size or clip.image_size)
    whole = {test.name: test.usable for test in tests}
    opened = [open_weights(model) for model in models]
    origin = open_weights(base) if base else None
    rows = []
    for text, rule in zip(tqdm(texts, desc=f"sweeping {key}", leave=False), rules, strict=True):
        clip.model.load_state_dict(dict(weights.merge(rule, opened, origin)))
        rows.append({key: yaml.safe_load(text), **evaluate(clip, tests, whole, place)[0].means})
    write_atomically(out, render(sweep_figure, rows, out.suffix[1:]))
    known = [score for score in ("ka", "zs", "gm") if rows[0][score] is not None]
    cells = [[str(row[key]), *(f"{row[score]:.4g}" for score in known)] for row in rows]
    return aligned([[key, *known], *cells])
