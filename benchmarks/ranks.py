"""What several ranks on one machine are worth: N of one thread beside one process with N threads, and with one.

    python benchmarks/ranks.py [--model tiny] [--ranks 2] [--batch-size 80] [--steps 25] [--turns 5]

All train the same model on the same batches from the pixel cache, each side in processes of its own that sleep
while the others take their turn. Target at tiny: two ranks are at least 0.9 times as fast as one process with two
threads. On a busy machine ranks wait for the one that got no core: the CPU time of a step says what cores of their
own would give. OMP_WAIT_POLICY=PASSIVE keeps threads that wait off the cores.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from speed import WARM, Case, case_of, pictures_of, turns_of, write_pictures  # noqa: E402

from fomo.distributed import process_group  # noqa: E402

CPU = torch.device("cpu")


class Turn(NamedTuple):
    rate: float  # samples/s of all ranks together
    step: float  # seconds of this process's CPU time


def serve(pipe: Connection, case: Case, folder: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment, FOMO_CACHE=str(folder / "cache"))
    torch.set_num_threads(case.threads)
    with process_group("cpu") as ranks, suppress(EOFError):
        turns = turns_of(case, case.clip(), pictures_of(folder), CPU, ranks)
        while True:
            pipe.recv()
            began = time.process_time()
            rate = next(turns).rate
            pipe.send(Turn(rate, (time.process_time() - began) / (WARM + case.steps)))


@contextmanager
def side(case: Case, folder: Path, processes: int) -> Iterator[Callable[[], Turn]]:
    """Processes that wait for their turns; a turn is told by the slowest."""
    context, pipes, started = get_context("spawn"), [], []
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for number in range(processes):
        place = {**address, "RANK": str(number), "WORLD_SIZE": str(processes)}
        ours, theirs = context.Pipe()
        started.append(context.Process(target=serve, args=(theirs, case, folder, place)))
        started[-1].start()
        theirs.close()
        pipes.append(ours)

    def take_turn() -> Turn:
        for pipe in pipes:
            pipe.send(None)
        return min(pipe.recv() for pipe in pipes)

    try:
        yield take_turn
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join()


def main(model: str, ranks: int, batch_size: int | None, steps: int | None, turns: int) -> None:
    case = case_of(model, batch_size, 1, "cpu", workers=0)
    case = replace(case, steps=steps or case.steps)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        write_pictures(case, None, folder)
        sides = [
            stack.enter_context(side(one, folder, processes))
            for one, processes in ((case, ranks), (replace(case, threads=ranks), 1), (case, 1))
        ]
        done = [[take_turn() for take_turn in sides] for _ in range(turns + 1)][1:]  # the first fills caches
    rates = [statistics.median(turn.rate for turn in own) for own in zip(*done, strict=True)]
    print(f"{model}, batch {case.batch_size}, samples/s: {ranks} ranks {rates[0]:.0f}")
    for place, name in ((1, f"one process, {ranks} threads"), (2, "one process, 1 thread")):
        ratios = [turn[0].rate / turn[place].rate for turn in done]
        print(f"  {name} {rates[place]:.0f}: ratio {spread(ratios)}")
    ratios = [turn[2].step / turn[0].step for turn in done]
    print(f"  CPU time of a step, of one process with 1 thread over a rank's: {spread(ratios)}")


def spread(ratios: list[float]) -> str:
    found = f"lowest {min(ratios):.2f}, highest {max(ratios):.2f}, n = {len(ratios)}"
    return f"{statistics.median(ratios):.2f} ({found})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--turns", type=int, default=5)
    main(**vars(parser.parse_args()))
