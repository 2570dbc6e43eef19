"""Files that are complete or absent, whenever the process dies."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open


def write_atomically(path: Path, content: bytes) -> None:
    staging = path.with_name(path.name + ".part")
    try:
        staging.write_bytes(content)
        settle(staging, path)
    finally:
        staging.unlink(missing_ok=True)  # there only if this failed, and a full disk needs the room


def settle(staging: Path, path: Path) -> None:
    """Flush `staging` to the disk and give it its name."""
    with open(staging, "rb") as file:
        os.fsync(file.fileno())
    os.replace(staging, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_tensors(tensors: Mapping, path: Path) -> None:
    """Named tensors as a safetensors file."""
    from safetensors.torch import save_file  # brings torch, which writing a report does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".part")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, staging, metadata={"format": "pt"})
        settle(staging, path)
    finally:
        staging.unlink(missing_ok=True)


class OnDisk(Mapping):
    """Named tensors of a safetensors file, one read at a time: a file kept open would count as resident memory."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = list(file.keys())

    def __getitem__(self, name: str):
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
