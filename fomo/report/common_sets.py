"""Runs that were not scored on the same test sets, compared on those that all of them have."""

import math
from dataclasses import replace

from fomo.report.run_records import SCORE_OF, Group, Record
from fomo.runs.logs import is_same_set, scored_sets


def comparable(groups: list[Group]) -> tuple[list[Group], str]:
    """-> the groups with KA, ZS and GM over the test sets that all have, and which those are; nothing if all are.

    Scores on whole test sets count only where all groups have them.
    """
    tested = [scored_sets(group.records[0].constants) for group in groups]
    names = list(dict.fromkeys(name for sets in tested for name in sets))
    common = [
        name for name in names if all(is_same_set(a.get(name), b.get(name)) for a in tested for b in tested)
    ]
    whole = all(group.whole for group in groups)
    if len(common) == len(names) and (whole or not any(group.whole for group in groups)):
        return groups, ""
    restricted = [replace(g, records=[on_sets(r, common, whole) for r in g.records]) for g in groups]
    return restricted, left_out(groups, tested, names, common) if len(common) < len(names) else ""


def on_sets(record: Record, names: list[str], whole: bool) -> Record:
    roles = record.constants["roles"]

    def on_line(line: dict) -> dict:
        full = line.get("full") if whole else None
        means = means_over(line.get("datasets") or {}, names, roles)
        return {**line, **means, "full": full and {**full, **means_over(full["datasets"], names, roles)}}

    evaluations = {update: on_line(line) for update, line in record.evaluations.items()}
    within = {place: on_line(line) for place, line in record.within.items()}
    return replace(record, evaluations=evaluations, within=within)


def means_over(scores: dict[str, float], names: list[str], roles: dict[str, str]) -> dict[str, float | None]:
    """KA, ZS and GM of some of the sets, as eval/zero_shot.py has them of all."""
    means: dict[str, float | None] = {}
    for key, role in SCORE_OF.items():
        of_role = [scores[name] for name in names if roles[name] == role and name in scores]
        means[key] = sum(of_role) / len(of_role) if of_role else None
    both = None not in means.values()
    return {**means, "gm": math.sqrt(means["ka"] * means["zs"]) if both else None}


def left_out(groups: list[Group], tested: list[dict], names: list[str], common: list[str]) -> str:
    """What the scores are means over, and which sets of which runs are not among it."""
    over = []
    for key, role in SCORE_OF.items():
        sets = [name for name in common if tested[0][name][0] == role]
        over.append(f"{key.upper()} over {', '.join(sets)}" if sets else f"{key.upper()} is n/a, over no set")
    others = []
    for name in names:
        owners = [group.label for group, sets in zip(groups, tested, strict=True) if name in sets]
        where = "not the same set in all" if len(owners) == len(groups) else f"only {', '.join(owners)}"
        others += [] if name in common else [f"{name} ({where})"]
    return f"On the test sets that all runs have: {'; '.join(over)}. Left out: {', '.join(others)}."
