"""What our loop costs beside the arithmetic, and how much of the machine the arithmetic uses.

    python benchmarks/limit.py [--model tiny --model ViT-B-32] [--batch-size 32] [--steps 3] [--turns 5]

`bare`: forward, backward, clipping and AdamW on tensors that are there already; `loop`: `train` over Batches from
the pixel cache. They take turns. MFU: FLOPs of the model's forward and backward pass (torch.utils.flop_counter, at
the batches' own text length) per second of the loop, over the rate of large matrix products in the same precision.
Targets: the loop takes at most 1.03 times as long as bare for ViT-B-32, 1.10 times for tiny.
"""

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from speed import SETTINGS, WARM, case_of, lap, pictures_of, write_pictures  # noqa: E402

from fomo.budget.dry_run import matrix_rate  # noqa: E402
from fomo.clip import Clip, contrastive_loss, encode, new  # noqa: E402
from fomo.datasets.mixture import Batches, pool_of  # noqa: E402
from fomo.datasets.samples import Collection, Samples  # noqa: E402
from fomo.devices import Precision, pick_device  # noqa: E402
from fomo.methods import Method  # noqa: E402
from fomo.runs.step_log import Timed  # noqa: E402
from fomo.train import on_device, train  # noqa: E402


class Sides:
    """One model and its batches, for both sides in turn."""

    def __init__(self, case, folder: Path, device: torch.device):
        self.case, self.device = case, device
        self.clip: Clip = new(case.config, seed=0)
        self.model = self.clip.model.to(device)
        samples = Collection([Samples(pictures_of(folder), self.clip, self.clip.image_size, "pictures")])
        self.batches = Batches([("update", pool_of(samples, (0,)), case.batch_size)], 0, 0, WARM + case.steps)
        self.optimizer = Method().optimizer(list(self.model.parameters()), SETTINGS)
        self.precision = Precision("auto", device)
        self.resident = list(on_device(self.batches.loader(), self.clip, device))

    def loop(self) -> float:
        """Seconds per step."""
        loader = Timed(self.batches.loader(workers=self.case.workers, pin=self.device.type == "cuda"))
        steps = train(
            self.clip,
            Method(),
            self.optimizer,
            loader,
            lambda step: SETTINGS.lr,
            device=self.device,
            precision=self.precision,
            clip_norm=SETTINGS.clip_norm,
            max_scale=100.0,
        )
        for step in steps:
            if step.number + 1 == WARM:
                lap(loader, self.device)
        return lap(loader, self.device)[0] / self.case.steps

    def bare(self) -> float:
        clock = Timed([])
        for number, inputs in enumerate(self.resident):
            if number == WARM:
                lap(clock, self.device)
            with self.precision.autocast():
                features = encode(self.model, inputs.images, inputs.tokens)
            contrastive_loss(features).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return lap(clock, self.device)[0] / self.case.steps

    def flops(self) -> float:
        """Of one step's forward and backward pass, the mean over batches."""
        with FlopCounterMode(display=False) as counter:
            for inputs in self.resident[WARM:]:
                contrastive_loss(encode(self.model, inputs.images, inputs.tokens)).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops() / self.case.steps


def main(
    model: str, batch_size: int | None, steps: int | None, turns: int, device: str, threads: int | None
) -> None:
    place = pick_device(device)
    case = case_of(model, batch_size, threads, place.type, workers=0)
    case = replace(case, steps=steps or case.steps)
    pick_device(device, case.threads)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FOMO_CACHE"] = f"{scratch}/cache"
        write_pictures(case, None, Path(scratch))
        sides = Sides(case, Path(scratch), place)
        pairs = [(sides.loop(), sides.bare()) for _ in range(turns)]
        peak, flops = matrix_rate(place, sides.precision.dtype, turns), sides.flops()
    ratios = sorted(loop / bare for loop, bare in pairs)
    loop, bare = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    print(
        f"{model}, batch {case.batch_size}: loop {1e3 * loop:.1f} ms, bare {1e3 * bare:.1f} ms a step, ratio "
        f"{statistics.median(ratios):.3f} (lowest {ratios[0]:.3f}, highest {ratios[-1]:.3f}, n = {turns})"
    )
    print(
        f"  {flops / 1e9:.1f} GFLOPs a step, {flops / loop / 1e9:.1f} GFLOP/s of {peak / 1e9:.1f} in large matrix "
        f"products: MFU {flops / loop / peak:.0%}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", action="append")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    said = vars(parser.parse_args())
    usual = torch.get_num_threads()
    for name in said.pop("model") or ("tiny", "ViT-B-32"):
        torch.set_num_threads(usual)  # a scale may have its own
        main(name, **said)
