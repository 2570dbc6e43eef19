"""The README tells the truth: its files are there, and its example method runs."""

import re
from pathlib import Path

import fomo.methods
from fomo.load_recipe import load
from fomo.methods import METHODS, Method
from fomo.runs.logs import evaluations
from fomo.update import run_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_readme_links_is_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    places = [ROOT, ROOT / "fomo", ROOT / "fomo/methods"]
    assert len(links) > 10
    for link in links:
        assert any((place / link).exists() for place in places), link


def test_readme_and_makefile_agree_on_what_the_first_command_takes():
    minutes = (
        r"make update .*?(\d+ to \d+ minutes on 2 CPU cores)",
        r"\nupdate: .*?(\d+ to \d+ minutes on 2 CPU cores)",
    )
    texts = README, (ROOT / "Makefile").read_text(encoding="utf-8")
    said = {re.search(pattern, text)[1] for pattern, text in zip(minutes, texts, strict=True)}
    assert len(said) == 1


def test_the_example_method_works_with_one_line_in_methods(small_scale, tmp_path, monkeypatch):
    from dataclasses import dataclass, field

    source = re.search(r"```python\n(@dataclass\nclass (\w+).*?)```", README, re.S)
    scope = {"dataclass": dataclass, "field": field, "Method": Method, "__name__": "example"}
    exec(source[1], scope)
    monkeypatch.setitem(METHODS, "anchored", scope[source[2]])
    recipe = load(None, scale=str(small_scale), overrides=["method={name: anchored, strength: 0.5}"])
    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    assert evaluations(tmp_path / "run")[-1]["update"] == 3
    assert fomo.methods.build_method(recipe.method).strength == 0.5
