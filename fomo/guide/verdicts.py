"""What a reproduction found: a verdict for every claim, and the tables and pictures of every study.

claims.csv is for scripts, report.html for readers, and docs/reproduction.md says the same with the machine and the
commands; it is written when everything was run into the default folder.
"""

import csv
import io
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fomo.atomic import write_atomically
from fomo.guide.inequalities import (
    HOLDS,
    INAPPLICABLE,
    JOINT,
    OPEN,
    OPPOSITE,
    SCORED,
    WEAK,
    Comparison,
    Decision,
    ScoresBySeed,
    decide,
    judge,
)
from fomo.guide.studies import Claim, Study
from fomo.guide.tuning import choose_peak
from fomo.report.columns import deviation, number
from fomo.report.figures import Curve, plane_figure, render
from fomo.report.page import Card, html_page, picture
from fomo.text import plural

COLUMNS = ("claim", "study", "paper", "verdict", "effect", "low", "high", "n", "seconds")
FAILED, UNFINISHED, UNTESTED = "failed", "unfinished", "not tested"
# A claim's verdict: the first of these that one of its inequalities has, so it holds if all that it needs holds.
BY_WEIGHT = (UNTESTED, FAILED, UNFINISHED, OPPOSITE, INAPPLICABLE, OPEN, WEAK, HOLDS)
PER_PLANE = 6  # curves that a reader tells apart


@dataclass(frozen=True)
class Result:
    """What came of one inequality."""

    comparison: Comparison
    verdict: str
    decision: Decision | None = None

    def needs(self) -> str:
        """The inequality, with its margin in points of these runs where that is another than the paper's."""
        margin = self.decision and self.decision.margin
        return self.comparison.text + (f"; margin {margin:.2g}" if margin else "")

    def effect(self) -> str:
        """+1.2 [0.4, 2.0], without an interval where there is one seed."""
        if self.decision is None:
            return ""
        interval = " [{:.1f}, {:.1f}]".format(*self.decision.interval) if self.decision.interval else ""
        return f"{self.decision.effect:+.1f}{interval}"


@dataclass(frozen=True)
class Finding:
    """What came of one claim."""

    claim: Claim
    study: Study
    results: list[Result]  # of its inequalities
    seconds: float  # of all runs that it compares

    @property
    def verdict(self) -> str:
        found = {result.verdict for result in self.results}
        return next(verdict for verdict in BY_WEIGHT if verdict in found)

    @property
    def summary(self) -> str:
        """opposite (3 of 5 hold)"""
        hold = sum(result.verdict == HOLDS for result in self.results)
        return f"{self.verdict} ({hold} of {len(self.results)} hold)"

    @property
    def deciding(self) -> Result:
        """The inequality on which the verdict rests: of those that share it, the one furthest from holding."""
        share = [result for result in self.results if result.verdict == self.verdict]
        return min(share, key=lambda result: result.decision.slack if result.decision else 0.0)

    @property
    def n(self) -> int:
        """Seeds on which the verdict rests."""
        return self.deciding.decision.n if self.deciding.decision else 0

    def row(self) -> list[str]:
        """As in claims.csv."""
        decision = self.deciding.decision
        numbers = [decision.effect, *(decision.interval or [])] if decision else []
        effect, low, high = [f"{value:.3f}" for value in numbers] + [""] * (3 - len(numbers))
        paper, n, seconds = self.claim.paper or "", str(self.n), f"{self.seconds:.0f}"
        return [self.claim.id, self.study.name, paper, self.verdict, effect, low, high, n, seconds]


@dataclass(frozen=True)
class Outcome:
    """A study with the runs that have finished, at one scale."""

    study: Study
    scores: Mapping[str, ScoresBySeed]  # of the variants that exist at this scale
    seconds: Mapping[tuple[str, int], float]  # (variant, seed) -> of its run
    failed: frozenset[str] = frozenset()  # variants of which a run failed

    @cached_property
    def findings(self) -> list[Finding]:
        return [self.judge(claim) for claim in self.study.claims]

    def judge(self, claim: Claim) -> Finding:
        comparisons = claim.comparisons()
        compared = {variant for comparison in comparisons for variant in comparison.mentioned}
        spent = sum(seconds for (variant, _), seconds in self.seconds.items() if variant in compared)
        missing = {comparison.text: self.missing(comparison) for comparison in comparisons}
        decided = {c.text: decide(c, self.scores) for c in comparisons if not missing[c.text]}
        found = dict(zip(decided, judge(list(decided.values())), strict=True))
        results = [Result(c, missing[c.text] or found[c.text], decided.get(c.text)) for c in comparisons]
        return Finding(claim, self.study, results, spent)

    def missing(self, comparison: Comparison) -> str | None:
        """Why an inequality cannot be decided."""
        mentioned = comparison.mentioned
        if not set(mentioned) <= self.scores.keys():
            return UNTESTED
        if not self.failed.isdisjoint(mentioned):
            return FAILED
        shared = set.intersection(*(set(self.scores[name]) for name in mentioned))
        return None if shared else UNFINISHED

    def of_runs(self, variant: str, key: str, update: int = -1) -> np.ndarray:
        """A score of each of the variant's runs, (S,)."""
        return np.array([scores[key][update] for scores in self.scores.get(variant, {}).values()])

    def rows(self) -> list[list[str]]:
        """A row for the untouched model and for every variant: KA, ZS, GM and the number of runs."""
        rows = [["variant", *(key.upper() for key in SCORED), "n"]]
        if first := next((name for name, runs in self.scores.items() if runs), None):
            rows.append(["untouched model", *(shown(self.of_runs(first, key, 0)) for key in SCORED), ""])
        for name, runs in self.scores.items():
            n = f"{len(runs)}" + (", failed" if name in self.failed else "")
            rows.append([name, *(shown(self.of_runs(name, key)) for key in SCORED), n])
        return rows

    def needs_rows(self) -> list[list[str]]:
        """A row for every inequality of the claims."""
        rows = [
            [finding.claim.id, result.needs(), result.effect(), result.verdict]
            for finding in self.findings
            for result in finding.results
        ]
        return [["claim", "needs", "effect [95 %]", "verdict"], *rows] if rows else []

    def grid_rows(self) -> list[list[str]]:
        """The study's grid: GM of the variant at each place."""
        titles = list(next(iter(self.study.grid.values()), {}))
        body = [
            [row, *(shown(self.of_runs(cells[title], "gm")) for title in titles)]
            for row, cells in self.study.grid.items()
        ]
        return [["GM", *titles], *body] if body else []

    def best_peaks(self) -> list[list[str]]:
        """For each of the study's ladders the best peak learning rate, and all of its trials."""
        rows = []
        for name, peaks in self.study.peaks.items():
            variants = {float(peak): f"{name}@{float(peak):g}" for peak in peaks}
            trials = {peak: self.of_runs(variant, "gm") for peak, variant in variants.items()}
            seeds = max(map(len, trials.values()))
            trials = {peak: gm for peak, gm in trials.items() if len(gm) == seeds}
            if seeds < 2 or len(trials) < 2:  # without noise there is no choice
                continue
            untouched = self.of_runs(variants[min(trials)], "gm", 0)
            choice = choose_peak(trials, untouched)
            notes = (
                " (at the end of the ladder)" * choice.at_end
                + " (below the untouched model)" * choice.harmful
            )
            scores = ", ".join(f"{peak:g}: {number(gm)}" for peak, gm in trials.items())
            rows.append([name, f"{choice.peak:g}{notes}", f"{untouched.mean():.1f}", scores])
        return [["method", "best peak", "GM untouched", "GM by peak"], *rows] if rows else []

    def curves(self) -> dict[str, Curve]:
        return {name: curve(name, runs) for name, runs in self.scores.items() if runs}

    def planes(self) -> list[str]:
        """Pictures of the KA-ZS plane, so many that curves can be told apart; control and joint are in each."""
        curves = self.curves()
        always = [curves.pop(name) for name in ("control", JOINT) if name in curves]
        others, step = list(curves.values()), PER_PLANE - 1
        groups = [[*others[i : i + step], *always] for i in range(0, max(len(others), 1), step)]
        salts = (f"{self.study.name}{i}" for i in range(len(groups)))
        title = f"{self.study.title}: learned (up) against kept (right)"
        return [picture(plane_figure, g, title, salt) for g, salt in zip(groups, salts, strict=True) if g]


def shown(of_runs: np.ndarray) -> str:
    """Mean and spread; nothing of no runs."""
    return number(of_runs) if len(of_runs) else ""


def curve(name: str, runs: ScoresBySeed) -> Curve:
    values = {key: np.stack([scores[key] for scores in runs.values()]) for key in SCORED}  # (S, U)
    return Curve(
        label="joint upper bound" if name == JOINT else name,
        updates=list(range(values["ka"].shape[1])),
        mean={key: scores.mean(axis=0) for key, scores in values.items()},
        spread={key: deviation(scores) for key, scores in values.items()},
        joint=name == JOINT,
    )


# --- files -----------------------------------------------------------------------------------------------


def write_results(out: Path, outcomes: list[Outcome], scale: str) -> list[Finding]:
    """claims.csv and report.html in `out`; -> the findings, in the order of the claims."""
    findings = [finding for outcome in outcomes for finding in outcome.findings]
    findings.sort(key=lambda finding: rank(finding.claim.id))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *(finding.row() for finding in findings)])
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "claims.csv", text.getvalue().encode())
    write_atomically(out / "report.html", results_page(outcomes, findings, scale))
    return findings


def rank(claim: str) -> tuple[int, int, str]:
    """1 .. 24, T1 .. T5, others."""
    if claim.isdecimal():
        return 0, int(claim), ""
    return (1, int(claim[1:]), "") if claim[1:].isdecimal() else (2, 0, claim)


def tally(findings: list[Finding]) -> str:
    """12 holds, 3 opposite, ...; the four verdicts are named even where there are none."""
    found = [finding.verdict for finding in findings]
    others = [word for word in (INAPPLICABLE, FAILED, UNFINISHED, UNTESTED) if word in found]
    return ", ".join(f"{found.count(word)} {word}" for word in (HOLDS, WEAK, OPEN, OPPOSITE, *others))


def claims_rows(findings: list[Finding]) -> list[list[str]]:
    rows = [["claim", "says", "verdict", "effect [95 %]", "needs", "paper", "n", "study"]]
    for finding in findings:
        claim, deciding = finding.claim, finding.deciding
        says, effect = f"{claim.says} ({claim.place})", deciding.effect()
        found = [finding.summary, effect, deciding.needs(), claim.paper or "", str(finding.n)]
        rows.append([claim.id, says, *found, finding.study.name])
    return rows


METHOD = """\
Each claim was written down with its inequalities and margins before any run. Effects are points; `needs` is the
inequality on which the verdict rests, with the paper's margin and what it comes to in points of these runs: the
same share of the way from the untouched model to the joint run. Intervals are 95 %, paired over seeds. A claim
holds if all of its inequalities do. *Opposite*: the world contradicts one of them. *Right direction, below the
margin*: none is contradicted or open, but one is shown more weakly than the margin asks. *Not applicable*: it
speaks of a trade-off that these runs do not have, since the joint run keeps more than the untouched model. What
each word means exactly is said in `fomo/guide/inequalities.py`. A seed varies the stream, its
batches and the pictures of the rendered world. With one seed every claim is undecided. World, base models, peaks
and margins of `tiny` were frozen in commit 7b16d37, before any of its runs."""


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] * len(safe[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [safe[0], rule, *safe[1:]])


def results_page(outcomes: list[Outcome], findings: list[Finding], scale: str) -> bytes:
    title = f"The guide's claims at scale {Path(scale).stem}"
    note = f"{tally(findings)}. {METHOD.replace('`', '')}"
    cards = [Card(title, note, tables=[claims_rows(findings)])] if findings else []
    note = "Percent after the last update, mean ± standard deviation over n seeds."
    for outcome in outcomes:
        study = outcome.study.title
        cards.append(Card(study, note, figures=outcome.planes(), tables=tables_of(outcome)))
    return html_page(title, [[card] for card in cards], prose=True)


def tables_of(outcome: Outcome) -> list[list[list[str]]]:
    tables = outcome.rows(), outcome.needs_rows(), outcome.grid_rows(), outcome.best_peaks()
    return [rows for rows in tables if rows]


# --- docs/reproduction.md --------------------------------------------------------------------------------


def write_document(path: Path, outcomes: list[Outcome], findings: list[Finding], scale: str) -> None:
    """docs/reproduction.md: everything that was found, and how to find it again; guide.png beside it."""
    option = "" if scale == "tiny" else f" --scale {scale}"
    commands = [f"python fomo.py reproduce {o.study.name}{option}" for o in outcomes]
    parts = [
        "# Reproduction",
        f"Written by `python fomo.py reproduce{option}` on {machine()}. {tally(findings)}.",
        METHOD,
        "## Claims",
        markdown(claims_rows(findings)),
    ]
    for outcome, command in zip(outcomes, commands, strict=True):
        hours = sum(outcome.seconds.values()) / 3600
        parts += [
            f"## {outcome.study.title}",
            f"`{command}`: {plural(len(outcome.seconds), 'run')}, {hours:.1f} hours of single runs.",
        ]
        parts += [markdown(rows) for rows in tables_of(outcome)]
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())
    for outcome in outcomes:
        if outcome.study.name == "summary" and scale == "tiny":
            write_atomically(
                path.with_name("guide.png"), render(plane_figure, [*outcome.curves().values()], "png")
            )


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
