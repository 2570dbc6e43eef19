"""Choices that are made on validation pictures: the share of the old model, and the step at which an update ends.

    method: {keep: auto}      of KEEPS (methods/merge.py)
    budget: auto              of POINTS steps, evenly spaced up to what the budget allows: early stopping

Both by the geometric mean of KA and ZS on pictures that nobody trains on and no score reports: a tenth of what is
to be learned, and a tenth of the sets that must be kept; without such sets rendered pictures stand for all that
the model knew (recipes/data/retention.yaml). Of equal scores the largest share of the old model wins. An update
ends early only where that is better by more than the standard error that so few pictures leave.
"""

import math
from dataclasses import dataclass, field

from fomo.eval.zero_shot import Scores
from fomo.methods.merge import KEEPS
from fomo.recipe import Recipe
from fomo.text import plural
from fomo.weights import Weights

POINTS = 4


@dataclass
class Choice:
    """Of one update, as far as it has got."""

    points: int  # that are tried: 1, the end, if only the share is chosen
    pictures: int  # of what is to be learned
    tried: list[dict] = field(default_factory=list)  # {"step", "keep", "ka", "zs", "gm"}
    best: Weights | None = None  # those tuned at the best step so far

    @classmethod
    def of(cls, recipe: Recipe, pictures: int) -> "Choice | None":
        """None where nothing is left to choose."""
        if not recipe.chooses:
            return None
        return cls(POINTS if recipe.budget.auto else 1, pictures)

    def due(self, steps: int) -> list[int]:
        """After which of an update's steps something is tried; the last is its end."""
        return sorted({math.ceil(k * steps / self.points) for k in range(1, self.points + 1)})

    def is_due(self, step: int, steps: int) -> bool:
        return step in self.due(steps) and not self.was_tried(step)

    def tries(self, recipe: Recipe) -> int:
        """How often the validation pictures are scored in an update."""
        return self.points * (len(KEEPS) if recipe.method.get("keep") == "auto" else 1)

    def plan(self, recipe: Recipe, steps: int) -> str:
        """What is chosen, how."""
        share = f"the share of the old model, of {', '.join(f'{keep:g}' for keep in KEEPS)}"
        after = f"the end of an update, after {', '.join(map(str, self.due(steps)))} steps" if steps else ""
        what = [share] * (recipe.method.get("keep") == "auto") + [after] * (
            recipe.budget.auto and bool(after)
        )
        return f"chosen on {plural(self.pictures, 'validation picture')}: {'; '.join(what)}"

    def was_tried(self, step: int) -> bool:
        return any(row["step"] == step for row in self.tried)

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
