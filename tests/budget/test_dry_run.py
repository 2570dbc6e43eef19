"""What a dry run says beforehand is what the run then does, and nothing is written."""

from fomo.budget.dry_run import dry_run
from fomo.load_recipe import load


def test_a_dry_run_says_steps_sets_and_the_missing_pool(small_scale, tmp_path):
    recipe = load(None, scale=str(small_scale))
    text = dry_run(recipe, "cpu")
    assert "learns 20 concepts with 120 pictures in 3 updates; a pretraining pool of 1 sources" in text
    assert "scored on 3 test sets with 120 pictures" in text
    assert "steps: 4 of 12 pairs per update, 12 in all" in text and "without a pretraining pool" not in text
    lines = (small_scale.parent / "data.yaml").read_text().split("adaptation:")
    (tmp_path / "bare.yaml").write_text(f"adaptation:{lines[1]}")
    bare = load(None, scale=str(small_scale), data=str(tmp_path / "bare.yaml"))
    assert "bare.yaml: without a pretraining pool" in dry_run(bare, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.yaml"]
