"""Time and memory of merging at ViT-B-16's size: 150 M parameters, random values, float32, on the CPU.

    python benchmarks/merging.py [--experts 8] [--threads 2]

Each rule runs in a process of its own, on files that are mapped; `above` is the peak of resident memory above
what the imports take. Interpolation is what EMA-merge does after every update, in memory. The naive form stacks
all experts and reduces.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import open_clip
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fomo import weights  # noqa: E402
from fomo.atomic import OnDisk, write_tensors  # noqa: E402
from fomo.devices import peak_memory  # noqa: E402

CPU = torch.device("cpu")
CASES = {
    "interpolate, 2 in memory": {"rule": "interpolate", "keep": 0.5},
    "interpolate": {"rule": "interpolate"},
    "ties": {"rule": "ties", "density": 0.2},
    "ties, stacked (naive)": None,
}


def held_at_most(device: torch.device) -> int:
    """Bytes so far, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return peak_memory(device)


def naive_ties(files: list[OnDisk], base: OnDisk) -> dict:
    """Flatten every expert, stack, sort, reduce: what one writes first."""
    names = sorted(base)
    origin = torch.cat([base[n].flatten() for n in names])
    taus = torch.stack([torch.cat([f[n].flatten() for n in names]) - origin for f in files])
    k = int(0.2 * taus.shape[1])
    for tau in taus:
        tau[tau.abs() < tau.abs().kthvalue(len(tau) - k + 1).values] = 0
    sign = torch.where(taus.sum(0) >= 0, 1.0, -1.0)
    agree = (taus.sign() == sign) & (taus != 0)
    merged = origin + (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
    return dict(zip(names, merged.split([base[n].numel() for n in names]), strict=True))


def run(case: str, folder: Path, experts: int, device: torch.device = CPU) -> dict:
    """One case in this process. Rules compute where the newest model is; on CUDA the memory is the device's."""
    files = [OnDisk(folder / f"{i}.safetensors") for i in range(experts)]
    base, spec = OnDisk(folder / "base.safetensors"), CASES[case]
    if "in memory" in case:
        files = [{n: f[n].to(device) for n in f} for f in files[:2]]
    elif device.type == "cuda":
        files[-1] = {n: t.to(device) for n, t in files[-1].items()}
    before, began = held_at_most(device), time.perf_counter()
    if spec is None:
        naive_ties(files, base)
    else:
        rule = weights.build_rule(spec)
        dict(weights.merge(rule, files, base if rule.needs_base else None))
    above = held_at_most(device) - before
    return {"case": case, "seconds": time.perf_counter() - began, "above": above}


def prepare(folder: Path, experts: int, model: nn.Module) -> int:
    """Write the base and the experts; -> the size of one in bytes."""
    base = {n: t.detach() for n, t in model.state_dict().items()}
    write_tensors(base, folder / "base.safetensors")
    for i in range(experts):
        draw = torch.Generator().manual_seed(i)
        noisy = {n: t + 0.01 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        write_tensors(noisy, folder / f"{i}.safetensors")
    return sum(t.numel() * t.element_size() for t in base.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        print(json.dumps(run(options.case, Path(options.folder), options.experts)))
        return
    with tempfile.TemporaryDirectory() as folder:
        size = prepare(Path(folder), options.experts, open_clip.create_model("ViT-B-16"))
        print(f"{options.experts} experts of {size / 1e6:.0f} MB, {options.threads} threads")
        for case in CASES:
            command = [sys.executable, __file__, "--case", case, "--folder", folder]
            command += ["--experts", str(options.experts), "--threads", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{case:28} failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
                continue
            row = json.loads(done.stdout)
            print(f"{case:28} {row['seconds']:8.2f} s   {row['above'] / 1e6:8.0f} MB above")


if __name__ == "__main__":
    main()
