"""Run folders as `update` writes them, and what tests read off a report."""

import json
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import yaml

from fomo.report import figures
from fomo.report import page as report
from fomo.report.run_records import Group, group_runs, read_run

ROLES = {"letters": "adaptation", "flags": "adaptation", "noisy": "evaluation", "gray": "evaluation"}


def scores(datasets: dict[str, float], roles: dict[str, str]) -> dict:
    means = {}
    for key, role in (("ka", "adaptation"), ("zs", "evaluation")):
        of_role = [datasets[name] for name in roles if roles[name] == role]
        means[key] = float(np.mean(of_role)) if of_role else None
    both = None not in means.values()
    return {**means, "gm": float(np.sqrt(means["ka"] * means["zs"])) if both else None, "datasets": datasets}


def make_run(
    folder: Path, *, seed=0, name="merge", updates=3, reached=None, roles=ROLES, full=False, new=False
) -> Path:
    """A run folder as `update` writes it, with scores that rise and fall by a few random points.

    `new`: with what runs did not write at first: budgets, the stream, transfer, further measures.
    """
    folder.mkdir(parents=True)
    recipe = {
        "scale": "tiny",
        "seed": seed,
        "stream": {"updates": updates},
        "method": {"name": name},
        "schedule": {"name": "cosine", "meta": "none", "warmup": 0.1},
        "optimizer": {"lr": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    constants = {"roles": roles, **(new_constants(updates, roles) if new else {})}
    (folder / "run.json").write_text(json.dumps(constants))
    rng = np.random.default_rng([seed, *name.encode()])
    lines, steps = [], []
    for update in range((updates if reached is None else reached) + 1):
        slope = {"adaptation": 8, "evaluation": -2}
        values = {n: 40 + update * slope[role] + float(rng.normal()) for n, role in roles.items()}
        line = {"update": update, **scores(values, roles), "steps": 50 * update, "peak_memory": 3 * 2**29}
        line["stderr"] = {n: 1 + i + update / 10 for i, n in enumerate(roles)}
        if full and update in (0, updates):
            line["full"] = scores({n: v + 1 for n, v in values.items()}, roles)
        lines.append({**line, **(new_keys(update, updates, roles) if new else {})})
        if update:
            steps += [{"update": update, "step": s, "loss": 2 / (s + 1)} for s in range(9, 50, 10)]
    write_lines(folder, lines)
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def new_constants(updates: int, roles: dict[str, str]) -> dict:
    taught = [name for name in roles if roles[name] == "adaptation"]
    stream = [{name: 3 + (t + i) % 4 for i, name in enumerate(taught)} for t in range(updates)]
    return {"stream": stream, "allowed": {"steps": 50, "mafs": 820.0, "seconds": None}}


def new_keys(update: int, updates: int, roles: dict[str, str]) -> dict:
    forward = None if update == updates else 1.5 * update
    moved = {"forward": forward, "backward": 1 - update, "forgetting": 0.5 * update}
    classes = {"top5": 90.0 + update, "class_recall": 40.25 + update}
    found = {"recall@1": 10.0 + update, "recall@5": 30.0 + update, "recall@10": 50.0 + update}
    return {
        "concept_means": {"ka": 41.5 + 5 * update, "zs": 38.5 - update},
        "transfer": moved if update else None,
        "drift": 1 - 0.0125 * update,
        "details": {name: found if name == "photos" else classes for name in roles},
        "gflops": 1000.0 * update,
        "mafs": 800.0 * update,
        "samples": 3200 * update,
        "seconds": 61.25 * update,
    }


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Tags, attributes, and the text of the tables' rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self.inside = set(), [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1].append(data)


def groups_of(*folders: Path) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders])


def curves_of(*folders: Path) -> list[figures.Curve]:
    return report.compare(groups_of(*folders))[0].what


def figure_of(draw, curves: list[figures.Curve]):
    with matplotlib.rc_context(figures.STYLE):
        figure = draw(curves)
        figure.draw_without_rendering()
    return figure
