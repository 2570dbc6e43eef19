"""The model a recipe starts from: loaded, or a small CLIP of our own, pretrained once and cached."""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from fomo.clip import Clip, load, new, save
from fomo.datasets import datafile
from fomo.datasets.cache import cache_root
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.devices import pick_device
from fomo.errors import UserError
from fomo.methods import Method
from fomo.recipe import Model, Optimizer, Pretraining, Recipe
from fomo.schedules import Schedule, learning_rate
from fomo.train import Precision, train

VERSION = 1  # of this procedure: raised when the same settings would give another model


def starting_model(model: Model, device: torch.device) -> Clip:
    """The model of a recipe; a scale's own model is pretrained on first use."""
    if model.name or model.pretrained:
        return load(model.name, model.pretrained)
    folder = cache_root() / "models" / settings_hash(model)
    if not folder.exists():
        pretrain(model, folder, device)
    return load(None, str(folder))


def pretrain_scale(recipe: Recipe, out: str | None, device: str) -> Path:
    """Make a scale's own model in `out`, or in the cache; -> where it is."""
    model = recipe.model
    if model.pretraining is None:
        raise UserError(
            f"the scale starts from {model.name}/{model.pretrained}, there is nothing to pretrain"
        )
    folder = Path(out) if out else cache_root() / "models" / settings_hash(model)
    if out and folder.exists():
        raise UserError(f"-o {folder}: exists already")
    if not folder.exists():
        pretrain(model, folder, pick_device(device, recipe.threads))
    return folder


def settings_hash(model: Model) -> str:
    """Everything that decides the weights, but for the machine's rounding."""
    pool = datafile.read(model.pretraining.data).pool()
    keys = [s.key() if s.weight == 1 else f"{s.key()} weight {s.weight:g}" for s in pool]
    settings = {**vars(model.pretraining), "data": keys, "config": model.config, "version": VERSION}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def pretrain(model: Model, folder: Path, device: torch.device) -> Clip:
    """Train `model.config` from random weights on the pretraining pool; written to `folder` when complete."""
    settings = model.pretraining
    clip = new(model.config, settings.seed)
    clip.model.to(device)
    data = datafile.read(settings.data)
    size = data.image_size or clip.image_size
    pool = Collection([Samples(s, clip, size, f"pretraining[{i}]") for i, s in enumerate(data.pool())])
    steps = settings.samples // settings.batch_size
    draws = [("pretraining", pool_of(pool, (settings.seed,)), settings.batch_size)]
    batches = Batches(draws, settings.seed, 0, steps)
    optimizer = optimizer_of(settings, clip)
    schedule = Schedule(name="cosine", warmup=settings.warmup, floor=settings.floor)
    done = train(
        clip,
        Method(),
        optimizer,
        batches.loader(),
        lambda step: learning_rate(schedule, settings.lr, 0, step, steps),
        device=device,
        precision=Precision("auto", device),
        clip_norm=1.0,
        max_scale=100.0,
    )
    with tqdm(total=steps, desc="pretraining the base model, once", unit="step") as bar:
        for step in done:
            bar.update()
            if step.number % 50 == 0:
                bar.set_postfix(loss=f"{step.loss.item():.2f}")
    place(clip, folder)
    return clip


def optimizer_of(settings: Pretraining, clip: Clip) -> torch.optim.Optimizer:
    """AdamW with the betas of CLIP's own pretraining."""
    values = Optimizer(
        lr=settings.lr, batch_size=settings.batch_size, weight_decay=settings.weight_decay, betas=[0.9, 0.98]
    )
    return Method().optimizer(list(clip.model.parameters()), values)


def place(clip: Clip, folder: Path) -> None:
    """Write the model beside its place and rename it: it is complete or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=folder.name, suffix=".part", dir=folder.parent))
    try:
        save(clip, staging)
        if not folder.exists():  # another process may have been faster
            os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
