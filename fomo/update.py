"""The whole experiment: stream -> train -> method -> evaluate -> save, for every update of a model's life."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from fomo.budget.mafs import Work, planned_steps, work_of
from fomo.clip import Clip, load
from fomo.datasets import datafile
from fomo.datasets.eval_sets import open_tests
from fomo.datasets.pools import Material, batches_of, open_material
from fomo.datasets.samples import Batch
from fomo.datasets.stream import composition
from fomo.devices import machine, peak_memory, pick_device
from fomo.distributed import ALONE, Ranks
from fomo.errors import Failure, FieldError, Interrupted, UserError
from fomo.eval.scorer import Scorer
from fomo.eval.zero_shot import as_metrics, concept_scores, evaluate
from fomo.methods import build_method
from fomo.methods.base import Inputs, Weights
from fomo.pretrain import starting_model
from fomo.recipe import Recipe, Temperature
from fomo.report.page import write_report
from fomo.runs.folder import Run
from fomo.schedules import learning_rate
from fomo.train import Precision, Step, Timed, on_device, train

LOG_EVERY = 20  # steps between readings of the loss: on a GPU each reading waits for the device
TIMED_STEPS = 5  # that calibrate a budget in hours, after one that warms up
CHECKPOINT_SECONDS = 300  # between checkpoints within an update


class Life:
    """A model living through its updates in one run folder."""

    def __init__(self, recipe: Recipe, clip: Clip, run: Run, device: torch.device, workers: int = 0):
        self.recipe, self.clip, self.run, self.device, self.workers = recipe, clip, run, device, workers
        self.ranks = run.ranks
        self.model = clip.model.to(device)
        self.method = build_method(recipe.method)
        self.material = material_of(recipe, clip, run)
        run.position.updates = len(self.material.stream)
        self.work = counted(recipe)
        if not run.position.steps:  # else an earlier process has planned, or timed, them
            run.position.steps = planned_steps(recipe, self.work, run.position.updates)
        set_temperature(self.model, recipe.temperature)
        if recipe.checkpointing:
            self.model.set_grad_checkpointing()
        self.method.keep_in(run.folder)
        torch.manual_seed(recipe.seed)  # of what methods draw in `prepare`
        self.parameters = self.method.prepare(self.model)
        if recipe.temperature.learn and not any(p is self.model.logit_scale for p in self.parameters):
            self.model.logit_scale.requires_grad_(True)
            self.parameters.append(self.model.logit_scale)
        self.precision = Precision(recipe.precision, device)
        self.optimizer: torch.optim.Optimizer | None = None  # lives within one update
        self.trunk: Weights = {}  # of an infinite schedule: what the next update goes on from
        self.tuned: Weights = {}  # by the last update, before any merge, for `evaluation.keeps`
        self.scorer = Scorer(clip, self.material, device, recipe.seed, run.check, self.ranks)
        self.clock = time.monotonic()

    def restore(self, checkpoint: dict) -> None:
        if checkpoint["machine"] != machine(self.ranks):
            changed = f"{checkpoint['machine']} then, {machine(self.ranks)} now"
            print(f"{self.run.folder}: results may differ in their last bits: {changed}", file=sys.stderr)
        self.model.load_state_dict(checkpoint["model"])
        self.method.load_state(checkpoint["method"])
        self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.trunk, self.tuned = checkpoint["trunk"], checkpoint["tuned"]
        self.scorer.original = checkpoint["original"]
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
            model=weights,
            method=state,
            optimizer=optimizer,
            scaler=scaler,
            trunk=self.trunk,
            tuned=self.tuned,
            original=self.scorer.original,
            machine=machine(self.ranks),
        )

    def tick(self) -> None:
        """Add the time since the last tick to the run's."""
        now = time.monotonic()
        self.run.position.seconds += now - self.clock
        self.clock = now

    def live(self) -> None:
        position, updates = self.run.position, self.run.position.updates
        done = position.update * position.steps + position.step
        with tqdm(total=updates * position.steps or None, initial=done, unit="step") as bar:
            try:
                if not position.evaluated:
                    self.evaluate(bar)
                if not position.steps:
                    self.calibrate()
                    bar.reset(updates * position.steps)
                while position.update < updates:
                    bar.set_description(f"update {position.update + 1} of {updates}")
                    self.train_update(bar)
                    self.evaluate(bar)
            except Interrupted as stop:
                self.checkpoint()
                self.ranks.barrier()  # else another could tell of the checkpoint before it is there
                raise Interrupted(stop.signum, f"saved, go on with --resume: {self.run.folder}") from None

    def train_update(self, bar: tqdm) -> None:
        """Train one update from where it stands, and leave in the model what is deployed."""
        recipe, position = self.recipe, self.run.position
        batches = batches_of(self.material, recipe, position.update, position.steps)
        if self.optimizer is None:
            self.begin_update()
        own = batches.rows(self.ranks.rank, self.ranks.world_size)
        loader = Timed(own.loader(position.step, self.workers, pin=self.device.type == "cuda"))
        fork = recipe.schedule.trunk_steps(position.steps) if recipe.schedule.meta == "infinite" else None
        pending: list[Step] = []
        saved = time.monotonic()
        for step in self.steps(loader, position.steps, start=position.step):
            pending.append(step)
            position.step, position.samples = step.number + 1, position.samples + recipe.optimizer.batch_size
            bar.update()
            if position.step == fork:
                self.trunk = self.method.export(self.model)
            late, signum = self.late(), self.run.signalled()
            if len(pending) == LOG_EVERY or position.step == position.steps or late or signum:
                self.log_steps(pending, loader)
            if signum:
                raise Interrupted(signum)
            if late:  # an hours budget ends an update before its last step
                break
            if not pending and time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.checkpoint()
                saved = time.monotonic()
        if fork and position.step < fork:
            self.trunk = self.method.export(self.model)
        self.optimizer = None
        if recipe.evaluation.keeps and position.update + 1 == position.updates:
            self.tuned = self.method.export(self.model)
        self.end_update(on_device(batches.loader(workers=self.workers), self.clip, self.device))
        position.update, position.step, position.evaluated = position.update + 1, 0, False

    def begin_update(self) -> None:
        if self.trunk:
            self.method.load(self.model, self.trunk)
        self.method.before_update(self.model)
        self.optimizer = self.method.optimizer(self.parameters, self.recipe.optimizer)

    def end_update(self, batches: Iterable[Inputs]) -> None:
        """On the first rank; the others go on from its state as if they resumed."""
        if self.ranks.first:
            self.method.after_update(self.model, batches, self.precision.autocast)
        if self.ranks.several:
            model, method = self.ranks.broadcast_object(
                lambda: (self.model.state_dict(), self.method.state())
            )
            if not self.ranks.first:
                self.model.load_state_dict(model)
                self.method.load_state(method)

    def steps(self, batches: Iterable[Batch], steps: int, start: int = 0) -> Iterator[Step]:
        """Train on the batches of one update, `steps` in all, from step `start`."""
        recipe, update = self.recipe, self.run.position.update
        return train(
            self.clip,
            self.method,
            self.optimizer,
            batches,
            lambda step: learning_rate(recipe.schedule, recipe.optimizer.lr, update, step, steps),
            device=self.device,
            precision=self.precision,
            clip_norm=recipe.optimizer.clip_norm,
            max_scale=recipe.temperature.max,
            start=start,
            accumulate=recipe.optimizer.accumulate,
            compile=recipe.compile,
            ranks=self.ranks,
        )

    def calibrate(self) -> None:
        """Fix the steps per update of a budget in hours: time a few, then go back to before them.

        What evaluating took once, and what the method adds after an update, is left for them.
        """
        position, count = self.run.position, 1 + TIMED_STEPS
        batches = batches_of(self.material, self.recipe, position.update, count)
        batches = batches.rows(self.ranks.rank, self.ranks.world_size)
        self.begin_update()
        seconds = []
        for step in self.steps(batches.loader(workers=self.workers), count):
            step.loss.item()  # waits for the device
            seconds.append(time.monotonic())
        each = (seconds[-1] - seconds[0]) / TIMED_STEPS
        self.optimizer = None
        self.restore(self.ranks.broadcast_object(self.run.latest_checkpoint))
        position.closing = position.seconds + each * self.work.gflops_per_update / self.work.gflops_per_step
        # A twentieth is left for steps that take longer than these: `late` would cut the cooldown off.
        position.steps = self.ranks.broadcast_object(lambda: math.floor(0.95 * self.remaining() / each))
        if position.steps < 1:
            hours = self.recipe.budget.hours
            least = hours + (each / 0.95 - self.remaining()) / 3600
            found = f"{hours:g} is too little for an evaluation and one step"
            raise UserError(f"budget.hours: {found}, accepted: at least {least:.3g}")
        self.checkpoint()

    def remaining(self) -> float:
        """Seconds that a budget in hours leaves for this update's steps."""
        position = self.run.position
        used = position.seconds - position.began + time.monotonic() - self.clock
        return self.recipe.budget.hours * 3600 - position.closing - used

    def late(self) -> bool:
        """Whether the update's time is up."""
        if self.recipe.budget.hours is None:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return bool(self.ranks.all_reduce_max(self.remaining() < 0))

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
        position = self.run.position
        if position.update in (0, position.updates) or position.update % self.recipe.evaluation.every == 0:
            line, by_concept = self.score()
            self.run.save_weights(self.clip, self.recipe.evaluation.keep_weights)
            self.tick()
            self.run.log("concepts.jsonl", by_concept)
            self.run.log("metrics.jsonl", {**line, **self.spent(), "peak_memory": peak_memory(self.device)})
            shown = {key.upper(): f"{line[key]:.1f}" for key in ("ka", "zs") if line[key] is not None}
            bar.set_postfix(shown)
        position.evaluated = True
        self.tick()
        position.began = position.seconds
        self.checkpoint()

    def score(self) -> tuple[dict, dict]:
        """The lines of metrics.jsonl, but for the costs, and of concepts.jsonl; a run's first say more."""
        run, material, asked = self.run, self.material, self.recipe.evaluation
        first = self.ranks.broadcast_object(lambda: not run.scored)
        last = run.position.update == run.position.updates
        scores, whole = self.scorer.score(full=first or last)
        line = {"update": run.position.update, **as_metrics(scores), "drift": self.scorer.drift()}
        by_concept = {"update": run.position.update, "datasets": concept_scores(scores)}
        if first:
            by_concept["classes"] = {test.name: test.classes for test in material.tests}
        if self.ranks.first:  # the others have no log of their own
            line["transfer"] = self.scorer.transfer(by_concept, run.folder / "concepts.jsonl")
        if whole:
            line["full"] = as_metrics(whole)
        if first:
            line["roles"] = {test.name: test.role for test in material.tests}
            line |= {"allowed": self.allowed(), "stream": composition(material.stream)}
            if asked.frozen:
                line["frozen"] = self.scorer.frozen_baseline()
        if last and self.tuned:
            line["keeps"] = self.scorer.keep_curve(run.weights_before(), self.tuned, asked.keeps)
            self.tuned = {}
        return line, by_concept

    def spent(self) -> dict:
        """What the life has cost so far."""
        position, work = self.run.position, self.work
        steps = position.samples // self.recipe.optimizer.batch_size
        gflops = work and steps * work.gflops_per_step + position.update * work.gflops_per_update
        return {
            "steps": steps,
            "samples": position.samples,
            "gflops": gflops,
            "mafs": work and gflops * work.multiplier,
            "seconds": round(position.seconds, 3),
        }

    def allowed(self) -> dict:
        """What each update may cost, in the units that the budget speaks of."""
        budget, position = self.recipe.budget, self.run.position
        return {
            "steps": position.steps or None,
            "mafs": budget.gflops and budget.gflops / position.updates,
            "seconds": budget.hours and budget.hours * 3600,
        }


def counted(recipe: Recipe) -> Work | None:
    """What training costs; None where it cannot be counted and the budget does not need it."""
    try:
        return work_of(recipe)
    except UserError as problem:
        if recipe.budget.gflops or recipe.budget.hours:
            raise
        print(f"{problem}; metrics.jsonl will not say the GFLOPs", file=sys.stderr)
        return None


def set_temperature(model: nn.Module, temperature: Temperature) -> None:
    if temperature.init is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / temperature.init))
    if temperature.learn is False:
        model.logit_scale.requires_grad_(False)


def divisible(recipe: Recipe, ranks: Ranks) -> None:
    """Whether every rank can have as many rows of a batch, and parts of them."""
    size, parts = recipe.optimizer.batch_size, recipe.optimizer.accumulate
    if size % ranks.world_size:
        found = f"{size} pairs for {ranks.world_size} ranks"
        raise FieldError("optimizer.batch_size", f"{found}, accepted: a multiple of {ranks.world_size}")
    if parts * ranks.world_size > size:
        found = f"{parts} parts of the {size // ranks.world_size} pairs of a rank"
        raise FieldError("optimizer.accumulate", f"{found}, accepted: at most a part per pair")


def material_of(recipe: Recipe, clip: Clip, run: Run) -> Material:
    """The first rank orders the stream and fills the caches, the others find both."""
    material = open_material(recipe, clip, run.life()) if run.ranks.first else None
    life = run.ranks.broadcast_object(lambda: material.life())
    return material or open_material(recipe, clip, life)


def live_through(
    recipe: Recipe, folder: Path, *, resume: bool, device: str, workers: int = 0, ranks: Ranks = ALONE
) -> None:
    """Run `recipe` in the run folder, to its end or to where it is interrupted."""
    divisible(recipe, ranks)
    place = pick_device(device, recipe.threads)
    run, checkpoint = Run.open(folder, recipe, resume, ranks)
    try:
        if run.position.finished:
            return
        with ranks.in_turn():  # the first pretrains a base model that is not there yet
            # A life that has begun carries its model with it: all weights are in the checkpoint.
            own = run.model if checkpoint else None
            clip = load(None, str(own)) if own and own.exists() else starting_model(recipe.model, place)
        life = Life(recipe, clip, run, place, workers)
        data = datafile.content(datafile.read(recipe.data))
        run.begin(recipe, data, life.material.life(), checkpoint)
        if checkpoint:
            life.restore(checkpoint)
        life.live()
    finally:
        run.close()


def run_recipe(
    recipe: Recipe, folder: Path, *, resume: bool, device: str, workers: int = 0, ranks: Ranks = ALONE
) -> str:
    """Run `recipe` in the run folder and write its report; -> a line about what came of it."""
    live_through(recipe, folder, resume=resume, device=device, workers=workers, ranks=ranks)
    return ranks.broadcast_object(lambda: told(folder))


def told(folder: Path) -> str:
    """Write the report of a run; -> a line about what came of it."""
    report = write_report([folder])
    first, *_, last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    changes = [
        f"{key.upper()} {first[key]:.1f} -> {last[key]:.1f}" for key in ("ka", "zs") if first[key] is not None
    ]
    lived = last["update"] - first["update"]
    return f"{', '.join(changes)} in {lived} update{'s' * (lived != 1)}; report: {report}"


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
