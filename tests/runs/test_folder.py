"""The run folder by itself: what differs between recipes, whose the signals are, in which order files come."""

import signal

import pytest
import torch
from small_runs import recipe_of

from fomo.runs.folder import Run, checkpoints, differences, kept_updates


@pytest.fixture
def run(small_scale, tmp_path):
    """One that has just begun."""
    recipe = recipe_of(small_scale)
    run, _ = Run.open(tmp_path / "run", recipe, resume=False)
    run.begin(recipe, {}, {}, {}, None)
    yield run
    run.close()


def test_fields_that_either_recipe_lacks_differ_by_their_dotted_names():
    before = {"method": {"name": "merge", "tune": {"name": "lora", "rank": 4}}, "seed": 0}
    now = {"method": {"name": "merge", "tune": {"name": "lora"}, "keep": 0.5}, "seed": 0}
    assert sorted(differences(before, now)) == ["method.keep", "method.tune.rank"]
    assert sorted(differences(now, before)) == ["method.keep", "method.tune.rank"]
    assert differences(now, now) == []


def test_signals_are_the_callers_again_after_a_run(request):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    run = request.getfixturevalue("run")
    assert signal.getsignal(signal.SIGTERM) != before[0]
    run.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_an_update_is_kept_for_continue_before_its_checkpoint_counts(run, monkeypatch):
    """Killed between the two names, `--resume` does the update again; a finished run always has what it keeps."""

    def killed(path, other):
        raise KeyboardInterrupt

    run.position.evaluated = True
    run.save_checkpoint(model={})
    run.position.update = 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.link", killed)
        run.save_checkpoint(model={"a": torch.zeros(1)})
    state = run.folder / "state"
    assert [path.name.split("-")[0] for path in checkpoints(state)] == ["000001"]
    assert run.latest_checkpoint()["position"]["update"] == 0
    run.save_checkpoint(model={"a": torch.ones(1)})
    assert sorted(path.name.split("-")[0] for path in state.glob("u*")) == ["update_000", "update_001"]
    assert run.latest_checkpoint()["model"]["a"] == 1


def test_updates_have_the_order_of_their_numbers_and_unfinished_files_are_none(tmp_path):
    names = [f"update_{n:03d}-0f.pt" for n in (2, 999, 1000, 12000)]
    for name in (*reversed(names), "update_1001-0f.pt.part"):
        (tmp_path / name).touch()
    assert [path.name for path in kept_updates(tmp_path)] == names
