"""The whole experiment: stream -> train -> method -> evaluate -> save, for every update of a model's life."""

import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.mixture import Batches, Pool, pool_of, reservoir, sub_batches
from fomo.datasets.orders import Known, Reference, make_stream
from fomo.datasets.samples import Collection, Samples
from fomo.datasets.stream import Concept
from fomo.errors import Failure, Interrupted, UserError
from fomo.eval import TestSet, as_metrics, evaluate, image_features, open_tests, subset
from fomo.frozen import trajectory
from fomo.methods import build_method
from fomo.pretrain import starting_model
from fomo.recipe import Recipe, Temperature
from fomo.report import write_report
from fomo.run import Run
from fomo.schedules import learning_rate
from fomo.train import Precision, Step, Timed, on_device, pick_device, train

LOG_EVERY = 20  # steps between readings of the loss: on a GPU each reading waits for the device
CHECKPOINT_SECONDS = 300  # between checkpoints within an update


@dataclass
class Material:
    """The data of a life: the stream of concepts, the pools to draw from, the sets to score."""

    stream: list[list[Concept]]  # T updates
    adaptation: Collection
    names: list[str]  # of the parts of `adaptation`
    concept_numbers: dict[tuple[str, int], np.ndarray]  # (dataset, label) -> sample numbers
    pretraining: Collection
    tests: list[TestSet]
    subsets: dict[str, np.ndarray]

    def numbers(self, updates: list[list[Concept]]) -> np.ndarray:
        """The samples of all concepts of some updates."""
        found = [self.concept_numbers[c.dataset, c.label] for concepts in updates for c in concepts]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def by_dataset(self, numbers: np.ndarray) -> list[tuple[str, Samples, np.ndarray]]:
        """The name, the samples and the own numbers of each dataset among `numbers`; those with classes."""
        starts, found = self.adaptation.offsets, []
        for part, name in enumerate(self.names):
            own = numbers[(numbers >= starts[part]) & (numbers < starts[part + 1])] - starts[part]
            if len(own) and (self.adaptation.parts[part].labels[own] >= 0).all():
                found.append((name, self.adaptation.parts[part], own))
        return found


def open_material(recipe: Recipe, clip: Clip) -> Material:
    data = datafile.read(recipe.data)
    size = data.image_size or clip.image_size
    concepts, parts, numbers, by_name = [], [], {}, {}
    start = 0
    for name, entry in data.adaptation.items():
        source = entry.open("train")
        if source is None:
            continue
        samples = Samples(source, clip, size, name)
        parts.append(samples)
        by_name[name] = samples
        usable = Collection([samples]).usable()
        for label, title in enumerate(source.classes) if source.classes else [(-1, name)]:
            own = np.flatnonzero((source.labels == label) & usable)
            if len(own):
                concepts.append(Concept(name, label, title, source.prompts[0]))
                numbers[name, label] = start + own
        start += len(samples)
    if not concepts:
        raise UserError(f"{data.path}: adaptation: no training pictures, there is nothing to learn")
    pool = [Samples(source, clip, size, f"pretraining[{i}]") for i, source in enumerate(data.pool())]
    if not pool and recipe.mixture.pretraining:
        print(f"{data.path}: no pretraining pool; its share goes to the other pools", file=sys.stderr)
    seed = recipe.seed if recipe.stream.seed is None else recipe.stream.seed
    reference = Reference(clip, by_name.__getitem__, lambda: pool)
    stream = make_stream(concepts, Known(recipe.stream, seed, data, lambda: reference))
    tests = open_tests(data, clip, size)
    subsets = {test.name: subset(test, recipe.evaluation.subset, recipe.seed) for test in tests}
    return Material(stream, Collection(parts), list(by_name), numbers, Collection(pool), tests, subsets)


def batches_of(material: Material, recipe: Recipe, update: int) -> Batches:
    """The batches of one update (from 0)."""
    new, seen = material.stream[update : update + 1], material.stream[:update]
    kept = reservoir(material.numbers(seen), recipe.mixture.limit, recipe.seed)
    pools = {
        "pretraining": pool_of(material.pretraining, (recipe.seed, update, 0)),
        "update": Pool(material.adaptation, material.numbers(new), (recipe.seed, update, 1)),
        "buffer": Pool(material.adaptation, kept, (recipe.seed, update, 2)),
    }
    empty = frozenset(name for name, pool in pools.items() if not len(pool)) - {"update"}
    counts = sub_batches(recipe.optimizer.batch_size, recipe.mixture, empty)
    return Batches([(name, pools[name], counts[name]) for name in pools], recipe.seed, update, recipe.steps)


class Life:
    """A model living through its updates in one run folder."""

    def __init__(self, recipe: Recipe, clip: Clip, run: Run, device: torch.device, workers: int = 0):
        self.recipe, self.clip, self.run, self.device, self.workers = recipe, clip, run, device, workers
        self.model = clip.model.to(device)
        self.method = build_method(recipe.method)
        self.material = open_material(recipe, clip)
        run.position.updates = len(self.material.stream)
        set_temperature(self.model, recipe.temperature)
        self.method.keep_in(run.folder)
        torch.manual_seed(recipe.seed)  # of what methods draw in `prepare`
        self.parameters = self.method.prepare(self.model)
        if recipe.temperature.learn and not any(p is self.model.logit_scale for p in self.parameters):
            self.model.logit_scale.requires_grad_(True)
            self.parameters.append(self.model.logit_scale)
        self.precision = Precision(recipe.precision, device)
        self.optimizer: torch.optim.Optimizer | None = None  # lives within one update
        self.clock = time.monotonic()

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["machine"] != machine():
            changed = f"{checkpoint['machine']} then, {machine()} now"
            print(f"{self.run.folder}: results may differ in their last bits: {changed}", file=sys.stderr)
        self.model.load_state_dict(checkpoint["model"])
        self.method.load_state(checkpoint["method"])
        self.precision.scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint["optimizer"] is not None:
            self.optimizer = self.method.optimizer(self.parameters, self.recipe.optimizer)
            self.optimizer.load_state_dict(checkpoint["optimizer"])

    def checkpoint(self) -> None:
        self.tick()
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        state = self.method.state()
        weights = self.model.state_dict()
        scaler = self.precision.scaler.state_dict()  # empty but in fp16
        self.run.save_checkpoint(
            model=weights, method=state, optimizer=optimizer, scaler=scaler, machine=machine()
        )

    def tick(self) -> None:
        """Add the time since the last tick to the run's."""
        now = time.monotonic()
        self.run.position.seconds += now - self.clock
        self.clock = now

    def live(self) -> None:
        position, updates = self.run.position, self.run.position.updates
        steps = self.recipe.steps
        with tqdm(total=updates * steps, initial=position.update * steps + position.step, unit="step") as bar:
            try:
                if not position.evaluated:
                    self.evaluate(bar)
                while position.update < updates:
                    bar.set_description(f"update {position.update + 1} of {updates}")
                    self.train_update(bar)
                    self.evaluate(bar)
            except Interrupted as stop:
                self.checkpoint()
                raise Interrupted(stop.signum, f"saved, go on with --resume: {self.run.folder}") from None

    def train_update(self, bar: tqdm) -> None:
        """Train one update from where it stands, and leave in the model what is deployed."""
        recipe, position = self.recipe, self.run.position
        batches = batches_of(self.material, recipe, position.update)
        if self.optimizer is None:
            self.method.before_update(self.model)
            self.optimizer = self.method.optimizer(self.parameters, recipe.optimizer)
        loader = Timed(batches.loader(position.step, self.workers, pin=self.device.type == "cuda"))
        steps = train(
            self.clip,
            self.method,
            self.optimizer,
            loader,
            lambda step: learning_rate(
                recipe.schedule, recipe.optimizer.lr, position.update, step, recipe.steps
            ),
            device=self.device,
            precision=self.precision,
            clip_norm=recipe.optimizer.clip_norm,
            max_scale=recipe.temperature.max,
            start=position.step,
        )
        pending: list[Step] = []
        saved = time.monotonic()
        for step in steps:
            pending.append(step)
            position.step, position.samples = step.number + 1, position.samples + recipe.optimizer.batch_size
            bar.update()
            if len(pending) == LOG_EVERY or position.step == recipe.steps or self.run.signum:
                self.log_steps(pending, loader)
            self.run.check()
            if not pending and time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.checkpoint()
                saved = time.monotonic()
        self.optimizer = None
        again = on_device(batches.loader(workers=self.workers), self.clip, self.device)
        self.method.after_update(self.model, again)
        position.update, position.step, position.evaluated = position.update + 1, 0, False

    def log_steps(self, pending: list[Step], loader: "Timed") -> None:
        """Read the losses of the last steps, stop if one is not finite, and write a line of train.jsonl."""
        losses = torch.stack([step.loss for step in pending]).tolist()
        update = self.run.position.update + 1
        for step, loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                kept = f"{self.run.folder} keeps the last good weights"
                raise Failure(f"update {update}, step {step.number}: the loss is {loss}; {kept}")
        last = pending[-1]
        seconds, waited = loader.lap()
        line = {
            "update": update,
            "step": last.number,
            "loss": sum(losses) / len(losses),
            "lr": last.lr,
            "logit_scale": self.model.logit_scale.item(),
            "grad_norm": last.grad_norm.item(),
            "samples_per_second": len(pending) * self.recipe.optimizer.batch_size / seconds,
            "data_wait": waited / seconds,
        }
        self.run.log("train.jsonl", line)
        pending.clear()

    def evaluate(self, bar: tqdm) -> None:
        """Score the deployed weights, keep them, and make the run resumable from here."""
        run, recipe, position = self.run, self.recipe, self.run.position
        last = position.update == position.updates
        if last or position.update % recipe.evaluation.every == 0:
            full = last or position.update == 0
            total = sum(len(t.usable if full else self.material.subsets[t.name]) for t in self.material.tests)
            with tqdm(total=total, desc="evaluating", unit="img", leave=False) as progress:

                def tick(n: int) -> None:
                    progress.update(n)
                    run.check()

                tests, subsets = self.material.tests, self.material.subsets
                scores, whole = evaluate(self.clip, tests, subsets, self.device, full=full, tick=tick)
            run.save_weights(self.clip, recipe.evaluation.keep_weights)
            self.tick()
            line = {"update": position.update, **as_metrics(scores)}
            if whole:
                line["full"] = as_metrics(whole)
            if position.update == 0:
                line["roles"] = {test.name: test.role for test in self.material.tests}
                if recipe.evaluation.frozen:
                    line["frozen"] = self.frozen_baseline()
            steps = position.update * recipe.steps
            spent = {"steps": steps, "samples": position.samples, "seconds": round(position.seconds, 3)}
            run.log("metrics.jsonl", {**line, **spent, "peak_memory": peak_memory(self.device)})
            bar.set_postfix(
                {key.upper(): f"{scores[key]:.1f}" for key in ("ka", "zs") if scores[key] is not None}
            )
        position.evaluated = True
        self.checkpoint()

    def frozen_baseline(self) -> list[float]:
        """KA of the frozen baseline over the whole stream, while the model is still the untouched one."""
        material = self.material
        tests = [t for t in material.tests if t.role == "adaptation" and t.task == "classification"]
        taught = (material.numbers([concepts]) for concepts in material.stream)
        with tqdm(desc="frozen baseline", unit="img", leave=False) as progress:

            def features(samples: Samples, numbers: np.ndarray) -> torch.Tensor:
                return image_features(self.clip, samples, numbers, self.device, progress.update)

            return trajectory(map(material.by_dataset, taught), tests, features) if tests else []


def set_temperature(model: nn.Module, temperature: Temperature) -> None:
    if temperature.init is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / temperature.init))
    if temperature.learn is False:
        model.logit_scale.requires_grad_(False)


def machine() -> dict:
    """What the last bits of a CPU run depend on."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; its ru_maxrss would include the process that started this one
    if status.exists():
        return (
            next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line) * 1024
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def default_folder(recipe_path: str, recipe: Recipe, data: str | None) -> Path:
    parts = [Path(recipe_path).stem, Path(recipe.scale).stem, *([Path(data).stem] if data else [])]
    return Path("runs") / "-".join([*parts, f"seed{recipe.seed}"])


def run_recipe(recipe: Recipe, folder: Path, *, resume: bool, device: str, workers: int = 0) -> str:
    """Run `recipe` in the run folder and write its report; -> a line about what came of it."""
    place = pick_device(device, recipe.threads)
    run, checkpoint = Run.open(folder, recipe, resume)
    if not run.position.finished:
        life = Life(recipe, starting_model(recipe.model, place), run, place, workers)
        run.begin(recipe, checkpoint)
        if checkpoint:
            life.restore(checkpoint)
        life.live()
    report = write_report([folder])
    first, *_, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changes = [
        f"{key.upper()} {first[key]:.1f} -> {last[key]:.1f}" for key in ("ka", "zs") if first[key] is not None
    ]
    return f"{', '.join(changes)} in {last['update']} updates; report: {report}"


def score_model(recipe: Recipe, device: str) -> dict:
    """The scores of the recipe's model on the whole test sets of the recipe's data."""
    place = pick_device(device, recipe.threads)
    clip = starting_model(recipe.model, place)
    clip.model.to(place)
    data = datafile.read(recipe.data)
    tests = open_tests(data, clip, data.image_size or clip.image_size)
    with tqdm(
        total=sum(len(test.usable) for test in tests), desc="evaluating", unit="img", leave=False
    ) as bar:
        return evaluate(clip, tests, {t.name: t.usable for t in tests}, place, tick=bar.update)[0]
