"""Choices that are made on validation pictures: the share of the old model, and the step at which an update ends.

    method: {keep: auto}      of KEEPS (methods/merge.py)
    budget: auto              of POINTS steps, evenly spaced up to what the budget allows: early stopping

Both by the geometric mean of KA and ZS on pictures that nobody trains on and no score reports: a tenth of what is
to be learned, and a tenth of the sets that must be kept; without such sets rendered pictures stand for all that
the model knew (recipes/data/retention.yaml). Of equal scores the largest share of the old model wins. An update
ends early only where that is better by more than the standard error that so few pictures leave.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from fomo.eval.zero_shot import Scores
from fomo.methods.base import Method
from fomo.methods.merge import KEEPS
from fomo.recipe import Recipe
from fomo.runs.folder import Position
from fomo.text import plural
from fomo.weights import Weights

# Scorer.validate: weights, by the share of the old model in them -> their scores on the validation pictures
Validate = Callable[[Iterable[tuple[float | None, Weights]]], dict[float | None, Scores]]
POINTS = 4  # each costs a pass over the validation pictures for every share that is tried


@dataclass
class Choice:
    """Of one update, as far as it has got."""

    points: int = 0  # that are tried: 1, the end, if only the share is chosen; 0: nothing is
    pictures: int = 0  # of what is to be learned
    tried: list[dict] = field(default_factory=list)  # {"step", "keep", "ka", "zs", "gm"}
    best: Weights | None = None  # those tuned at the best step so far

    @classmethod
    def of(cls, recipe: Recipe, pictures: int) -> "Choice":
        return cls(POINTS if recipe.budget.auto else 1, pictures) if recipe.chooses else cls()

    def __bool__(self) -> bool:
        return self.points > 0

    def due(self, steps: int) -> list[int]:
        """After which of an update's steps something is tried; the last is its end."""
        return sorted({math.ceil(k * steps / self.points) for k in range(1, self.points + 1)})

    def try_out(self, position: Position, method: Method, model: nn.Module, validate: Validate) -> None:
        """Where it is due: score what could be deployed from here; keep the weights if this is the best step."""
        if position.step in self.due(position.steps):
            self.try_now(position.step, method, model, validate)

    def try_now(self, step: int, method: Method, model: nn.Module, validate: Validate) -> None:
        if any(row["step"] == step for row in self.tried):  # before the run was interrupted
            return
        if self.add(step, validate(method.deployable(model))) and self.points > 1:
            self.best = method.export(model)

    def decide(self, position: Position, method: Method, model: nn.Module, validate: Validate) -> None:
        """At the end of an update: go back to the best step, and tell the method the best share of the old."""
        if not self:
            return
        self.try_now(position.step, method, model, validate)
        if self.chosen["step"] != position.step:
            method.load(model, self.best)
        method.chosen = self.chosen["keep"]
        self.best = None

    @property
    def record(self) -> dict:
        """As a line of metrics.jsonl has it."""
        return {"choice": {"chosen": self.chosen, "tried": self.tried}} if self.tried else {}

    def tries(self, recipe: Recipe) -> int:
        """How often the validation pictures are scored in an update."""
        return self.points * (len(KEEPS) if recipe.chooses_keep else 1)

    def plan(self, recipe: Recipe, steps: int) -> str:
        """What is chosen, how."""
        what = []
        if recipe.chooses_keep:
            what.append(f"the share of the old model, of {', '.join(f'{keep:g}' for keep in KEEPS)}")
        if recipe.budget.auto and steps:  # else they are not timed yet
            what.append(f"the end of an update, after {', '.join(map(str, self.due(steps)))} steps")
        return f"chosen on {plural(self.pictures, 'validation picture')}: {'; '.join(what)}"

    def add(self, step: int, scores: dict[float | None, Scores]) -> bool:
        """By the share of the old model. -> whether this step is now the best."""
        self.tried += ({"step": step, "keep": keep, **found.means} for keep, found in scores.items())
        return best_of(self.tried)["step"] == step

    @property
    def chosen(self) -> dict:
        """Its row of `tried`."""
        best, last = best_of(self.tried), self.tried[-1]["step"]
        at_end = best_of([row for row in self.tried if row["step"] == last])
        return best if best["gm"] > at_end["gm"] + self.error(at_end) else at_end

    def error(self, row: dict) -> float:
        """The standard error of a GM: half of KA's relative one, which is binomial."""
        share = max(row["ka"] / 100, 1 / self.pictures)
        return row["gm"] / 2 * math.sqrt((1 - share) / (share * self.pictures))


def best_of(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: (row["gm"], row["keep"] or 0))
