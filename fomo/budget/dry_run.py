"""What a recipe would take, before anything is written: steps, hours, memory, disk."""

import time

import torch

from fomo.architectures import configuration
from fomo.budget.fitting import pairs_at_once, shortage, step_memory
from fomo.budget.flops_memory import parameter_count
from fomo.budget.mafs import Work, architecture, planned_steps, work_of
from fomo.choice import Choice
from fomo.datasets import datafile
from fomo.datasets.datafile import DataFile
from fomo.datasets.eval_sets import RETENTION
from fomo.datasets.mixture import sub_batches
from fomo.datasets.periods import read_for
from fomo.datasets.remarks import glance, of_batches, reader_of
from fomo.datasets.stream import concepts_of
from fomo.datasets.understood import opened_and_said
from fomo.devices import Precision, available_memory, pick_device
from fomo.recipe import Recipe
from fomo.text import plural

USED = 0.4  # of the matrix rate that training reaches: a guess until the run has timed itself


def dry_run(recipe: Recipe, device: str) -> str:
    """Needs the data file and the model's architecture; no weights are fetched; of pictures only the headers."""
    model = recipe.model
    if model.name or model.pretrained:  # there are weights, and those of a file fit
        configuration(model.name, model.pretrained, model.image_size)
    place = pick_device(device, recipe.threads)
    data = datafile.read(recipe.data, validation=recipe.chooses)
    opened = opened_and_said(data)
    data = read_for(recipe)
    concepts, sizes = concepts_of(data)
    entries = [*data.adaptation.values(), *data.evaluation.values()]
    tests = [source for entry in entries if (source := entry.open("test")) is not None]
    scored = sum(map(len, tests))
    pools = len(data.pretraining)
    pool = f"a pretraining pool of {plural(pools, 'source')}" if pools else "no pretraining pool"
    updates, work = recipe.stream.updates, work_of(recipe)
    saved = " without checkpointing" if recipe.checkpointing else ""
    needed, lacking = step_memory(recipe, place, pairs_at_once(recipe)), shortage(recipe, place)
    precision = Precision(recipe.precision, place, architecture(recipe.model)["embed_dim"])
    rate = matrix_rate(place, precision.dtype) / 1e9
    learnt = f"{plural(len(concepts), 'concept')} with {plural(sum(sizes), 'picture')}"
    lines = [
        f"learns {learnt} in {plural(updates, 'update')}; {pool}",
        f"scored on {plural(len(tests), 'test set')} with {plural(scored, 'picture')}",
        *training_lines(recipe, work, updates, scored, rate, *validation_pictures(recipe, data)),
        f"memory: {needed / 2**30:.1f} GiB on the {place.type} for a step in {precision.name}, of what torch "
        f"allocates{saved}; {available_memory(place) / 2**30:.1f} GiB are there",
        f"disk: about {disk(recipe) / 2**30:.2g} GiB of weights and checkpoints in the run folder",
    ]
    if not data.pretraining:
        costs = "nothing that the model knew before is replayed, so it forgets more (docs/life.md)"
        entry = "pretraining: [{source: webdataset, path: 'cc3m/{0000..0019}.tar'}]"
        lines.append(f"{data.path}: without a pretraining pool {costs}; to add one: {entry}")
    drawn = draws(recipe, sum(sizes) // updates, sum(map(len, data.pool())))
    lines += [f"warning: {line}" for line in of_batches(recipe.optimizer.batch_size, drawn)]
    if lacking:
        lines.append(f"{'refused' if lacking.sure else 'warning'}: {lacking.line}")
    lines += [f"warning: {line}" for line in glance(data, reader_of(recipe.model), opened)]
    return "\n".join(lines)


def validation_pictures(recipe: Recipe, data: DataFile) -> tuple[int, int]:
    """Of what is to be learned, and of what must be kept."""
    if not recipe.chooses:
        return 0, 0
    of_roles = [
        sum(len(part) for entry in entries.values() if (part := entry.open("validation")) is not None)
        for entries in (data.adaptation, data.evaluation)
    ]
    stand_ins = datafile.read(RETENTION).evaluation.values()
    return of_roles[0], of_roles[1] or sum(len(entry.open("test")) for entry in stand_ins)


def draws(recipe: Recipe, pictures: int, pool: int) -> list[tuple[str, int, int]]:
    """As remarks.of_batches takes them, in the first update. pictures, pool: that these pools have."""
    empty = frozenset({"buffer"} if pool else {"buffer", "pretraining"})
    pairs = sub_batches(recipe.optimizer.batch_size, recipe.mixture, empty)
    return [(name, pairs[name], count) for name, count in (("pretraining", pool), ("update", pictures))]


def training_lines(
    recipe: Recipe, work: Work, updates: int, scored: int, rate: float, new: int, old: int
) -> list[str]:
    """rate: GFLOP/s of large matrix products; new, old: pictures to choose on."""
    forward = work.gflops_per_step / recipe.optimizer.batch_size / 3  # of a picture, its caption counted in
    passes = 2 + recipe.evaluation.subset * max(updates - 1, 0) / recipe.evaluated_every
    choice = Choice.of(recipe, new)
    choosing = updates * choice.tries(recipe) * (new + old) if choice else 0
    scoring = (scored * passes + choosing) * forward
    if recipe.budget.hours is not None:
        return [
            f"each update takes {recipe.budget.hours:g} h, as the recipe says; its first steps decide how many"
        ]
    steps = planned_steps(recipe, work, updates)
    training = updates * (steps * work.gflops_per_step + work.gflops_per_update)
    hours = (training + scoring) / (USED * rate) / 3600
    pairs = plural(recipe.optimizer.batch_size, "pair")
    return [
        f"steps: {steps:,} of {pairs} per update, {updates * steps:,} in all, "
        f"{training:,.0f} GFLOPs; peak learning rate {recipe.optimizer.lr:g}",
        f"hours: about {hours:.2g}, {scoring / (training + scoring):.0%} of it scoring, at {USED:.0%} of the "
        f"{rate:,.0f} GFLOP/s of matrix products measured here; pictures are decoded once before",
        *([f"{choice.plan(recipe, steps)}; what is kept by {old:,} others"] if choice else []),
    ]


def matrix_rate(
    device: torch.device, dtype: torch.dtype | None, turns: int = 5, side: int | None = None
) -> float:
    """The best FLOP/s of a large matrix product, of square matrices of that side."""
    n = side or (8192 if device.type == "cuda" else 1536)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype or torch.float32)
    rates = []
    for _ in range(turns):
        began = time.monotonic()
        (a @ b)[0, 0].item()  # waits for the device
        rates.append(2 * n**3 / (time.monotonic() - began))
    return max(rates)


def disk(recipe: Recipe) -> float:
    """Bytes: deployed weights and their states, as many as stay, and the two last checkpoints."""
    updates, last = recipe.stream.updates, recipe.evaluation.keep_weights
    count = 1 + (updates if last is None else min(last, updates))
    weights = parameter_count(architecture(recipe.model)) * 4
    return weights * (2 * count + 2 * 3 + 1)  # a checkpoint within an update has two moments of each, too
