"""Files that are complete or absent, whenever the process dies."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; at the end it is flushed and gets its name."""
    staging = path.with_name(path.name + ".part")
    try:
        with naming(path):
            yield staging
            settle(staging, path)
    finally:
        staging.unlink(missing_ok=True)  # there only if this failed, and a full disk needs the room


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses in writing a file is an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = refused(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def refused(error: Exception) -> int | None:
    """The system's error number, also where torch or safetensors raise an error of their own."""
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, OSError):
        return cause.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def write_atomically(path: Path, content: bytes) -> None:
    with staged(path) as staging:
        staging.write_bytes(content)


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
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with staged(path) as staging:
        save_file(plain, staging, metadata={"format": "pt"})


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
