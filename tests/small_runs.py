"""The ways in which tests run things: in this process, and in processes of their own.

All that they change within fomo to be quick is here.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

import fomo.report.page
import fomo.runs.step_log
import fomo.update
from fomo.distributed import ALONE, Ranks, process_group
from fomo.errors import Interrupted
from fomo.load_recipe import load
from fomo.pretrain import starting_model
from fomo.recipe import Recipe

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
FORKS = multiprocessing.get_context("forkserver")

# --- in this process -------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    """The command line."""
    return CliRunner().invoke(command_line(), [str(a) for a in arguments])


def command_line() -> Callable:
    return runpy.run_path(str(ROOT / "fomo.py"))["cli"]


def recipe_of(scale: Path, *overrides: str, data: Path | None = None) -> Recipe:
    return load(None, scale=str(scale), data=data and str(data), overrides=list(overrides))


def run(
    recipe: Recipe, folder: Path, *, resume: bool = False, workers: int = 0, ranks: Ranks = ALONE
) -> list[dict]:
    """-> the lines of metrics.jsonl."""
    fomo.update.run_recipe(recipe, folder, resume=resume, device="cpu", workers=workers, ranks=ranks)
    return lines(folder / "metrics.jsonl")


@contextmanager
def without_reports() -> Iterator[None]:
    """Drawing one takes half of the time of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fomo.report.page, "write_report", str)
        yield


def run_method(scale: Path, folder: Path, method: str, *, cut: int | None = None) -> dict[str, Tensor]:
    """Two updates of 4 steps -> the last deployed weights. `cut`: stopped after so many steps, then resumed."""
    recipe = recipe_of(scale, f"method={method}", "optimizer.lr=1e-2", "stream.updates=2")
    if cut is not None:
        with pytest.raises(Interrupted):
            run_until(recipe, folder, cut, terminate)
    run(recipe, folder, resume=cut is not None)
    return weights_of(folder, 2)


def run_until(recipe: Recipe, folder: Path, steps: int, act: Callable, **how) -> list[dict]:
    """A run in which `act(optimizer)` happens after so many steps."""
    starting_model(recipe.model, CPU)  # is made now: its steps do not count
    with after_steps(steps, act):
        return run(recipe, folder, **how)


@contextmanager
def after_steps(steps: int, act: Callable) -> Iterator[None]:
    """Let `act(optimizer)` happen within the so-manieth step of any optimizer."""
    done = 0

    def count(optimizer: torch.optim.Optimizer, *_) -> None:
        nonlocal done
        if isinstance(optimizer.param_groups[0]["params"][0], FakeTensor):
            return  # its FLOPs are counted
        done += 1
        if done == steps:
            act(optimizer)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


def terminate(*_) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def class_folders(root: Path, names: list[str], each: int) -> Path:
    """So many pictures of noise of each class."""
    for c, name in enumerate(names):
        for n in range(each):
            picture(root / name / f"{n}.png", 1000 * c + n)
    return root


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights_of(folder: Path, update: int) -> dict[str, Tensor]:
    return load_file(folder / f"weights/update_{update:03d}.safetensors")


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not a[name].equal(b[name])]


# --- in other processes ----------------------------------------------------------------------------------


class Child:
    """A process of the command line, in a process group of its own, from a server that has imported everything.

    Its cache and its output are in `place`; `fault` is called before the command.
    """

    report = False  # whether a run draws one at its end

    def __init__(self, place: Path, *arguments: object, fault: Callable | None = None, **environment: str):
        serve()
        place.mkdir(exist_ok=True)
        self.log = place / "log.txt"
        environment = {"FOMO_CACHE": str(place / "cache"), **environment}
        words = [str(a) for a in arguments]
        self.process = FORKS.Process(target=enter, args=(self.log, words, fault, environment, self.report))
        self.process.start()

    def end(self) -> int:
        """Wait for it; -> its exit status, as of a shell."""
        self.process.join(120)
        code = self.process.exitcode
        self.process.kill()
        assert code is not None, f"hangs: {self.log}"
        return code if code >= 0 else 128 - code

    def kill_after(self, seconds: float) -> int:
        self.process.join(seconds)
        self.process.kill()
        return self.end()

    def signal_when(self, ready: Callable[[], bool], signum: int) -> int:
        """Send a signal; Ctrl-C goes to the data workers, too, as from a terminal. -> the exit status."""
        while self.process.is_alive() and not ready():
            time.sleep(0.002)
        (os.killpg if signum == signal.SIGINT else os.kill)(self.process.pid, signum)
        return self.end()

    def mistake(self, status: int) -> str:
        """The one line with which it ends with this status."""
        assert self.end() == status, self.log.read_text()
        told = self.log.read_text()
        last = told.splitlines()[-1]
        assert last.startswith("fomo: ") and told.count("fomo: ") == 1 and "Traceback" not in told
        return last


@cache
def serve() -> None:
    """Start the server that children are forked from."""
    FORKS.set_forkserver_preload(["small_runs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        forkserver.ensure_running()


def enter(log: Path, words: list[str], fault: Callable | None, environment: dict, report: bool) -> None:
    """In the child."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as anywhere but in this child
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= environment
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, nullcontext() if report else without_reports():
        patch.setattr(fomo.update, "CHECKPOINT_SECONDS", 0)  # checkpoints within updates that are short
        patch.setattr(fomo.runs.step_log, "LOG_EVERY", 3)
        if fault:
            fault()
        command_line()(words, prog_name="fomo")


def on_ranks(function: Callable, *arguments: object, count: int = 2) -> list:
    """function(ranks, *arguments) in as many processes -> what each returned."""
    serve()
    pipes, processes = [], []
    for environment in environments(count):
        ours, theirs = FORKS.Pipe()
        processes.append(FORKS.Process(target=enter_rank, args=(theirs, environment, function, arguments)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        assert all(pipe.poll(120) for pipe in pipes), "a rank hangs"
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def enter_rank(pipe, environment: dict, function: Callable, arguments: tuple) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    with process_group("cpu") as ranks:
        pipe.send(function(ranks, *arguments))
        pipe.recv()  # tensors are fetched from a process that lives; `on_ranks` kills it


def environments(count: int = 2) -> list[dict[str, str]]:
    """Of each rank, as from torchrun; they share this process's cache."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {**address, "WORLD_SIZE": str(count), "FOMO_CACHE": os.environ["FOMO_CACHE"]}
    return [{**shared, "RANK": str(number)} for number in range(count)]
