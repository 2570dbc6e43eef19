"""The whole experiment: stream -> train -> method -> evaluate -> save, for every update of a model's life."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from fomo.budget.fitting import check_memory, memory_told
from fomo.budget.run_budget import TIMED_STEPS, RunBudget
from fomo.choice import Choice
from fomo.clip import Clip, load
from fomo.datasets import datafile
from fomo.datasets.eval_sets import described, to_choose_on
from fomo.datasets.mixture import Batches
from fomo.datasets.pools import Pools, open_pools
from fomo.datasets.remarks import Reader, glance
from fomo.datasets.samples import Batch
from fomo.datasets.stream import composition
from fomo.datasets.understood import opened_and_said
from fomo.devices import machine, peak_memory, pick_device
from fomo.distributed import ALONE, Ranks
from fomo.errors import Interrupted
from fomo.eval.scorer import Scorer
from fomo.methods import build_method
from fomo.methods.base import Inputs, Weights
from fomo.param_groups import param_groups
from fomo.pretrain import starting_model
from fomo.progress import Progress
from fomo.recipe import Recipe, Temperature
from fomo.runs.announce import announcement
from fomo.runs.folder import Run, way_on
from fomo.runs.step_log import StepLog, Timed
from fomo.schedules import learning_rate
from fomo.train import Step, on_device, train

CHECKPOINT_SECONDS = 300  # between checkpoints within an update


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    device: str,
    workers: int = 0,
    ranks: Ranks = ALONE,
    skip_bad: bool = False,
) -> None:
    """Run `recipe` in the run folder, to its end or to where it is interrupted."""
    ranks.check_batch(recipe.optimizer.batch_size, recipe.optimizer.accumulate)
    place = pick_device(device, recipe.threads)
    run, checkpoint = Run.open(folder, recipe, resume, ranks)
    try:
        if run.position.finished:
            return
        ranks.broadcast_object(lambda: check_memory(recipe, place, ranks.world_size))
        run.skip_bad = skip_bad or (resume and run.skipped_bad())
        data, opened = datafile.read(recipe.data, run.skip_bad, recipe.chooses), []
        begins = ranks.broadcast_object(lambda: not run.scored)
        if begins:
            ranks.broadcast_object(lambda: opened.extend(opened_and_said(data)))
        with ranks.in_turn():  # the first pretrains a base model that is not there yet
            # A run that has begun has its model with it: all weights are in the checkpoint.
            begun = checkpoint is not None and run.model.exists()
            clip = load(None, str(run.model)) if begun else starting_model(recipe.model, place)
        if begins and ranks.first:
            own = not (recipe.model.name or recipe.model.pretrained)
            reader = Reader(clip.config["model_cfg"], clip.tokenizer, own)
            for line in glance(data, reader, opened):
                Progress.write(f"warning: {line}", file=sys.stderr)
        trainer = Trainer(recipe, clip, run, place, workers)
        run.begin(recipe, datafile.content(data), trainer.pools.record(), trainer.constants(), checkpoint)
        if ranks.first:
            precision, choice = trainer.precision.name, trainer.choice
            for line in announcement(recipe, trainer.pools, run.position, choice, precision, begins):
                Progress.write(line, file=sys.stderr)
        if checkpoint:
            trainer.restore(checkpoint)
        with memory_told(lambda: f"{run.folder}: update {run.position.update + 1}, step {run.position.step}"):
            trainer.run_updates()
    finally:
        run.close()


class Trainer:
    """A model going through its updates in one run folder."""

    def __init__(self, recipe: Recipe, clip: Clip, run: Run, device: torch.device, workers: int = 0):
        self.recipe, self.clip, self.run, self.device, self.workers = recipe, clip, run, device, workers
        self.ranks, self.model = run.ranks, clip.model.to(device)
        clip.precision = recipe.precision
        self.precision = clip.precision_on(device)
        self.pools = pools_of_all_ranks(recipe, clip, run)
        run.position.updates = len(self.pools.stream)
        self.budget = RunBudget(recipe, run)
        self.method = build_method(recipe.method)
        self.parameters = self.prepare()
        self.optimizer: torch.optim.Optimizer | None = None  # lives within one update
        self.trunk: Weights = {}  # of an infinite schedule: what the next update goes on from
        self.tuned: Weights = {}  # by the last update, before any merge, for `evaluation.keeps`
        self.max_scale = self.bound_of_scale()
        sigmoid = getattr(self.model, "logit_bias", None) is not None
        self.equal_captions = recipe.loss.equal_captions or ("positives" if sigmoid else "negatives")
        self.choice = self.fresh_choice()
        self.scorer = Scorer(clip, self.pools, device, recipe.seed, run.check, self.ranks)
        self.bar = Progress(disable=True)

    def prepare(self) -> list[nn.Parameter]:
        """Make the model what is trained; -> its parameters that are."""
        recipe, model = self.recipe, self.model
        set_temperature(model, recipe.temperature)
        if recipe.checkpointing:
            model.set_grad_checkpointing()
        self.method.keep_in(self.run.folder)
        torch.manual_seed(recipe.seed)  # of what methods draw in `prepare`
        parameters = self.method.prepare(model)
        if recipe.temperature.learn and not any(p is model.logit_scale for p in parameters):
            parameters.append(model.logit_scale.requires_grad_(True))
        return parameters

    def bound_of_scale(self) -> float | None:
        """What exp(logit_scale) may reach: a model that starts above the bound (SigLIP: 112) keeps its start.

        None where nothing trains it.
        """
        bound, scale = self.recipe.temperature.max, self.model.logit_scale
        if bound is None or not any(p is scale for p in self.parameters):
            return None
        return max(bound, scale.exp().item())

    def run_updates(self) -> None:
        position, updates = self.run.position, self.run.position.updates
        done = position.update * position.steps + position.step
        with Progress(total=updates * position.steps or None, initial=done, unit="step") as self.bar:
            try:
                if not position.evaluated:
                    self.evaluate()
                if not position.steps:
                    self.calibrate()
                while position.update < updates:
                    self.bar.set_description(f"update {position.update + 1} of {updates}")
                    self.train_update()
                    self.evaluate()
            except Interrupted as stop:
                self.save_checkpoint()
                self.ranks.barrier()  # else another could tell of the checkpoint before it is there
                raise Interrupted(stop.signum, f"saved, go on with: {way_on(self.run.folder)}") from None

    def train_update(self) -> None:
        """Train one update from where it stands, and leave in the model what is deployed."""
        position = self.run.position
        batches = self.pools.batches(self.recipe, position.update, position.steps)
        if self.optimizer is None:
            self.begin_update()
        loader = self.loader(batches, position.step)
        log = StepLog(self.run, self.recipe.optimizer.batch_size, self.model.logit_scale)
        self.evaluate_within()
        self.try_out()
        for step in self.steps(loader, position.steps, start=position.step):
            position.step = step.number + 1
            position.samples += self.recipe.optimizer.batch_size
            if self.bookkeeping(step, log, loader):
                break  # a budget in hours ends an update before its last step
        self.end_update(batches)
        position.update, position.evaluated = position.update + 1, False
        position.step = position.within = 0

    def begin_update(self) -> None:
        if self.trunk:
            self.method.load(self.model, self.trunk)
        self.method.before_update(self.model)
        self.optimizer, self.choice = self.fresh_optimizer(), self.fresh_choice()

    def fresh_choice(self) -> Choice:
        return Choice.of(self.recipe, to_choose_on(self.pools.validation))

    def fresh_optimizer(self) -> torch.optim.Optimizer:
        settings = self.recipe.optimizer
        groups = param_groups(self.method.named_parameters(self.model), self.parameters, settings)
        return self.method.optimizer(groups, settings)

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
            max_scale=self.max_scale,
            start=start,
            draws=(recipe.seed, update),
            accumulate=recipe.optimizer.accumulate,
            compile=recipe.compile,
            ranks=self.ranks,
            equal_captions=self.equal_captions,
        )

    def end_update(self, batches: Batches) -> None:
        """The method's part is done on the first rank; the others go on from its state as if they resumed."""
        recipe, position = self.recipe, self.run.position
        self.choice.decide(position, self.method, self.model, self.scorer.validate)
        if recipe.schedule.meta == "infinite" and position.step < recipe.schedule.trunk_steps(position.steps):
            self.trunk = self.method.export(self.model)  # its time was up before the branch
        self.optimizer = None
        if recipe.evaluation.keeps and position.update + 1 == position.updates:
            self.tuned = self.method.export(self.model)
        if self.ranks.first:
            self.method.after_update(self.model, self.inputs(batches), self.precision.autocast)
        if self.ranks.several:
            model, method = self.ranks.broadcast_object(
                lambda: (self.model.state_dict(), self.method.state())
            )
            if not self.ranks.first:
                self.model.load_state_dict(model)
                self.method.load_state(method)

    def try_out(self) -> None:
        self.choice.try_out(self.run.position, self.method, self.model, self.scorer.validate)

    def inputs(self, batches: Batches) -> Iterator[Inputs]:
        """An update's batches once more, whole."""
        loader = batches.loader(workers=self.workers)
        return on_device(loader, self.clip, self.device, equal_captions=self.equal_captions)

    def loader(self, batches: Batches, start: int = 0) -> Timed:
        """This rank's rows of the batches from step `start`."""
        rows = batches.rows(self.ranks.rank, self.ranks.world_size)
        return Timed(rows.loader(start, self.workers, pin=self.device.type == "cuda"))

    # --- bookkeeping -------------------------------------------------------------------------------------

    def bookkeeping(self, step: Step, log: StepLog, loader: Timed) -> bool:
        """After each step: log it, keep the trunk, save, stop on a signal. -> whether the update's time is up."""
        position = self.run.position
        self.bar.update()
        schedule = self.recipe.schedule
        if schedule.meta == "infinite" and position.step == schedule.trunk_steps(position.steps):
            self.trunk = self.method.export(self.model)
        late, signum = self.late(), self.run.signalled()
        log.add(step, loader, now=late or bool(signum) or position.step == position.steps)
        if signum:
            raise Interrupted(signum)
        self.evaluate_within()
        self.try_out()
        if not (late or log.waiting) and time.monotonic() - log.saved > CHECKPOINT_SECONDS:
            self.save_checkpoint()
            log.saved = time.monotonic()
        return late

    def late(self) -> bool:
        """Whether the time of an update with a budget in hours is up."""
        if self.recipe.budget.hours is None:
            return False
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return bool(self.ranks.all_reduce_max(self.budget.seconds_left() < 0))

    def calibrate(self) -> None:
        """Fix the steps per update of a budget in hours: time a few, then go back to before them."""
        position, count = self.run.position, 1 + TIMED_STEPS
        batches = self.pools.batches(self.recipe, position.update, count)
        self.begin_update()
        seconds = []
        for step in self.steps(self.loader(batches), count):
            step.loss.item()  # waits for the device
            seconds.append(time.monotonic())
        self.optimizer = None
        self.restore(self.ranks.broadcast_object(self.run.latest_checkpoint))
        self.budget.plan_hours((seconds[-1] - seconds[0]) / TIMED_STEPS)
        position.steps = self.ranks.broadcast_object(lambda: position.steps)
        self.bar.reset(position.updates * position.steps)
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        self.run.add_seconds()
        self.run.save_checkpoint(
            model=self.model.state_dict(),
            method=self.method.state(),
            optimizer=self.optimizer.state_dict() if self.optimizer else None,
            scaler=self.precision.scaler.state_dict(),  # empty but in fp16
            trunk=self.trunk,
            tuned=self.tuned,
            original=self.scorer.original,
            choice=vars(self.choice),
            max_scale=self.max_scale,
            machine=machine(self.ranks, self.precision.name),
        )

    def restore(self, checkpoint: dict) -> None:
        now = machine(self.ranks, self.precision.name)
        if checkpoint["machine"] != now:
            changed = f"{checkpoint['machine']} then, {now} now"
            print(f"{self.run.folder}: results may differ in their last bits: {changed}", file=sys.stderr)
        self.model.load_state_dict(checkpoint["model"])
        self.method.load_state(checkpoint["method"])
        self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.trunk, self.tuned = checkpoint["trunk"], checkpoint["tuned"]
        self.scorer.original = checkpoint["original"]
        self.max_scale = checkpoint.get("max_scale", self.max_scale)
        self.choice = Choice(**checkpoint.get("choice", {}))
        if checkpoint["optimizer"] is not None:
            self.optimizer = self.fresh_optimizer()
            self.optimizer.load_state_dict(checkpoint["optimizer"])

    # --- scores ------------------------------------------------------------------------------------------

    def constants(self) -> dict:
        """run.json: what is the same in all lines of the logs."""
        return {
            **described(self.pools.tests, self.pools.subsets),
            "stream": composition(self.pools.stream),
            "allowed": self.budget.allowed(),
        }

    def evaluate(self) -> None:
        """Score the deployed weights, keep them, and make the run resumable from here."""
        run, position = self.run, self.run.position
        update = position.update
        begins = self.ranks.broadcast_object(lambda: not run.scored)  # a child may at any update
        if begins or update in (1, position.updates) or update % self.recipe.evaluated_every == 0:
            line, by_class, predictions = self.score()
            run.save_weights(self.clip, self.recipe.evaluation.keep_weights)
            run.add_seconds()
            run.log("concepts.jsonl", by_class)
            if predictions:
                run.log("predictions.jsonl", {"update": update, "datasets": predictions})
            run.log("metrics.jsonl", {**line, **self.budget.spent(), "peak_memory": peak_memory(self.device)})
            shown = {key.upper(): f"{line[key]:.1f}" for key in ("ka", "zs") if line[key] is not None}
            self.bar.set_postfix(shown)
        position.evaluated = True
        run.add_seconds()
        position.began = position.seconds
        self.save_checkpoint()

    def evaluate_within(self) -> None:
        """Score the weights in training where `evaluation.within` asks for it: a line that says its step, too."""
        position, count = self.run.position, self.recipe.evaluation.within + 1
        due = sum(position.step * count >= k * position.steps for k in range(1, count))
        if position.step and due > position.within:
            scores, _ = self.scorer.score()
            position.within = due
            line = {"update": position.update, "step": position.step, **scores.as_metrics()}
            self.run.log("metrics.jsonl", {**line, **self.budget.spent()})

    def score(self) -> tuple[dict, dict, dict]:
        """The lines of metrics.jsonl, but for the costs, and of concepts.jsonl; at first and last predictions."""
        run, wanted = self.run, self.recipe.evaluation
        first = self.ranks.broadcast_object(lambda: not run.scored)
        last = run.position.update == run.position.updates
        scores, whole = self.scorer.score(full=first or last)
        line = {"update": run.position.update, **scores.as_metrics(), "drift": self.scorer.drift()}
        by_class = {"update": run.position.update, "datasets": scores.by_class()}
        if self.ranks.first:  # the others have no log
            line |= self.scorer.of_stream(line, by_class, run.lines, last and bool(self.recipe.stream.every))
        line |= self.choice.record
        predictions = self.scorer.predictions(scores) if first or last else {}
        if whole:
            line["full"] = whole.as_metrics()
        if first and wanted.frozen:
            line["frozen"] = self.scorer.ridge_baseline()
        if last and self.tuned:
            line["keeps"] = self.scorer.keep_curve(run.weights_before(), self.tuned, wanted.keeps)
            self.tuned = {}
        return line, by_class, predictions


def set_temperature(model: nn.Module, temperature: Temperature) -> None:
    if temperature.init is not None:
        with torch.no_grad():
            model.logit_scale.fill_(math.log(1 / temperature.init))
    if temperature.learn is False:
        model.logit_scale.requires_grad_(False)


def pools_of_all_ranks(recipe: Recipe, clip: Clip, run: Run) -> Pools:
    """The first rank orders the stream and fills the caches, the others find both."""
    pools = open_pools(recipe, clip, run.stream(), run.skip_bad) if run.ranks.first else None
    record = run.ranks.broadcast_object(lambda: pools.record())
    return pools or open_pools(recipe, clip, record, run.skip_bad)
