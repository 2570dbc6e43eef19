"""The model a recipe starts from: loaded, or a small CLIP of our own, pretrained once and cached."""

import hashlib
import json
from pathlib import Path

import torch
from tqdm import tqdm

from fomo.atomic import cache_root, make
from fomo.clip import Clip, load, new, save
from fomo.datasets import datafile
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.devices import Precision, pick_device
from fomo.errors import UserError
from fomo.methods import Method
from fomo.recipe import Model, Optimizer, Pretraining, Recipe
from fomo.schedules import Schedule, learning_rate
from fomo.train import train

VERSION = 1  # of this procedure: raised when the same settings would give another model


def starting_model(model: Model, device: torch.device) -> Clip:
    """The model of a recipe; a scale's own model is pretrained on first use."""
    if model.name or model.pretrained:
        return load(model.name, model.pretrained)
    return load(None, str(pretrained(model, cached(model), device)))


def pretrain_scale(recipe: Recipe, out: str | None, device: str) -> Path:
    """Make a scale's own model in `out`, or in the cache; -> where it is."""
    model = recipe.model
    if model.pretraining is None:
        start = f"{model.name}/{model.pretrained}"
        raise UserError(f"the scale starts from {start}, there is nothing to pretrain")
    if out and Path(out).exists():
        raise UserError(f"-o {out}: exists already")
    return pretrained(model, Path(out) if out else cached(model), pick_device(device, recipe.threads))


def cached(model: Model) -> Path:
    """Where the model is, once it is made."""
    return cache_root() / "models" / settings_hash(model)


def settings_hash(model: Model) -> str:
    """Everything that decides the weights, but for the machine's rounding."""
    pool = datafile.read(model.pretraining.data).pool()
    keys = [s.key() if s.weight == 1 else f"{s.key()} weight {s.weight:g}" for s in pool]
    settings = {**vars(model.pretraining), "data": keys, "config": model.config, "version": VERSION}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:20]


def pretrained(model: Model, folder: Path, device: torch.device) -> Path:
    """-> `folder`, with `model.config` trained from random weights on the pretraining pool if it is not there."""
    if not folder.exists():
        clip = train_base(model, device)
        make(folder, lambda staging: save(clip, staging))
    return folder


def train_base(model: Model, device: torch.device) -> Clip:
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
        draws=(settings.seed,),
    )
    with tqdm(total=steps, desc="pretraining the base model, once", unit="step") as bar:
        for step in done:
            bar.update()
            if step.number % 50 == 0:
                bar.set_postfix(loss=f"{step.loss.item():.2f}")
    return clip


def optimizer_of(settings: Pretraining, clip: Clip) -> torch.optim.Optimizer:
    """AdamW with the betas of CLIP's own pretraining."""
    values = Optimizer(
        lr=settings.lr, batch_size=settings.batch_size, weight_decay=settings.weight_decay, betas=[0.9, 0.98]
    )
    return Method().optimizer(list(clip.model.parameters()), values)
