"""What an update does to the concepts of other updates: forward and backward transfer, forgetting.

R[i][j] is the mean accuracy over the concepts of update j after update i, in percent; R[0] is the untouched model.
After update i, as means over updates j:

    backward     over j < i:  R[i][j] - R[j][j]                    later learning helped (+) or hurt (-)
    forgetting   over j < i:  max_{j <= l < i} R[l][j] - R[i][j]   what is lost of the best there was
    forward      over j > i:  R[i][j] - R[0][j]                    what concepts gained that are yet to come

Backward transfer is that of Lopez-Paz & Ranzato 2017 (arXiv 1706.08840, eq. 3), forgetting that of Chaudhry et al.
2018 (arXiv 1801.10112, eq. 3). Both define them for the end of the stream, here they are there after each update.

Differs: their forward transfer looks at update i + 1 alone and compares with random weights; a pretrained model
knows something of every concept, so the untouched model is the measure, for all updates to come. Forgetting looks
for the best from update j on: what a concept lost before it was learned is forward transfer. With
`evaluation.every` above 1, R[j][j] is from the first evaluation at or after j, and j < i means that it came before
the newest. Concepts without a test picture are left out, and so are updates of which no concept has one.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

Update = Sequence[tuple[str, int]]  # the (dataset, label) of its concepts


class Row(NamedTuple):
    """R[i]: T numbers, whatever the number of concepts."""

    update: int  # i
    scores: list[float | None]  # of updates 1 to T; None where no concept has a test picture


def row_of(line: dict, stream: Sequence[Update]) -> Row:
    """From a line of concepts.jsonl."""
    return Row(line["update"], [accuracy_on(concepts, line) for concepts in stream])


def transfer(rows: Sequence[Row]) -> dict[str, float | None]:
    """The three after the newest of `rows`, which begin with update 0; None where undefined."""
    newest = rows[-1].update
    backward, forgetting, forward = [], [], []
    for i, now in enumerate(rows[-1].scores):
        if now is None:
            continue
        if i + 1 > newest:
            forward.append(now - rows[0].scores[i])
        elif then := [row.scores[i] for row in rows[:-1] if row.update > i]:
            backward.append(now - then[0])
            forgetting.append(max(then) - now)
    return {
        "forward": fmean(forward) if forward and newest else None,
        "backward": fmean(backward) if backward else None,
        "forgetting": fmean(forgetting) if forgetting else None,
    }


def mtil(rows: Sequence[Row]) -> dict[str, float] | None:
    """What papers on multi-domain task-incremental learning report (ZSCL, arXiv 2303.06628), updates as tasks.

    None before the last update, or where an update was not scored.

        transfer   mean over j > 1 of the mean of R[i][j] over i < j, i from 1: what is yet to come
        average    mean of R[i][j] over all i from 1 and j
        last       mean of R[T][j] over j

    With a dataset an update (`stream.per_dataset`), R is its mean accuracy over classes.
    """
    updates = len(rows[0].scores)
    known = all(score is not None for row in rows for score in row.scores)
    if [row.update for row in rows] != list(range(updates + 1)) or not known:
        return None
    scores = [row.scores for row in rows[1:]]
    before = [fmean(row[j] for row in scores[:j]) for j in range(1, updates)]
    return {
        **({"transfer": fmean(before)} if before else {}),
        "average": fmean(map(fmean, scores)),
        "last": fmean(scores[-1]),
    }


def accuracy_on(concepts: Update, line: dict) -> float | None:
    """Mean over those that have a test picture; None if none has."""
    found = [concept_score(line["datasets"].get(dataset, []), label) for dataset, label in concepts]
    known = [score for score in found if score is not None]
    return fmean(known) if known else None


def concept_score(by_class: list[float | None], label: int) -> float | None:
    if len(by_class) == 1:  # a retrieval set is scored as a whole, whichever of its concepts is asked for
        return by_class[0]
    return by_class[label] if 0 <= label < len(by_class) else None
