"""The compute budget: memory-adjusted FLOPs (MAFs), and how many steps they buy (paper, section 3.2 and Table 4).

    multiplier = peak memory of the method / peak memory of finetuning the same model, rounded to 4 decimals
    MAFs       = FLOPs x multiplier
    steps      = (total / T / multiplier - FLOPs at the end of an update) / FLOPs of a step, rounded

FLOPs and memory come from flops_memory.py, once per model, method, batch size and precision: results stay in the
cache folder. docs/budget.md says what is counted and why.
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import open_clip
import torch

from fomo.architectures import at_size, configuration
from fomo.atomic import cache_root, make
from fomo.budget.flops_memory import VERSION, Counted, Training, count, measure
from fomo.datasets.mixture import sub_batches
from fomo.errors import FieldError, UserError, one_line
from fomo.load_recipe import ROOT, load
from fomo.methods import innermost
from fomo.progress import Progress
from fomo.recipe import Model, Recipe
from fomo.schema import Count, Positive, build, convert, one_of
from fomo.text import aligned

# Rows of the table: recipes/methods/NAME.yaml, with the paper's multiplier for ViT-B-16 at batch 512 (Table 4).
PAPER = {
    "finetune": 1.0,
    "locked-text": 0.8064,
    "locked-image": 0.2551,
    "lnfit": 0.6558,
    "bitfit": 0.6558,
    "lora-4": 0.8702,
    "lora-64": 0.873,
    "dora-4": 0.8726,
    "dora-64": 0.8754,
    "vera-4": 0.8702,
    "vera-64": 0.8708,
    "galore-16": None,
    "ewc": 1.0132,
    "si": 1.0013,
    "distill": None,
    "zs-merge": 1.0,
    "ft-merge": 1.0,
    "ema-merge": 1.0,
}


@dataclass(frozen=True)
class Work:
    """What training with a method costs."""

    gflops_per_step: float
    gflops_per_update: float  # at its end: EWC's Fisher, a merge
    peak_memory: int  # bytes
    multiplier: float

    @property
    def mafs_per_step(self) -> float:
        """In GFLOPs."""
        return self.gflops_per_step * self.multiplier

    def steps(self, total_gflops: float, updates: int) -> int:
        """Of each update, if so many MAFs (in GFLOPs) are to last for all of them."""
        available = total_gflops / updates / self.multiplier - self.gflops_per_update
        return max(round(available / self.gflops_per_step), 0)

    def minimum(self, updates: int) -> float:
        """The total that pays for one step of each update."""
        return updates * self.multiplier * (self.gflops_per_step + self.gflops_per_update)


def work_of(recipe: Recipe) -> Work:
    """Of the recipe's model, method, batch size and precision."""
    training = training_of(recipe)
    counted = counted_once(training)
    finetuning = counted_once(dataclasses.replace(training, method={"name": "finetune"}))
    per_step, per_update = counted.step_flops / 1e9, counted.update_flops / 1e9
    if recipe.budget.fisher == "per_step" and innermost(recipe.method)["name"] == "ewc":  # as in Table 4
        per_step, per_update = per_step + per_update, 0.0
    multiplier = round(counted.peak_memory / finetuning.peak_memory, 4)
    return Work(per_step, per_update, counted.peak_memory, multiplier)


def planned_steps(recipe: Recipe, work: Work | None, updates: int) -> int:
    """Optimizer steps per update (N); 0 for a budget in hours, which are timed."""
    total = recipe.budget.gflops
    if total is None:
        return recipe.steps or 0
    steps = work.steps(total, updates)
    if steps < 1:
        found = f"{total:g} is too little for a step in each update"
        raise UserError(f"budget.gflops: {found}, accepted: at least {work.minimum(updates):.4g}")
    return steps


def training_of(recipe: Recipe) -> Training:
    """`precision: auto` counts as bf16: the same recipe has the same number of steps on every machine. So has one
    with `optimizer.accumulate`, which gives up time for memory."""
    batch_size = recipe.optimizer.batch_size
    return Training(
        config=architecture(recipe.model),
        method=recipe.method,
        batch_size=batch_size,
        half=recipe.precision != "float32",
        pretraining=sub_batches(batch_size, recipe.mixture)["pretraining"],
    )


def architecture(model: Model) -> dict:
    """open_clip's model_cfg of a recipe's model; what a name costs is known without weights."""
    if model.name in open_clip.list_models() and not model.pretrained:
        config = open_clip.get_model_config(model.name)
    else:
        config = model.config or configuration(model.name, model.pretrained)["model_cfg"]
    return at_size({"model_cfg": config}, model.image_size, f"model {model.name or ''}")["model_cfg"]


def counted_once(training: Training) -> Counted:
    """Counted, or read from the cache if it was counted before."""
    versions = {"version": VERSION, "torch": torch.__version__, "open_clip": open_clip.__version__}
    what = {**dataclasses.asdict(training), **versions}
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]
    file = cache_root() / "budget" / key / "counted.json"
    if not file.exists():
        counted = count(training)
        content = json.dumps(dataclasses.asdict(counted))
        make(file.parent, lambda folder: (folder / file.name).write_text(content))
    return Counted(**json.loads(file.read_text()))


# --- the table ---


@dataclass(frozen=True)
class Table:
    """What each method costs at a scale, and how many steps of it the scale's budget buys."""

    scale: str
    batch_size: int
    total_gflops: float
    updates: list[int]  # numbers of updates to share the total among
    rows: dict[str, Work]
    measured: dict[str, int]  # bytes, of the rows with --measure
    paper: bool  # is Table 4 about this model and batch size?

    def as_json(self) -> str:
        rows = []
        for name, work in self.rows.items():
            row = {
                "method": name,
                "gflops_per_step": work.gflops_per_step,
                "peak_memory_gib": work.peak_memory / 2**30,
                "memory_multiplier": work.multiplier,
                "mafs_per_step": work.mafs_per_step,
                "steps": {str(n): work.steps(self.total_gflops, n) for n in self.updates},
            }
            if name in self.measured:
                row["measured_peak_gib"] = self.measured[name] / 2**30
            rows.append(row)
        head = {"scale": self.scale, "batch_size": self.batch_size, "total_gflops": self.total_gflops}
        return json.dumps({**head, "rows": rows}, indent=2)

    def as_text(self) -> str:
        rows = [self.cells(name, work) for name, work in self.rows.items()]
        table = aligned([list(rows[0]), *(list(row.values()) for row in rows)])
        total = f"{self.total_gflops:,.0f} GFLOPs in all, memory-adjusted; steps of an update, if there are T"
        return f"{self.scale}, batch size {self.batch_size}: {total}\n{table}"

    def cells(self, name: str, work: Work) -> dict[str, str]:
        """A row of the printed table by column."""
        cells = {
            "method": name,
            "GFLOPs/step": f"{work.gflops_per_step:,.4f}",
            "GFLOPs/update": f"{work.gflops_per_update:,.1f}",
            "peak GiB": f"{work.peak_memory / 2**30:.2f}",
        }
        if self.measured:
            cells["measured"] = f"{self.measured[name] / 2**30:.2f}"
        cells["multiplier"] = f"{work.multiplier:.4f}"
        if self.paper:
            cells["paper"] = "-" if PAPER.get(name) is None else f"{PAPER[name]:.4f}"
        cells["MAFs/step"] = f"{work.mafs_per_step:,.4f}"
        return cells | {f"T={n}": f"{work.steps(self.total_gflops, n):,}" for n in self.updates}


def make_table(
    methods: str | None,
    updates: str,
    memory_table: str | None,
    fisher: str | None,
    measured: bool,
    options: Mapping,
) -> Table:
    """`options`: scale, overrides, ... as load_recipe.load takes them."""
    names = [name.strip() for name in methods.split(",")] if methods else list(PAPER)
    known = (*PAPER, *sorted({path.stem for path in (ROOT / "methods").glob("*.yaml")} - PAPER.keys()))
    for name in names:
        one_of("--methods", name, known)
    counts = convert(updates.split(","), list[Count], "--updates")
    peaks = read_peaks(memory_table) if memory_table else {}
    recipes = {name: recipe_of(name, fisher, options) for name in dict.fromkeys(["finetune", *names])}
    finetuning = recipes["finetune"]
    with Progress(recipes.items(), desc="counting", unit="method", leave=False) as bar:
        works = {name: work_of(recipe) for name, recipe in bar}
    on_device = {name: measure(training_of(recipes[name])) for name in names} if measured else {}
    return Table(
        scale=finetuning.scale,
        batch_size=finetuning.optimizer.batch_size,
        total_gflops=total_of(finetuning, works["finetune"]),
        updates=list(dict.fromkeys(counts)),
        rows={name: work for name, work in with_peaks(works, peaks).items() if name in names},
        measured=on_device,
        paper=(finetuning.model.name, finetuning.model.image_size, finetuning.optimizer.batch_size)
        == ("ViT-B-16", None, 512),
    )


def recipe_of(name: str, fisher: str | None, options: Mapping) -> Recipe:
    recipe = load(ROOT / "methods" / f"{name}.yaml", **options)
    if fisher is None:
        return recipe
    return dataclasses.replace(recipe, budget=dataclasses.replace(recipe.budget, fisher=fisher))


def total_of(recipe: Recipe, finetuning: Work) -> float:
    """The scale's budget in MAFs; one in samples or steps is what finetuning takes for them."""
    if recipe.budget.gflops is not None:
        return recipe.budget.gflops
    if recipe.steps is None:
        found = f"{recipe.budget.hours:g} h is as many FLOPs as the machine makes of it"
        raise FieldError("budget.hours", f"{found}; say --set budget.gflops=N, steps or samples")
    return recipe.steps * recipe.stream.updates * finetuning.mafs_per_step


def with_peaks(works: dict[str, Work], peaks: dict[str, float]) -> dict[str, Work]:
    """With the peaks of a table (GiB) in place of ours."""
    memory = {
        name: round(peaks[name] * 2**30) if name in peaks else w.peak_memory for name, w in works.items()
    }
    multipliers = {name: round(peak / memory["finetune"], 4) for name, peak in memory.items()}
    return {
        name: dataclasses.replace(work, peak_memory=memory[name], multiplier=multipliers[name])
        for name, work in works.items()
    }


@dataclass(frozen=True)
class PeakRow:
    """A line of --memory-table."""

    method: Literal[(*PAPER,)]
    peak_gib: Positive


def read_peaks(path: str) -> dict[str, float]:
    """A CSV file `method,peak_gib` -> GiB by method."""
    columns = [field.name for field in dataclasses.fields(PeakRow)]
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            rows, heads = [(table.line_num, row) for row in table], table.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--memory-table {path}: cannot be read: {one_line(error)}") from None
    if not set(columns) <= set(heads):
        found = ",".join(heads) or "nothing"
        raise UserError(f"--memory-table {path}: expected the columns {','.join(columns)}, found {found}")
    peaks: dict[str, float] = {}
    for line, row in rows:
        where = f"--memory-table {path}, line {line}"
        peak = build(PeakRow, {column: (row[column] or "").strip() for column in columns}, where)
        if peak.method in peaks:
            raise UserError(f"{where}: {peak.method} stands there twice")
        peaks[peak.method] = peak.peak_gib
    return peaks
