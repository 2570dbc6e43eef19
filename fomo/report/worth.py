"""Was the last update worth it? What else could have been done with it, beside what was deployed."""

import shlex

import numpy as np

from fomo.report.columns import Columns, Values
from fomo.report.figures import SCORES
from fomo.report.run_records import Group

NOTHING, TUNED, RIDGE = "doing nothing", "plain finetuning", "ridge regression on frozen features"


def choices(group: Group) -> dict[str, dict[str, np.ndarray]]:
    """What could have been done -> score -> (R,); nothing where the run did not score it."""
    curve = group.keep_curve()
    if curve is None:
        return {}
    named = {0.0: f"{TUNED} (keep 0)", 1.0: f"{NOTHING} (keep 1)"}
    found = {named.get(keep, f"interpolated: keep {keep:g}"): scores for keep, scores in curve.items()}
    rows = {named[1.0]: found.pop(named[1.0])}
    frozen = group.frozen()
    if frozen is not None:
        rows[RIDGE] = {"ka": frozen[:, -1]}
    return {**rows, **found}


def worth_table(group: Group) -> Columns:
    rows = choices(group)
    if not rows:
        return {}
    rows["this update, as deployed"] = {key: group.values(key)[:, -1] for key in SCORES}
    missing = np.array([np.nan])
    columns = {key.upper(): Values([scores.get(key, missing) for scores in rows.values()]) for key in SCORES}
    return {"instead": list(rows), **columns}


def verdict(group: Group) -> tuple[str, str]:
    """A sentence: whether anything else that was scored is better, by GM, or by KA where nothing must be kept.
    And the command that leads to it, if there is one. Nothing of a run that scored nothing beside.

    Better is what differs by more than the standard error of KA that comes of the few test pictures.
    """
    rows = choices(group)
    if not rows:
        return "", ""
    key = "gm" if np.isfinite(group.values("gm")[:, -1]).all() else "ka"
    deployed, error = group.values(key)[:, -1].mean(), standard_error(group)
    scored = {what: scores[key].mean() for what, scores in rows.items() if key in scores}
    if key == "ka" and group.choice:  # which weighed what other shares would have lost, and KA does not
        scored = {what: score for what, score in scored.items() if what == RIDGE or what.startswith(NOTHING)}
    best = max(scored, key=scored.get)
    nothing = next(value for what, value in scored.items() if what.startswith(NOTHING))
    found = f"Was it worth it? {key.upper()} {deployed:.1f}, doing nothing {nothing:.1f}"
    if group.choice:
        found += f" ({in_choice(group.choice)})"
    if scored[best] > deployed + error:
        return f"{found}; better: {best}, {scored[best]:.1f}.", how_to(best, group)
    return f"{found}; nothing else that was scored is clearly better.", ""


def in_choice(choice: dict) -> str:
    """What was chosen on validation pictures, and what they say of it."""
    chosen, tried = choice["chosen"], choice["tried"]
    if chosen["keep"] == 1:
        return "chosen: keep 1, the old model as it was, since nothing that was tried is better on validation"
    untouched = [row for row in tried if row["keep"] == 1]
    share = "" if chosen["keep"] is None else f"keep {chosen['keep']:g} "
    kept = f"{chosen['zs']:.1f} of {untouched[0]['zs']:.1f} kept" if untouched else f"ZS {chosen['zs']:.1f}"
    return f"chosen: {share}after step {chosen['step']}, KA {chosen['ka']:.1f} and {kept} on validation"


def standard_error(group: Group) -> float:
    """Of KA, from the number of its test pictures."""
    roles = group.records[0].constants["roles"]
    learnt = [name for name, role in roles.items() if role == "adaptation"]
    errors = np.array([group.values("stderr", name)[:, -1].mean() for name in learnt])
    return float(np.sqrt(np.square(errors).sum()) / len(learnt))


def how_to(choice: str, group: Group) -> str:
    """The command that leads to a better choice; of several runs, for the first. None leads to ridge regression.

    A child run's recipe cannot be run again without its parent, and `continue` takes no other keep.
    """
    run, child = str(group.records[0].folder), group.updates[0] > 0
    if choice.startswith(NOTHING):
        before = str(group.updates[-2])
        return shlex.join(["python", "fomo.py", "rollback", run, "--to", before])
    if choice == RIDGE or child or not group.interpolates:
        return ""
    keep = choice.rpartition("keep ")[2].rstrip(")")
    words = ["--recipe", f"{run}/recipe.yaml", "--set", f"method.keep={keep}", "--out", f"{run}-keep{keep}"]
    return shlex.join(["python", "fomo.py", "update", *words])
