"""Flat arrays in files, many texts as two arrays, and work that is spread over processes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fomo.progress import Progress

CHUNK = 128  # pictures that a process decodes at a time
PARALLEL = 1000  # pictures from which on processes are worth their start


class Arrays:
    """Appends to the flat arrays of a folder, and writes its meta.json."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, {}

    def append(self, **arrays: np.ndarray) -> None:
        for name, array in arrays.items():
            if name not in self.files:
                self.files[name] = open(self.folder / f"{name}.bin", "wb")  # noqa: SIM115 (closed in `finish`)
            self.files[name].write(np.ascontiguousarray(array).data)

    def finish(self, **meta) -> None:
        for file in self.files.values():
            file.close()
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1))


def read_array(folder: Path, name: str, dtype: type) -> np.ndarray:
    """One array of a finished folder, memory-mapped."""
    path = folder / f"{name}.bin"
    if not path.exists() or not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


class Strings:
    """Many texts as two flat arrays instead of as many Python objects: UTF-8 bytes, and where each text ends."""

    def __init__(self, flat: np.ndarray, ends: np.ndarray):
        self.flat, self.ends = flat, ends  # uint8; (n,) int64

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Strings":
        data, ends = bytearray(), []
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")  # as file names may need
            ends.append(len(data))
        return cls(np.frombuffer(bytes(data), np.uint8), np.array(ends, np.int64))

    @classmethod
    def read(cls, folder: Path, name: str) -> "Strings":
        """Of the arrays `name` and `name`_ends of a finished folder, memory-mapped."""
        return cls(read_array(folder, name, np.uint8), read_array(folder, f"{name}_ends", np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.flat[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")


class Captions:
    """The captions of many pictures: all texts in a row, and where those of each picture end."""

    def __init__(self, texts: Strings, ends: np.ndarray):
        self.texts, self.ends = texts, ends  # (n,) int64

    @classmethod
    def of(cls, captions: Sequence[list[str]]) -> "Captions":
        texts = Strings.of(text for of_picture in captions for text in of_picture)
        return cls(texts, np.cumsum([len(of_picture) for of_picture in captions], dtype=np.int64))

    def __getitem__(self, index: int) -> list[str]:
        start = self.ends[index - 1] if index else 0
        return [self.texts[number] for number in range(start, self.ends[index])]

    def counts(self) -> np.ndarray:
        """(n,) how many each picture has."""
        return np.diff(self.ends, prepend=0)


def cores() -> int:
    """Processes that decode at once: as many as this process may use, at most 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 16)


class Calls(Dataset):
    """`call` of each item, as a dataset: DataLoader runs it in processes and ends them with this one."""

    def __init__(self, call: Callable, items: Sequence):
        self.call, self.items = call, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.call(self.items[index])


def in_processes(call: Callable, items: Sequence, workers: int) -> Iterator:
    """`call` of each item, in order and a few ahead; without workers in this process."""
    rng = torch.Generator()  # else DataLoader draws from the global one, and a cache hit changes a run
    calls = Calls(call, items)
    return iter(DataLoader(calls, batch_size=None, num_workers=workers, collate_fn=as_is, generator=rng))


def as_is(value):
    return value


def in_chunks(call: Callable[[range], object], total: int, title: str) -> Iterator:
    """`call` of the numbers below `total`, CHUNK at a time; with a bar, and in processes where there are many."""
    chunks = [range(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    results = in_processes(call, chunks, cores() if total >= PARALLEL else 0)
    with Progress(total=total, desc=title, leave=False, unit="img") as bar:
        for chunk, result in zip(chunks, results, strict=True):
            yield result
            bar.update(len(chunk))
