"""A study for tests: two variants that learn at different rates and one whose loss is not finite."""

from pathlib import Path

import yaml

from fomo.load_recipe import ROOT

FINETUNE = str(ROOT / "finetune.yaml")


def claim(name: str, *needs: str, paper: str | None = None) -> dict:
    return {"id": name, "says": f"claim {name}.", "place": "section 1", "needs": list(needs), "paper": paper}


def study_file(folder: Path, name: str = "study", **changes) -> Path:
    content = {
        "title": "Rates",
        "seeds": [0, 1],
        "claims": [
            claim("2", "ka(fast) - ka(slow) > 0", paper="+3 KA"),
            claim("10", "|ka(fast) - ka(slow)| < 0"),
            claim("T1", "ka(broken) > 0"),
        ],
        "variants": {
            "fast": {"recipe": FINETUNE},
            "slow": {"recipe": FINETUNE, "times": {"optimizer.lr": 0.1}},
            "broken": {"recipe": FINETUNE, "set": {"optimizer.lr": 1e30}},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
    return path
