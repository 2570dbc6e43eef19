"""What KA and ZS are in a run: a mean of other things than in the next one, if the test sets are others."""

from collections.abc import Iterable

from fomo.text import plural

RECALL_AT = 5  # of retrieval, the score
FEW = 20  # pictures below which a retrieval score is not far from chance
LISTED = 5  # names of sets that are scored by accuracy; beyond it their number
Sets = Iterable[tuple[str, str, int]]  # name, task, test pictures


def meaning(score: str, sets: Sets) -> str:
    """KA or ZS with the sets it is of, as: KA: accuracy on photos; recall@5 among 50 pictures on captions."""
    return f"{score}: {over(list(sets))}"


def in_words(sets: list[tuple[str, str, list[int]]]) -> str:
    """What a score is the mean over. sets: name, task, test pictures of each class (of retrieval of all)."""
    (name, task, counts), *others = sets
    if others or task == "retrieval":
        return over([(name, task, sum(counts)) for name, task, counts in sets])
    fewest = "" if min(counts) == max(counts) else f"{min(counts):,} to "
    classes = plural(len(counts), "class", "classes")
    return f"accuracy on {classes} of {name}, {fewest}{plural(max(counts), 'held-out picture')} each"


def over(sets: list[tuple[str, str, int]]) -> str:
    accuracy = [name for name, task, _ in sets if task == "classification"]
    listed = ", ".join(accuracy) if len(accuracy) <= LISTED else f"{len(accuracy)} sets"
    parts = [f"accuracy on {listed}"] if accuracy else []
    parts += [
        f"recall@{RECALL_AT} among {pictures:,} pictures on {name}"
        for name, task, pictures in sets
        if task == "retrieval"
    ]
    return "; ".join(parts) + (f"; the mean of {len(sets)} sets" if len(sets) > 1 else "")


def near_chance(sets: Sets) -> list[str]:
    """A line for each retrieval set of which a model that knows nothing finds much: k of n pictures, k / n."""
    lines = []
    for name, task, pictures in sets:
        if task == "retrieval" and pictures < FEW:
            chance = 100 * min(RECALL_AT / pictures, 1)
            found = (
                f"{pictures} test pictures are few, captions find theirs among {RECALL_AT} by chance alone"
            )
            lines.append(
                f"{name}: {found} in {chance:.0f}%; recall@1 says more, and more test pictures would"
            )
    return lines
