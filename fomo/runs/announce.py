"""What is said before an update trains: how long it is, in what precision, what is chosen, what KA and ZS mean."""

from collections.abc import Iterator

from fomo.choice import Choice
from fomo.datasets.pools import Pools
from fomo.datasets.remarks import of_batches
from fomo.eval.zero_shot import announced
from fomo.recipe import Recipe
from fomo.runs.folder import Position
from fomo.text import plural


def announcement(
    recipe: Recipe, pools: Pools, position: Position, choice: Choice, precision: str, begins: bool
) -> Iterator[str]:
    """The lines; the plan only where the run begins."""
    if begins:
        yield from planned(recipe, pools, position, choice, precision)
    pictures = {name: len(numbers) for name, numbers in pools.subsets.items()}
    yield from announced(pools.tests, pictures)


def planned(
    recipe: Recipe, pools: Pools, position: Position, choice: Choice, precision: str
) -> Iterator[str]:
    size = recipe.optimizer.batch_size
    if position.steps:  # else they are not timed yet
        updates = plural(position.updates - position.update, "update")
        how = "" if precision == "float32" else f", in {precision}"
        yield f"{updates} of {plural(position.steps, 'step')}, each of {size} pairs{how}"
    if choice:
        yield choice.plan(recipe, position.steps)
    for line in of_batches(size, pools.drawn(recipe)):
        yield f"warning: {line}"
