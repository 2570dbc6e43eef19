"""Where a run computes: the device, its memory, and what its last bits depend on."""

import ctypes
import os
import resource
import sys
from pathlib import Path

import torch

from fomo.distributed import Ranks
from fomo.errors import UserError


def pick_device(name: str, threads: int | None = None) -> torch.device:
    """auto: CUDA, else Apple's MPS, else the CPU, there with so many threads."""
    if threads:
        torch.set_num_threads(threads)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(
            f"--device {name}: not available here, accepted: {', '.join(k for k, v in available.items() if v)}"
        )
    if name == "cpu":
        keep_freed_memory()
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc hand what a step frees to the next step, not back to the system: getting it again, page by page,
    costs a ViT-B-32 step 5 %. (What jemalloc is often loaded for.) Elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h: the most that it takes, so never
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: only larger blocks still come and go


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device on CUDA, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # Linux; its ru_maxrss would include the process that started this one
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that this process may have: what is free on CUDA, else the machine's, or its container's or job's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *cgroup_limits()]
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min([*limits, own] if own != resource.RLIM_INFINITY else limits)


def cgroup_limits(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes, of the control groups that this process is in and those above them; versions 1 and 2 of Linux."""
    found = []
    for line in proc.read_text().splitlines() if proc.exists() else ():
        _, controllers, path = line.split(":", 2)
        version_1 = "memory" in controllers.split(",")
        top, name = (root / "memory", "memory.limit_in_bytes") if version_1 else (root, "memory.max")
        group = top / path.lstrip("/")
        files = [folder / name for folder in (group, *group.parents) if folder.is_relative_to(top)]
        texts = [file.read_text().strip() for file in files if file.is_file()]
        found += [int(text) for text in texts if text.isdigit()]  # else "max"
    return found


def machine(ranks: Ranks, precision: str = "float32") -> dict:
    """What the last bits of a CPU run depend on."""
    found = {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    if ranks.several:
        found["ranks"] = ranks.world_size
    if precision != "float32":
        found["precision"] = precision
    return found


def cpu_multiplies_bf16() -> bool:
    """Whether it has instructions for products in bf16; without them they are slower than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Precision:
    """Mixed precision: what forward passes compute in, of training and of pictures to be scored. Weights
    are float32 always, and so are the features of texts that pictures are compared with.

    auto: on CUDA bf16, or fp16 with loss scaling where bf16 is missing; on a CPU bf16 where that is faster, which
    is with instructions for it and in models at least WIDE wide (`width`: of the embedding); float32 elsewhere.
    What mixed precision leaves in float32 may use CUDA's TF32; with float32 nothing does.
    """

    WIDE = 256  # below, a step takes longer for the conversions (docs/performance.md)

    def __init__(self, name: str, device: torch.device, width: int = 0):
        if name == "auto":
            name = "float32"
            if device.type == "cuda":
                name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            elif device.type == "cpu" and width >= self.WIDE and cpu_multiplies_bf16():
                name = "bf16"
        self.name, self.device = name, device
        self.dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")
        if device.type == "cuda":
            torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
            torch.backends.cudnn.allow_tf32 = name != "float32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def scoring(self) -> torch.autocast:
        """Of pictures; float32 instead of fp16, whose overflows a training step is left out for."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.name == "bf16")
