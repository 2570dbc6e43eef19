"""What cannot fit in memory is refused before it is tried, and what an allocator refuses is one line."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import invoke, recipe_of, run_until

from fomo.budget import dry_run, fitting
from fomo.budget.fitting import FEWEST, memory_told, pairs_at_once, shortage, step_memory
from fomo.devices import available_memory, cgroup_limits
from fomo.errors import Failure

ROOT, CPU = Path(__file__).parents[2], torch.device("cpu")
SIZES = ["optimizer.batch_size=64", "stream.updates=1", "budget.steps=2"]


@pytest.fixture
def machine(monkeypatch):
    """-> a function that gives the machine so many bytes."""

    def of(size: float) -> None:
        for module in (fitting, dry_run):
            monkeypatch.setattr(module, "available_memory", lambda device: int(size))

    return of


def test_a_step_that_fits_is_not_spoken_of(small_scale, machine):
    recipe = recipe_of(small_scale, *SIZES)
    machine(step_memory(recipe, CPU, 64))
    assert shortage(recipe, CPU) is None and shortage(recipe, CPU, world_size=2) is None


def test_one_that_surely_does_not_fit_is_told_from_one_whose_captions_may_be_short(small_scale, machine):
    recipe = recipe_of(small_scale, *SIZES)
    needed, least = step_memory(recipe, CPU, 64), step_memory(recipe, CPU, 64, shortest=True)
    assert least < needed
    machine(needed - 1)
    assert not shortage(recipe, CPU).sure
    machine(least - 1)
    sure, line = shortage(recipe, CPU)
    assert sure and line.startswith("optimizer.batch_size: a step of 64 pairs takes ")
    assert "optimizer.accumulate=" in line and "checkpointing" in line


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_the_parts_that_are_advised_do_fit(small_scale, machine, share, accumulate):
    """The oracle is the count of such a part itself."""
    recipe = recipe_of(small_scale, "optimizer.batch_size=512", f"optimizer.accumulate={accumulate}")
    fixed, needed = (step_memory(recipe, CPU, pairs) for pairs in (FEWEST, pairs_at_once(recipe)))
    there = fixed + share * (needed - fixed)
    machine(there)
    parts = int(shortage(recipe, CPU).line.partition("accumulate=")[2].partition(",")[0])
    assert parts > accumulate and step_memory(recipe, CPU, 512 // parts) <= 1.02 * there
    machine(fixed - 1)
    assert "not even two pairs fit" in shortage(recipe, CPU).line


@pytest.mark.parametrize("field", ["checkpointing", "compile"])
def test_what_saves_an_uncounted_part_is_only_refused_where_nothing_would_help(small_scale, machine, field):
    recipe = replace(recipe_of(small_scale, *SIZES), **{field: True})
    fewest = step_memory(recipe, CPU, FEWEST, shortest=True)
    machine(fewest)
    assert shortage(recipe, CPU) is None
    machine(fewest - 1)
    assert shortage(recipe, CPU).sure


def test_what_is_counted_is_no_more_than_a_step_really_takes(tmp_path):
    """In a process of its own, by what the system says of it: a step beyond the model that is there already."""
    code = (
        "import torch\n"
        "from contextlib import nullcontext\n"
        "from fomo.budget import fitting, flops_memory, mafs\n"
        "from fomo.devices import peak_memory\n"
        "from fomo.load_recipe import load\n"
        "from fomo.methods import build_method\n"
        "torch.set_num_threads(1)\n"
        "cpu = torch.device('cpu')\n"
        "recipe = load(None, scale='tiny', overrides=['optimizer.batch_size=512', 'precision=float32'])\n"
        "counted = fitting.step_memory(recipe, cpu, 512)\n"
        "training = mafs.training_of(recipe)\n"
        "before = peak_memory(cpu)\n"
        "model = flops_memory.new_model(training.config)\n"
        "flops_memory.two_updates(model, build_method(training.method), training, cpu, nullcontext())\n"
        "print(counted, peak_memory(cpu) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    counted, taken = map(int, done.stdout.split())
    assert 0.5 * taken < counted < 1.1 * taken


def test_limits_of_containers_and_jobs_are_the_machines(tmp_path):
    root = tmp_path / "cgroup"
    for folder, name, text in (
        ("user/job/step", "memory.max", "max"),
        ("user/job", "memory.max", "3000"),
        ("memory/slurm/job", "memory.limit_in_bytes", "2000"),
        ("memory", "memory.limit_in_bytes", "9223372036854771712"),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(f"{text}\n")
    proc = tmp_path / "self"
    proc.write_text("0::/user/job/step\n")
    assert cgroup_limits(proc, root) == [3000]
    proc.write_text("5:cpu,cpuacct:/slurm\n4:memory:/slurm/job/step\n")
    assert cgroup_limits(proc, root) == [2000, 9223372036854771712]
    assert cgroup_limits(tmp_path / "gone", root) == []
    assert 2**28 < available_memory(CPU) < 2**50


def test_a_run_that_cannot_fit_is_refused_and_a_dry_run_says_the_same(small_scale, tmp_path, machine):
    words = [word for setting in SIZES for word in ("--set", setting)]
    command = ("update", "--scale", small_scale, "--out", tmp_path / "run", *words)
    machine(step_memory(recipe_of(small_scale, *SIZES), CPU, FEWEST, shortest=True))
    done = invoke(*command)
    told = done.stderr.strip().splitlines()[-1].removeprefix("fomo: ")
    assert done.exit_code == 2 and told.startswith("optimizer.batch_size: a step of 64 pairs takes ")
    assert not list((tmp_path / "run").iterdir())
    foreseen = invoke(*command, "--dry-run")
    assert foreseen.exit_code == 0 and f"refused: {told}" in foreseen.stdout.splitlines()


def test_what_the_allocator_refuses_is_one_line_and_the_last_checkpoint_stays(small_scale, tmp_path):
    with pytest.raises(Failure) as error:
        run_until(recipe_of(small_scale), tmp_path / "run", 3, lambda *_: torch.empty(2**50))
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/run: update 1, step ") and ": out of memory: " in line
    assert "\n" not in line and "optimizer.accumulate=N" in line
    assert list((tmp_path / "run/state").glob("*.pt"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_allocators_error_is_known(error):
    with (
        pytest.raises(Failure, match=r"here: out of memory: .*optimizer\.accumulate"),
        memory_told(lambda: "here"),
    ):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="size mismatch") as error, memory_told(lambda: "here"):
        raise RuntimeError("size mismatch")
    assert not isinstance(error.value, Failure)
