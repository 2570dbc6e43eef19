"""Merging files of weights by hand: what wise-ft and patching users do between two checkpoints."""

import sys
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from fomo import weights
from fomo.architectures import config_of, load_weights, locate
from fomo.atomic import staged, write_atomically
from fomo.checkpoint_files import (
    SUFFIXES,
    WEIGHTS_FILE,
    Checkpoint,
    note,
    open_checkpoint,
    write_checkpoint,
)
from fomo.clip import Clip, assemble, load, save
from fomo.datasets import datafile
from fomo.datasets.eval_sets import open_tests
from fomo.devices import pick_device
from fomo.errors import UserError
from fomo.eval.zero_shot import evaluate
from fomo.load_recipe import set_path, split_model
from fomo.progress import Progress
from fomo.report.figures import render, sweep_figure
from fomo.schema import differences
from fomo.text import aligned


def open_weights(text: str) -> Checkpoint:
    """A file of named tensors, a model directory, either also as NAME/PATH, or an open_clip NAME/TAG."""
    section = split_model(text)
    name, path = locate(section.get("name"), section.get("pretrained"))
    if path is None:
        clip = load(**section)
        return Checkpoint(text, clip.model.state_dict(), clip.config)
    checkpoint = open_checkpoint(path)
    if name:
        checkpoint.config = config_of(name, checkpoint)
    return checkpoint


def make_alike(models: Sequence[Checkpoint]) -> None:
    """Leave out buffers that some of them lack, and give a logit scale of shape (1,) that of the last model."""
    names = [set(model) for model in models]
    odd = {
        name
        for name in set.union(*names) - set.intersection(*names)
        if all(name not in model or weights.is_constant(name, model[name]) for model in models)
    }
    if odd:
        note(f"merge: buffers that not all models have are left out: {', '.join(sorted(odd)[:3])}")
    for model in models:
        model.names = {name: stored for name, stored in model.names.items() if name not in odd}
        for name in {"logit_scale", "logit_bias"} & model.keys() & models[-1].keys():
            shape = models[-1][name].shape
            if model[name].numel() == shape.numel():
                model.stored = ChainMap({model.names[name]: model[name].reshape(shape)}, model.stored)


def source_of(models: Sequence[Checkpoint]) -> Checkpoint:
    """The newest model that says how it is configured, else the newest."""
    known = [model for model in models if model.config]
    if not known:
        return models[-1]
    if fields := {f for model in known for f in differences(known[-1].config, model.config)}:
        note(f"merge: models differ in {', '.join(sorted(fields))}; the result is as {known[-1].label} says")
    return known[-1]


def model_of(models: Sequence[Checkpoint]) -> Clip:
    """With random weights, for the result of merging."""
    source = source_of(models)
    return assemble(config_of(None, source), source.folder, f"model {source.label}")


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
    """Merge `models`, oldest first, into a file if `out` ends as one, else into a model directory.

    dtype: torch's name of what floating-point tensors are stored in; by default the widest among the models.
    """
    rule = build_rule(name, settings)
    opened, origin = open_all(models, base)
    as_file = out.suffix in SUFFIXES
    file = out if as_file else out / WEIGHTS_FILE
    for model in filter(None, (*opened, origin)):
        if model.file and {out.resolve(), file.resolve()} & {
            model.file.resolve(),
            Path(model.label).resolve(),
        }:
            raise UserError(f"-o {out}: is a model that is merged ({model.label}), choose another place")
    clip = None if as_file else model_of(opened)
    merged = weights.merge(rule, opened, origin)
    result = dict(
        Progress(merged, total=len(opened[-1]), desc=f"merging by {name}", unit="tensor", leave=False)
    )
    found = sorted({str(t.dtype)[6:] for m in opened for t in m.values() if t.is_floating_point()})
    if len(found) > 1 and not dtype:
        widest = "each tensor is stored in the widest; another: --dtype"
        tqdm.write(f"warning: the models have tensors in {' and '.join(found)}; {widest}", file=sys.stderr)
    if dtype:
        result = {k: t.to(getattr(torch, dtype)) if t.is_floating_point() else t for k, t in result.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    if clip:
        if dtype:
            clip.model.to(getattr(torch, dtype))
        load_weights(clip.model, Checkpoint(str(out), result))
        save(clip, out)
    elif out.suffix == ".safetensors":
        write_checkpoint(result, out, source_of(opened).config)
    else:
        with staged(out) as staging:
            torch.save(result, staging)
    return out


def open_all(models: Sequence[str], base: str | None) -> tuple[list[Checkpoint], Checkpoint | None]:
    opened = [open_weights(model) for model in models]
    origin = open_weights(base) if base else None
    make_alike([*([origin] if origin else []), *opened])
    return opened, origin


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
    opened, origin = open_all(models, base)
    clip = model_of(opened)
    clip.model.to(place)
    data = datafile.read(data_path)
    tests = open_tests(data, clip, data.image_size or clip.image_size)
    whole = {test.name: test.usable for test in tests}
    rows = []
    for text, rule in zip(Progress(texts, desc=f"sweeping {key}", leave=False), rules, strict=True):
        load_weights(clip.model, Checkpoint("merged", dict(weights.merge(rule, opened, origin))))
        rows.append({key: yaml.safe_load(text), **evaluate(clip, tests, whole, place)[0].means})
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, render(sweep_figure, rows, out.suffix[1:]))
    known = [score for score in ("ka", "zs", "gm") if rows[0][score] is not None]
    cells = [[str(row[key]), *(f"{row[score]:.4g}" for score in known)] for row in rows]
    return aligned([[key, *known], *cells])
