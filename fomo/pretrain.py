"""The model a recipe starts from: loaded, or a small CLIP of our own that comes with the repository.

A stored model (recipes/bases/NAME.safetensors) holds the rows of the token embedding that its pool's captions
use; the others come from the seed. NAME.json says what made it, how its loss fell, and what it scores. Where the
settings are others than those, the model is pretrained on first use and cached.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from fomo.atomic import cache_root, make, write_atomically, write_tensors
from fomo.clip import Clip, load, new, save
from fomo.datasets import datafile
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.datasets.sources import world
from fomo.devices import machine, pick_device
from fomo.distributed import ALONE
from fomo.errors import UserError
from fomo.eval.zero_shot import evaluate_data
from fomo.methods import Method
from fomo.progress import Progress
from fomo.recipe import Model, Optimizer, Pretraining, Recipe
from fomo.schedules import Schedule, learning_rate
from fomo.train import train

VERSION = 2  # of this procedure: raised when the same settings would give another model
TOKENS = "token_embedding.weight"
ROWS = "token_embedding.rows"  # int64, in a stored model: which rows of TOKENS it holds
REMEDY = "restore it from the repository, or make it again with `fomo.py pretrain --scale SCALE -o FILE`"


def starting_model(model: Model, device: torch.device) -> Clip:
    """The model of a recipe; a scale's own model is unpacked, or pretrained, on first use."""
    if model.name or model.pretrained:
        return load(model.name, model.pretrained, model.image_size)
    return load(None, str(own_model(model, device)), model.image_size)


def own_model(model: Model, device: torch.device) -> Path:
    """-> the directory of a scale's own model, which is made if it is not there."""
    folder = cached(model)
    if not folder.exists():
        stored = stored_hash(model)
        if model.pretraining.stored and not stored:
            print(f"{model.pretraining.stored} was made with other settings", file=sys.stderr)
        clip = unpacked(model) if stored else train_base(model, device)[0]
        make(folder, lambda staging: save(clip, staging))
    return folder


def pretrain_scale(recipe: Recipe, out: str | None, device: str) -> Path:
    """Train a scale's own model and write it as a directory, or as a stored model (FILE.safetensors); -> `out`.
    Without `out` it is the one that `update` starts from; -> where that is."""
    model, place = recipe.model, pick_device(device, recipe.threads)
    if model.pretraining is None:
        start = f"{model.name}/{model.pretrained}"
        raise UserError(f"the scale starts from {start}, there is nothing to pretrain")
    if out is None:
        return own_model(model, place)
    path = Path(out)
    if path.exists():
        raise UserError(f"-o {out}: exists already")
    clip, record = train_base(model, place)
    if path.suffix == ".safetensors":
        store(clip, record | {"scores": evaluate_data(clip, recipe.data, place).as_metrics()}, path)
    else:
        make(path, lambda staging: save(clip, staging))
    return path


# --- stored models ---


def settings_of(model: Model) -> dict:
    """Everything that decides the weights, but for the machine's rounding."""
    settings = {key: value for key, value in vars(model.pretraining).items() if key not in ("data", "stored")}
    pool = [entry.spec for entry in datafile.read(model.pretraining.data).pretraining]
    return {**settings, "pool": pool, "config": model.config, "version": [VERSION, world.VERSION]}


def stored_hash(model: Model) -> str | None:
    """The SHA-256 of the scale's stored model; None if other settings made it."""
    if model.pretraining.stored is None:
        return None
    path = Path(model.pretraining.stored)
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: missing, a part of the base model that comes with fomo; {REMEDY}"
        ) from None
    if found != record["sha256"]:
        raise UserError(f"{path}: not the file that {path.stem}.json describes; {REMEDY}")
    return found if record["settings"] == settings_of(model) else None


def unpacked(model: Model) -> Clip:
    tensors = load_file(model.pretraining.stored)
    clip = new(model.config, model.pretraining.seed)
    table = clip.model.state_dict()[TOKENS].index_copy(0, tensors.pop(ROWS), tensors[TOKENS])
    clip.model.load_state_dict({**tensors, TOKENS: table})
    return clip


def store(clip: Clip, record: dict, path: Path) -> None:
    tensors, rows = dict(clip.model.state_dict()), torch.tensor(record.pop("rows"))
    write_tensors({**tensors, TOKENS: tensors[TOKENS][rows], ROWS: rows}, path)
    record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_atomically(path.with_suffix(".json"), (json.dumps(record, indent=1) + "\n").encode())


def cached(model: Model) -> Path:
    """Where the model is, once it is made."""
    identity = stored_hash(model) or json.dumps(settings_of(model), sort_keys=True)
    return cache_root() / "models" / hashlib.sha256(identity.encode()).hexdigest()[:20]


# --- training ---


def train_base(model: Model, device: torch.device) -> tuple[Clip, dict]:
    """`model.config` trained from random weights on the pretraining pool; -> it, and what is recorded of it."""
    settings = model.pretraining
    clip = new(model.config, settings.seed)
    drawn = clip.model.state_dict()[TOKENS].clone()
    clip.model.to(device)
    data = datafile.read(settings.data)
    size = data.image_size or clip.image_size
    pool = Collection([Samples(s, clip, size, f"pretraining[{i}]") for i, s in enumerate(data.pool())])
    steps = settings.samples // settings.batch_size
    draws = [("pretraining", pool_of(pool, (settings.seed,)), settings.batch_size)]
    batches = Batches(draws, settings.seed, 0, steps)
    optimizer, precision = optimizer_of(settings, clip), clip.precision_on(device)
    schedule = Schedule(name="cosine", warmup=settings.warmup, floor=settings.floor)
    done = train(
        clip,
        Method(),
        optimizer,
        batches.loader(),
        lambda step: learning_rate(schedule, settings.lr, 0, step, steps),
        device=device,
        precision=precision,
        clip_norm=1.0,
        max_scale=100.0,
        draws=(settings.seed,),
    )
    losses = []
    with Progress(total=steps, desc="pretraining the base model, once", unit="step") as bar:
        for step in done:
            bar.update()
            losses.append(step.loss)
            if step.number % 50 == 0:
                bar.set_postfix(loss=f"{step.loss.item():.2f}")
        seconds = bar.format_dict["elapsed"]
    rows = used_rows(pool)
    drawn[rows] = clip.model.state_dict()[TOKENS].cpu()[rows]  # the others have only decayed
    clip.model.load_state_dict({**clip.model.state_dict(), TOKENS: drawn})
    curve = [round(part.mean().item(), 4) for part in torch.stack(losses).tensor_split(min(steps, 50))]
    record = {
        "settings": settings_of(model),
        "loss": curve,
        "seconds": round(seconds),
        "machine": machine(ALONE, precision.name),
    }
    return clip, record | {"rows": rows}


def used_rows(pool: Collection) -> list[int]:
    """The token ids of a pool's captions."""
    rows = set()
    for part in pool.parts:
        for captions in map(part.captions.__getitem__, range(len(part))):
            rows.update(*(part.tokens[number].tolist() for number in captions))
    return sorted(rows)


def optimizer_of(settings: Pretraining, clip: Clip) -> torch.optim.Optimizer:
    """AdamW with the betas of CLIP's own pretraining."""
    values = Optimizer(
        lr=settings.lr, batch_size=settings.batch_size, weight_decay=settings.weight_decay, betas=[0.9, 0.98]
    )
    return Method().optimizer(list(clip.model.parameters()), values)
