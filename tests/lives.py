"""A short life with a method, for tests that compare the weights it ends with."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

import fomo.update
from fomo.errors import Interrupted
from fomo.load_recipe import load


def live(scale: Path, folder: Path, method: str, *, cut: int | None = None) -> dict[str, Tensor]:
    """Two updates of 4 steps -> the last deployed weights. `cut`: stopped after so many steps, then resumed."""
    overrides = [f"method={method}", "optimizer.lr=1e-2", "stream.updates=2"]
    recipe = load(None, scale=str(scale), overrides=overrides)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fomo.update, "write_report", lambda folders: folders)  # half of the time it takes
        if cut is not None:
            with pytest.MonkeyPatch.context() as stopping, pytest.raises(Interrupted):
                stop_after(stopping, cut)
                fomo.update.run_recipe(recipe, folder, resume=False, device="cpu")
        fomo.update.run_recipe(recipe, folder, resume=cut is not None, device="cpu")
    return load_file(folder / "weights/update_002.safetensors")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_after(patch: pytest.MonkeyPatch, steps: int, stop: Callable[[], None] = terminate) -> None:
    """Let `stop` happen after so many optimizer steps."""
    original, done = fomo.update.train, 0

    def train(*args, **kwargs):
        nonlocal done
        for step in original(*args, **kwargs):
            done += 1
            if done == steps:
                stop()
            yield step

    patch.setattr(fomo.update, "train", train)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    differing = [name for name in a if not a[name].equal(b[name])]
    assert not differing
