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

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

Update = Sequence[tuple[str, int]]  # the (dataset, label) of its concepts


class Row(NamedTuple):
    """R[i]: T numbers, whatever the number of concepts."""

    update: int  # i
    scores: list[float | None]  # of updates 1 to T; None where nothing of it has a test picture


def row_of(line: dict, stream: Sequence[Update]) -> Row:
    """From a line of concepts.jsonl."""
    return Row(line["update"], [accuracy_on(concepts, line) for concepts in stream])


def row_of_sets(line: dict, stream: Sequence[Iterable[str]]) -> Row:
    """From a line of metrics.jsonl and the sets of each update: KA over these sets, each as a whole."""
    scores = [[line["datasets"][name] for name in names if name in line["datasets"]] for names in stream]
    return Row(line["update"], [fmean(found) if found else None for found in scores])


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
    scores = after_each(rows)
    if scores is None or any(score is None for row in scores for score in row):
        return None
    before = [fmean(row[j] for row in scores[:j]) for j in range(1, len(scores))]
    return {
        **({"transfer": fmean(before)} if before else {}),
        "average": fmean(map(fmean, scores)),
        "last": fmean(scores[-1]),
    }


def tic(rows: Sequence[Row]) -> dict[str, float] | None:
    """What TiC-CLIP reports of a model trained in time order (arXiv 2310.16226, section 2), periods as updates.

    None before the last update, or where an update was not scored; periods that have no score are left out.

        in_domain   mean of R[i][i], the diagonal
        backward    mean of R[i][j] over all j < i, below it: periods before the last one learned
        forward     mean of R[i][j] over all j > i, above it: periods yet to come

    These are scores; `backward` and `forward` of `transfer` are changes. A single period has only the first.
    """
    scores = after_each(rows)
    if scores is None:
        return None
    cells = [
        (i - j, score) for i, row in enumerate(scores) for j, score in enumerate(row) if score is not None
    ]
    kinds = {
        "in_domain": [score for ahead, score in cells if ahead == 0],
        "backward": [score for ahead, score in cells if ahead > 0],
        "forward": [score for ahead, score in cells if ahead < 0],
    }
    return {kind: fmean(found) for kind, found in kinds.items() if found}


def after_each(rows: Sequence[Row]) -> list[list[float | None]] | None:
    """R[1] to R[T]; None before the last update, or where an update was not scored."""
    if [row.update for row in rows] != list(range(len(rows[0].scores) + 1)):
        return None
    return [row.scores for row in rows[1:]]


def accuracy_on(concepts: Update, line: dict) -> float | None:
    """Mean over those that have a test picture; None if none has."""
    found = [concept_score(line["datasets"].get(dataset, []), label) for dataset, label in concepts]
    known = [score for score in found if score is not None]
    return fmean(known) if known else None


def concept_score(by_class: list[float | None], label: int) -> float | None:
    if len(by_class) == 1:  # a retrieval set is scored as a whole, whichever of its concepts is asked for
        return by_class[0]
    return by_class[label] if 0 <= label < len(by_class) else None
