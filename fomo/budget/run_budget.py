"""The budget of a run on its way: what each update may cost, what was spent, the clock of a budget in hours."""

import math
import sys
import time

from fomo.budget.mafs import planned_steps, work_of
from fomo.errors import UserError
from fomo.recipe import Recipe
from fomo.runs.folder import Run

TIMED_STEPS = 5  # that calibrate a budget in hours, after one that warms up
RESERVE = 0.05  # of an update's hours, for slower steps than the timed ones: else its cooldown is cut off


class RunBudget:
    def __init__(self, recipe: Recipe, run: Run):
        self.recipe, self.run = recipe, run
        try:
            self.work = work_of(recipe)
        except UserError as problem:
            if recipe.budget.gflops or recipe.budget.hours:
                raise
            print(f"{problem}; metrics.jsonl will not say the GFLOPs", file=sys.stderr)
            self.work = None
        if not run.position.steps:  # else an earlier process has planned, or timed, them
            run.position.steps = planned_steps(recipe, self.work, run.position.updates)

    def allowed(self) -> dict:
        """What each update may cost, in the units that the budget speaks of."""
        budget, position = self.recipe.budget, self.run.position
        return {
            "steps": position.steps or None,
            "mafs": budget.gflops and budget.gflops / position.updates,
            "seconds": budget.hours and budget.hours * 3600,
        }

    def spent(self) -> dict:
        """What the run has cost so far."""
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

    def seconds_left(self) -> float:
        """That a budget in hours leaves for this update's steps; without one no end is near."""
        if self.recipe.budget.hours is None:
            return math.inf
        position = self.run.position
        used = position.seconds - position.began + time.monotonic() - self.run.clock
        return self.recipe.budget.hours * 3600 - position.closing - used

    def plan_hours(self, step_seconds: float) -> None:
        """Fix the steps per update of a budget in hours.

        What evaluating took once, and what the method adds after an update, is left for them.
        """
        position, work = self.run.position, self.work
        position.closing = position.seconds + step_seconds * work.gflops_per_update / work.gflops_per_step
        left = self.seconds_left()
        position.steps = math.floor((1 - RESERVE) * left / step_seconds)
        if position.steps < 1:
            hours = self.recipe.budget.hours
            least = hours + (step_seconds / (1 - RESERVE) - left) / 3600
            found = f"{hours:g} is too little for an evaluation and one step"
            raise UserError(f"budget.hours: {found}, accepted: at least {least:.3g}")
