"""What a reproduction found: a verdict for every claim, and the tables and pictures of every study.

claims.csv is for scripts, claims.md and report.html are for readers, and docs/reproduction.md is the first of
them with the machine and the commands, written when everything was run into the default folder.
"""

import csv
import io
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.atomic import write_atomically
from fomo.guide.inequalities import JOINT, Decision, Lives, decide, deciding, verdict_of
from fomo.guide.studies import Claim, Study
from fomo.report.columns import deviation, number
from fomo.report.figures import SCORES, Curve, plane_figure
from fomo.report.page import Card, html_page, picture

COLUMNS = ("claim", "study", "paper", "verdict", "effect", "low", "high", "n", "seconds")
FAILED, UNFINISHED, UNTESTED = "failed", "unfinished", "not tested"
SETTLED = ("holds", "does not hold", "undecided")
PER_PLANE = 6  # curves that a reader tells apart


@dataclass(frozen=True)
class Finding:
    """What came of one claim."""

    claim: Claim
    study: Study
    verdict: str
    decision: Decision | None  # of the inequality on which it rests
    seconds: float  # of all runs that it compares

    def row(self) -> dict[str, str]:
        """As in claims.csv."""
        decision = self.decision
        low, high = (decision and decision.interval) or (None, None)
        return {
            "claim": self.claim.id,
            "study": self.study.name,
            "paper": self.claim.paper or "",
            "verdict": self.verdict,
            "effect": f"{decision.effect:.3f}" if decision else "",
            "low": "" if low is None else f"{low:.3f}",
            "high": "" if high is None else f"{high:.3f}",
            "n": str(len(decision.seeds)) if decision else "0",
            "seconds": f"{self.seconds:.0f}",
        }


@dataclass(frozen=True)
class Outcome:
    """A study with the runs that have finished, at one scale."""

    study: Study
    here: list[str]  # its variants at this scale
    lives: Lives
    seconds: Mapping[tuple[str, int], float]  # (variant, seed) -> of its run
    failed: frozenset[str] = frozenset()  # variants of which a run failed

    def findings(self) -> list[Finding]:
        return [self.judge(claim) for claim in self.study.claims]

    def judge(self, claim: Claim) -> Finding:
        comparisons = claim.comparisons()
        compared = {variant for comparison in comparisons for variant in comparison.mentioned}
        spent = sum(seconds for (variant, _), seconds in self.seconds.items() if variant in compared)
        decisions = [decide(comparison, self.lives) for comparison in comparisons]
        for problem, verdict in ((compared - set(self.here), UNTESTED), (compared & self.failed, FAILED)):
            if problem:
                return Finding(claim, self.study, verdict, None, spent)
        if None in decisions:
            return Finding(claim, self.study, UNFINISHED, None, spent)
        return Finding(claim, self.study, verdict_of(decisions), deciding(decisions), spent)

    def scores(self, variant: str, key: str, update: int = -1) -> np.ndarray:
        """A score of each of the variant's runs, (S,)."""
        return np.array([life[key][update] for life in self.lives.get(variant, {}).values()])

    def rows(self) -> list[list[str]]:
        """A row for the untouched model and for every variant: KA, ZS, GM and the number of runs."""
        rows = [["variant", *(key.upper() for key in SCORES), "n"]]
        if some := next((name for name in self.here if self.lives.get(name)), None):
            rows.append(["untouched model", *(shown(self.scores(some, key, 0)) for key in SCORES), ""])
        for name in self.here:
            n = f"{len(self.lives.get(name, {}))}" + (", failed" if name in self.failed else "")
            rows.append([name, *(shown(self.scores(name, key)) for key in SCORES), n])
        return rows

    def needs_rows(self) -> list[list[str]]:
        """A row for every inequality of the claims."""
        rows = []
        for claim in self.study.claims:
            for comparison in claim.comparisons():
                decision = decide(comparison, self.lives)
                verdict = decision.verdict if decision else UNFINISHED
                rows.append([claim.id, comparison.text, effect_of(decision), verdict])
        return [["claim", "needs", "effect [95 %]", "verdict"], *rows] if rows else []

    def grid_rows(self) -> list[list[str]]:
        """The study's grid: GM of the variant at each place."""
        titles = list(next(iter(self.study.grid.values()), {}))
        body = [
            [row, *(shown(self.scores(cells[title], "gm")) for title in titles)]
            for row, cells in self.study.grid.items()
        ]
        return [["GM", *titles], *body] if body else []

    def best_peaks(self) -> list[list[str]]:
        """For each of the study's ladders the peak learning rate of the highest GM, and all of its trials."""
        rows = []
        for name, peaks in self.study.peaks.items():
            means = {float(p): self.scores(f"{name}@{float(p):g}", "gm") for p in peaks}
            known = {peak: scores.mean() for peak, scores in means.items() if len(scores)}
            best = f"{max(known, key=known.get):g}" if known else ""
            trials = ", ".join(f"{peak:g}: {score:.1f}" for peak, score in known.items())
            edge = " (at the end of the ladder)" if known and float(best) in (min(known), max(known)) else ""
            rows.append([name, best + edge, trials])
        return [["method", "best peak", "GM by peak"], *rows] if rows else []

    def planes(self) -> list[str]:
        """Pictures of the KA-ZS plane, so many that curves can be told apart; control and joint are in each."""
        curves = {name: curve(name, self.lives[name]) for name in self.here if self.lives.get(name)}
        always = [curves.pop(name) for name in ("control", JOINT) if name in curves]
        others, step = list(curves.values()), PER_PLANE - 1
        groups = [[*others[i : i + step], *always] for i in range(0, max(len(others), 1), step)]
        salts = (f"{self.study.name}{i}" for i in range(len(groups)))
        return [picture(plane_figure, g, salt) for g, salt in zip(groups, salts, strict=True) if g]


def shown(of_runs: np.ndarray) -> str:
    """Mean and spread; nothing of no runs."""
    return number(of_runs) if len(of_runs) else ""


def effect_of(decision: Decision | None) -> str:
    """+1.2 [0.4, 2.0], without an interval where there is one seed."""
    if decision is None:
        return ""
    interval = " [{:.1f}, {:.1f}]".format(*decision.interval) if decision.interval else ""
    return f"{decision.effect:+.1f}{interval}"


def curve(name: str, lives: Mapping[int, Mapping[str, np.ndarray]]) -> Curve:
    values = {key: np.stack([life[key] for life in lives.values()]) for key in SCORES}  # (S, U)
    return Curve(
        label=name,
        updates=list(range(values["ka"].shape[1])),
        mean={key: scores.mean(axis=0) for key, scores in values.items()},
        spread={key: deviation(scores) for key, scores in values.items()},
        joint=name == JOINT,
    )


# --- files -----------------------------------------------------------------------------------------------


def write_results(out: Path, outcomes: list[Outcome], scale: str) -> list[Finding]:
    """claims.csv, claims.md and report.html in `out`; -> the findings, in the order of the claims."""
    findings = [finding for outcome in outcomes for finding in outcome.findings()]
    findings.sort(key=lambda finding: rank(finding.claim.id))
    text = io.StringIO()
    lines = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    lines.writeheader()
    lines.writerows(finding.row() for finding in findings)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "claims.csv", text.getvalue().encode())
    write_atomically(out / "claims.md", claims_page(findings, scale).encode())
    write_atomically(out / "report.html", results_page(outcomes, findings, scale))
    return findings


def rank(claim: str) -> tuple[int, int, str]:
    """1 .. 24, T1 .. T5, others."""
    if claim.isdecimal():
        return 0, int(claim), ""
    return (1, int(claim[1:]), "") if claim[1:].isdecimal() else (2, 0, claim)


def tally(findings: list[Finding]) -> str:
    """12 hold, 3 do not hold, ..., the undecided counted in the open."""
    verdicts = [finding.verdict for finding in findings]
    kinds = [*SETTLED, *(kind for kind in (FAILED, UNFINISHED, UNTESTED) if kind in verdicts)]
    return ", ".join(f"{verdicts.count(kind)} {kind}" for kind in kinds)


def claims_rows(findings: list[Finding]) -> list[list[str]]:
    head = ["claim", "says", "verdict", "effect [95 %]", "needs", "paper", "n", "study"]
    rows = [
        [
            finding.claim.id,
            f"{finding.claim.says} ({finding.claim.place})",
            finding.verdict,
            effect_of(finding.decision),
            finding.decision.comparison.text if finding.decision else "",
            finding.claim.paper or "",
            finding.row()["n"],
            finding.study.name,
        ]
        for finding in findings
    ]
    return [head, *rows]


METHOD = """\
Each claim was written down with its inequalities and margins before any run. Effects are points; `needs` is the
inequality on which the verdict rests. Intervals are 95 %, paired over seeds, with a standard deviation pooled over
the variants of the study (`fomo/claims.py`). A seed varies the stream, the base model and the pictures of the
rendered world. With one seed every claim is undecided."""


def claims_page(findings: list[Finding], scale: str) -> str:
    title = f"# The guide's claims at scale `{Path(scale).stem}`"
    return f"{title}\n\n{tally(findings)}.\n\n{METHOD}\n\n{markdown(claims_rows(findings))}\n"


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    safe = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    rule = ["---"] * len(safe[0])
    return "\n".join("| " + " | ".join(row) + " |" for row in [safe[0], rule, *safe[1:]])


def results_page(outcomes: list[Outcome], findings: list[Finding], scale: str) -> bytes:
    title = f"The guide's claims at scale {Path(scale).stem}"
    note = f"{tally(findings)}. {METHOD.replace('`', '')}"
    cards = [Card(title, note, tables=[claims_rows(findings)])] if findings else []
    note = "Percent at the end of the life, mean ± standard deviation over n seeds."
    for outcome in outcomes:
        study = outcome.study.title
        cards.append(Card(study, note, figures=outcome.planes(), tables=tables_of(outcome)))
    return html_page(title, [[card] for card in cards], prose=True)


def tables_of(outcome: Outcome) -> list[list[list[str]]]:
    tables = outcome.rows(), outcome.needs_rows(), outcome.grid_rows(), outcome.best_peaks()
    return [rows for rows in tables if rows]


# --- docs/reproduction.md --------------------------------------------------------------------------------


def write_document(path: Path, outcomes: list[Outcome], findings: list[Finding], scale: str) -> None:
    """docs/reproduction.md: everything that was found, and how to find it again."""
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
            f"`{command}`: {len(outcome.seconds)} runs, {hours:.1f} hours of single runs.",
        ]
        parts += [markdown(rows) for rows in tables_of(outcome)]
    write_atomically(path, ("\n\n".join(parts) + "\n").encode())


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
