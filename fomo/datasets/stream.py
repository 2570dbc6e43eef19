"""Streams: all concepts in order, cut into T updates (paper, section 3.3)."""

import itertools
from typing import NamedTuple

import numpy as np

from fomo.errors import UserError


class Concept(NamedTuple):
    """One class of one dataset."""

    dataset: str
    label: int  # -1: the whole of a set without classes
    name: str


def order_concepts(concepts: list[Concept], order: str, seed: int, reverse: bool = False) -> list[Concept]:
    """All concepts in the order of the stream."""
    if order != "random":
        raise ValueError(f"unknown order {order!r}")
    permutation = np.random.default_rng([seed, 0x57EA]).permutation(len(concepts))
    ordered = [concepts[i] for i in permutation]
    return ordered[::-1] if reverse else ordered


def cut(concepts: list[Concept], updates: int) -> list[list[Concept]]:
    """T contiguous chunks; the first N mod T are one concept longer (as the released code)."""
    if updates > len(concepts):
        raise UserError(
            f"stream.updates: {updates} updates need as many concepts, the data has {len(concepts)}"
        )
    size, longer = divmod(len(concepts), updates)
    starts = [t * size + min(t, longer) for t in range(updates + 1)]
    return [concepts[a:b] for a, b in itertools.pairwise(starts)]
