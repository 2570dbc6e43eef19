"""Claims rest on their weakest inequality, and tables say what was found."""

from pathlib import Path

import numpy as np

from fomo.guide.studies import read_study
from fomo.guide.verdicts import Outcome, claims_rows, markdown, rank, tally, write_document
from tests.guide.study_files import claim, study_file


def outcome_of(folder: Path, file: str = "study", **content) -> Outcome:
    """Of two seeds: fast ends at 10 and 11, slow at 11 and 12, broken at 12 and 13, on every axis."""
    study = read_study(study_file(folder, file, **content))
    ends = {name: 10.0 + i for i, name in enumerate(study.variants)}
    scores = {
        name: {s: {k: np.array([5.0, end + s]) for k in ("ka", "zs", "gm")} for s in (0, 1)}
        for name, end in ends.items()
    }
    return Outcome(study, scores, {(name, 0): 60.0 for name in ends})


# slow - fast is 1 with both seeds; fast alone has an interval of several points.
CLEAR, CLEARER = "ka(slow) - ka(fast) > 0", "2 * ka(slow) - ka(fast) > 0"
OPEN, WRONG = "ka(fast) - 2 * ka.start(fast) > 0", "ka(slow) - ka(fast) < 0"


def test_a_claim_rests_on_its_weakest_inequality(tmp_path):
    claims = [claim("1", CLEARER, CLEAR), claim("2", CLEAR, OPEN), claim("3", CLEAR, WRONG, OPEN)]
    outcome = outcome_of(tmp_path, claims=claims)
    found = {f.claim.id: (f.summary, f.deciding.comparison.text) for f in outcome.findings}
    assert found == {
        "1": ("holds (2 of 2 hold)", CLEAR),
        "2": ("undecided (1 of 2 hold)", OPEN),
        "3": ("opposite (1 of 3 hold)", WRONG),
    }
    rows = outcome.needs_rows()
    assert rows[2] == ["1", CLEAR, "+1.0 [1.0, 1.0]", "holds"] and rows[4][3] == "undecided"
    assert tally(outcome.findings).startswith("1 holds, 0 right direction, below the margin, 1 undecided")


def test_a_claim_that_is_shown_weakly_or_not_applicable_says_so(tmp_path):
    """The joint run gains 20 points of KA and 6 of ZS: a margin in KA is the paper's, one in ZS has no meaning."""
    weak, nothing = "ka(slow) - ka(fast) > 5", "line(fast) > 0"
    variants = {name: {"recipe": "x.yaml"} for name in ("fast", "slow", "joint")}
    claims = [claim("1", CLEAR, weak), claim("2", CLEAR, nothing), claim("3", WRONG, nothing, weak)]
    outcome = outcome_of(tmp_path, claims=claims, variants=variants)
    for run in outcome.scores["joint"].values():
        run["ka"] = np.array([5.0, 25])
    assert [finding.summary for finding in outcome.findings] == [
        "right direction, below the margin (1 of 2 hold)",
        "not applicable (1 of 2 hold)",
        "opposite (0 of 3 hold)",
    ]
    assert outcome.needs_rows()[2][1:] == [
        f"{weak}; margin 5",
        "+1.0 [1.0, 1.0]",
        outcome.findings[0].verdict,
    ]
    assert tally(outcome.findings).endswith("1 opposite, 1 not applicable")


def test_the_inequality_of_a_failed_or_missing_variant_says_so(tmp_path):
    outcome = outcome_of(tmp_path, claims=[claim("1", CLEAR, "ka(slow) > 0", "ka(broken) > 0")])
    scores = {**outcome.scores, "slow": {}}
    outcome = Outcome(outcome.study, scores, {}, frozenset({"broken"}))
    assert [row[3] for row in outcome.needs_rows()[1:]] == ["unfinished", "unfinished", "failed"]
    assert outcome.findings[0].verdict == "failed" and outcome.findings[0].row()[4:8] == ["", "", "", "0"]
    del scores["slow"]
    assert Outcome(outcome.study, scores, {}).needs_rows()[1][3] == "not tested"


def test_a_grid_shows_gm_at_each_place(tmp_path):
    grid = {"zeroshot": {"ema": "fast", "all": "slow"}, "ema": {"ema": "broken", "all": "fast"}}
    rows = outcome_of(tmp_path, grid=grid).grid_rows()
    assert rows[0] == ["GM", "ema", "all"]
    assert rows[1] == ["zeroshot", "10.5 ± 0.7", "11.5 ± 0.7"] and rows[2][1] == "12.5 ± 0.7"


def test_the_table_of_peaks_names_an_end_of_the_ladder(tmp_path):
    rows = outcome_of(tmp_path, peaks={"fast": [1e-3, 1e-2]}, claims=[]).best_peaks()
    assert rows[1] == [
        "fast",
        "0.01 (at the end of the ladder)",
        "5.0",
        "0.001: 12.5 ± 0.7, 0.01: 13.5 ± 0.7",
    ]


def test_claims_are_sorted_as_the_guide_numbers_them():
    names = ["trap", "T5", "10", "T1", "9", "rate"]
    assert sorted(names, key=rank) == ["9", "10", "T1", "T5", "rate", "trap"]


def test_a_bar_in_an_inequality_does_not_break_the_table(tmp_path):
    findings = outcome_of(tmp_path, claims=[claim("1", "|ka(fast) - ka(slow)| < 0")]).findings
    row = markdown(claims_rows(findings)).splitlines()[-1]
    assert "\\|ka(fast) - ka(slow)\\| < 0" in row and row.replace("\\|", "").count("|") == 9


def test_the_document_has_every_inequality_and_the_summary_is_a_picture(tmp_path):
    study, summary = (
        outcome_of(tmp_path, claims=[claim("1", CLEAR)]),
        outcome_of(tmp_path, "summary", claims=[]),
    )
    write_document(tmp_path / "doc.md", [study, summary], study.findings, "tiny")
    text = (tmp_path / "doc.md").read_text()
    assert f"| 1 | {CLEAR} | +1.0 [1.0, 1.0] | holds |" in text and "`python fomo.py reproduce study`" in text
    assert (tmp_path / "guide.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "guide.png").unlink()
    write_document(tmp_path / "doc.md", [study, summary], study.findings, "b16")
    assert not (tmp_path / "guide.png").exists()
