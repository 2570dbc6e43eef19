"""How fast evaluation is beside the bare model: pictures per second, and the class features of a head.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py [--model ViT-B-32|tiny] [--pictures 256] [--device cpu]

Targets: pictures of the pixel cache become features at 95 % of the rate at which encode_image takes tensors that
are on the device already; the features of 100 classes come 8 times faster than by one class at a time at the
full context, with ViT-B-32. Weights and pictures are random; the pictures are 4:3, as from most cameras. Each
repetition times both sides right after each other; shown are the median ratio and the range.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fomo import clip as fomo_clip  # noqa: E402
from fomo.clip import Clip  # noqa: E402
from fomo.datasets.features import IMAGES, image_features  # noqa: E402
from fomo.datasets.samples import Samples  # noqa: E402
from fomo.datasets.sources.base import Source  # noqa: E402
from fomo.eval.zero_shot import class_features  # noqa: E402
from fomo.schema import read_yaml  # noqa: E402

CLASSES, PROMPT = 100, "a photo of a {}."


class Noise(Source):
    """Random pictures of which the short side has `side` pixels, half of them upright."""

    def __init__(self, count: int, side: int):
        self.labels, self.side = np.full(count, -1), side

    def image(self, index: int) -> Image.Image:
        shape = [self.side, self.side * 4 // 3][:: 1 if index % 2 else -1]
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (*shape, 3), dtype=np.uint8))

    def captions(self, index: int) -> list[str]:
        return []

    def key(self) -> str:
        return f"noise {len(self.labels)} {self.side}"


def model_of(name: str) -> Clip:
    tiny = name == "tiny"
    config = read_yaml(ROOT / "recipes/scales/tiny.yaml")["model"]["config"] if tiny else None
    clip = fomo_clip.new(config or open_clip.get_model_config(name), seed=0)
    clip.model.eval()
    return clip


def seconds(work: Callable, device: torch.device) -> float:
    """On a CPU its own time: another program's share of the cores does not count."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def compare(what: str, count: int, unit: str, ours: Callable, bare: Callable, device: torch.device) -> None:
    """Five pairs of timings after one to warm up."""
    pairs = [(seconds(ours, device), seconds(bare, device)) for _ in range(6)][1:]
    mine, other = (statistics.median(count / t for t in times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    spread = f"x{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    print(f"{what:10} {mine:10,.1f} {unit}/s, bare {other:10,.1f} {unit}/s  {spread}")


@torch.no_grad()
def main(name: str, pictures: int, device: torch.device) -> None:
    clip = model_of(name)
    clip.model.to(device)
    side = clip.image_size
    samples = Samples(Noise(pictures, side), clip, side, "noise")
    numbers = np.arange(pictures)
    batches = torch.randn(pictures, 3, side, side, device=device).split(IMAGES)
    names = open_clip.IMAGENET_CLASSNAMES[:CLASSES]
    texts = [PROMPT.replace("{}", each) for each in names]

    def bare_images() -> Tensor:
        with clip.precision_on(device).scoring():
            return torch.cat([clip.model.encode_image(batch) for batch in batches])

    def bare_classes() -> Tensor:
        rows = [clip.model.encode_text(clip.tokenizer([text]).to(device)) for text in texts]
        return F.normalize(torch.cat(rows), dim=-1)

    def our_classes() -> Tensor:
        return class_features(clip, [clip.tokenize(texts)], device)

    off = (our_classes() - bare_classes()).abs().max().item()
    print(f"{name} on {device}, {torch.get_num_threads()} threads, {pictures} pictures of {side} px")
    work = lambda: image_features(clip, samples, numbers, device, lambda n: None)  # noqa: E731
    compare("pictures", pictures, "img", work, bare_images, device)
    compare("classes", CLASSES, "class", our_classes, bare_classes, device)
    print(f"the class features differ by at most {off:.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="An open_clip name, or tiny.")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FOMO_CACHE"] = cache
        main(said.model, said.pictures, torch.device(said.device))
