"""The rendered world and its base model are what the guide needs: something to learn, and something to lose.

Three whole lives, two and a half minutes on 2 CPU cores: part of `make soak`, not of `make test`.
"""

import csv
import subprocess
import sys

import yaml
from small_runs import ROOT, lines

from fomo.guide.studies import read_study
from fomo.load_recipe import ROOT as RECIPES


def test_the_world_has_the_properties_that_were_asked_of_it(tmp_path):
    """Whole lives on seed 100, which no study has (recipes/studies/README.md). The control was asked for 1.5."""
    summary = read_study(RECIPES / "studies/summary.yaml")
    variants = {
        name: {
            "recipe": str(RECIPES / "finetune.yaml"),
            "set": {**summary.variants[name].set, "evaluation.every": 20},
        }
        for name in ("finetune", "control", "joint")
    }
    (tmp_path / "properties.yaml").write_text(yaml.safe_dump({"title": "Properties", "variants": variants}))
    command = [sys.executable, "fomo.py", "reproduce", tmp_path / "properties.yaml", "--seeds", "100"]
    done = subprocess.run([*command, "--out", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = {row["variant"]: row["run"] for row in csv.DictReader((tmp_path / "out/runs.csv").open())}
    ends = {name: lines(tmp_path / f"out/runs/{run}/metrics.jsonl") for name, run in runs.items()}
    change = {
        name: [scored[-1][key] - scored[0][key] for key in ("ka", "zs")] for name, scored in ends.items()
    }
    untouched = ends["finetune"][0]
    assert 35 <= untouched["ka"] <= 50 and 65 <= untouched["zs"] <= 85
    assert change["finetune"][0] >= 12 and -6 <= change["finetune"][1] <= -2
    assert change["joint"][0] > change["finetune"][0] and change["finetune"][1] < change["joint"][1] < 0
    assert -3 < change["control"][0] < 0 and -3 < change["control"][1] < 0
    assert ends["finetune"][-1]["peak_memory"] < 2 << 30
