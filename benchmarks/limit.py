"""What our loop costs beside the arithmetic, and how much of the machine the arithmetic uses.

    python benchmarks/limit.py [--model tiny --model ViT-B-32] [--batch-size 32] [--steps 3] [--turns 5]

`bare`: forward, backward, clipping and AdamW on tensors that are there already; `loop`: `train` over Batches from
the pixel cache. They take turns. MFU: FLOPs of the model's forward and backward pass (torch.utils.flop_counter, at
the batches' own text length) per second of the loop, over the rate of large matrix products in the same precision.
Targets: the loop takes at most 1.03 times as long as bare for ViT-B-32, 1.10 times for tiny.

Two more ways take their turns, as ratios to bare: `few tokens`, a model that has embeddings only of the tokens in
these batches, which is as much as could be saved in AdamW, clipping and zeroing of the other rows; and `float32`,
where bare computes in another precision.
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

from speed import WARM, Case, OurSide, case_of, pictures_of, pool_from, write_pictures  # noqa: E402

from fomo.budget.dry_run import matrix_rate  # noqa: E402
from fomo.clip import contrastive_loss, encode  # noqa: E402
from fomo.devices import pick_device  # noqa: E402
from fomo.methods.base import Inputs  # noqa: E402


def flops(model: nn.Module, batches: list[Inputs]) -> float:
    """Of one step's forward and backward pass, the mean over batches."""
    with FlopCounterMode(display=False) as counter:
        for inputs in batches:
            contrastive_loss(encode(model, inputs.images, inputs.tokens)).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(batches)


def few_tokens(case: Case, resident: list[Inputs]) -> tuple[OurSide, list[Inputs]]:
    """A model without the rows of the token embedding that no batch has, and the batches for it."""
    tokens = torch.cat([inputs.tokens.flatten() for inputs in resident])
    rows = torch.unique(tokens)  # in order: the end of a text stays the largest
    text = {**case.config["text_cfg"], "vocab_size": len(rows)}
    clip = replace(case, config={**case.config, "text_cfg": text}).clip()
    fewer = [inputs._replace(tokens=torch.searchsorted(rows, inputs.tokens)) for inputs in resident]
    return OurSide(clip, rows.device), fewer


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
        side = OurSide(case.clip(), place)
        pool = pool_from(pictures_of(Path(scratch)), side.clip)
        resident = side.resident(case, pool, WARM + case.steps)
        small, fewer = few_tokens(case, resident)
        ways = {
            "loop": lambda: side.loop(case, pool),
            "bare": lambda: side.bare(case, resident),
            "few tokens": lambda: small.bare(case, fewer),
        }
        if side.precision.name != "float32":
            plain = OurSide(replace(side.clip, precision="float32"), place)  # the same weights
            ways["float32"] = lambda: plain.bare(case, resident)
        rounds = [{way: case.batch_size / take().rate for way, take in ways.items()} for _ in range(turns)]
        peak = matrix_rate(place, side.precision.dtype, turns)
        work = flops(side.clip.model, resident[WARM:])
    seconds = {way: statistics.median(times[way] for times in rounds) for way in ways}
    print(
        f"{model}, batch {case.batch_size}, {side.precision.name}: bare {1e3 * seconds['bare']:.1f} ms a step"
    )
    for way in ways:
        if way == "bare":
            continue
        ratios = sorted(times[way] / times["bare"] for times in rounds)
        spread = f"lowest {ratios[0]:.3f}, highest {ratios[-1]:.3f}, n = {turns}"
        print(f"  {way} / bare {statistics.median(ratios):.3f} ({spread})")
    rate = work / seconds["loop"]
    print(
        f"  {work / 1e9:.1f} GFLOPs a step, {rate / 1e9:.1f} GFLOP/s of {peak / 1e9:.1f} in large matrix "
        f"products: MFU {rate / peak:.0%}"
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
