"""The tensors of a TorchScript archive, as OpenAI's models are published, read without its program.

The archive is a zip of a pickled tree of modules, the bytes of each tensor, and code. Unpickling calls what a
pickle names, so here all that it may name is a stand-in that keeps what it is given; the code is not looked at.
"""

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OPENAI = {
    "input_resolution",
    "context_length",
    "vocab_size",
}  # numbers that its archives have among the tensors
MODULES = 100_000  # of a tree; far fewer can stand for endlessly many, one inside the other
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


class Anything:
    """Stands for an object of any class of the archive's program, or for what any function returns."""

    state: Any = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:  # also keeps a pickle from setting attributes of this class
        self.state = state


class Stored(Anything):
    """Where a tensor is: stands for torch's function that makes one."""

    def __init__(self, storage: tuple, offset: int, size: tuple, stride: tuple, *_: Any):
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return name
        return Stored if (module, name) == ("torch._utils", "_rebuild_tensor_v2") else Anything

    def persistent_load(self, identity: Any) -> Any:
        """A storage: ("storage", its type, its name, its device, the number of its elements)."""
        return identity


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Named tensors, as the module's state_dict has them. Raises what a damaged file raises."""
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        tree = Reader(io.BytesIO(record(archive, pickled))).load()
        folder = pickled.removesuffix("data.pkl") + "data/"
        return {name: tensor_of(entry, archive, folder) for name, entry in entries(tree)}


def record(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:  # torch compresses only code
        raise ValueError(f"{name} is compressed")
    return archive.read(name)


def entries(tree: Any) -> Iterator[tuple[str, Stored]]:
    """The tensors of a module and of all below it."""
    waiting, seen = [("", tree)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        if seen > MODULES:
            raise ValueError(f"more than {MODULES:,} modules")
        for name, value in module.state.items() if isinstance(module.state, dict) else ():
            if isinstance(value, Stored):
                yield f"{prefix}{name}", value
            elif isinstance(value, Anything):
                waiting.append((f"{prefix}{name}.", value))


def tensor_of(entry: Stored, archive: zipfile.ZipFile, folder: str) -> Tensor:
    _, kind, name, *_ = entry.storage
    flat = torch.frombuffer(bytearray(record(archive, f"{folder}{name}")), dtype=DTYPES[kind])
    return flat.as_strided(entry.size, entry.stride, entry.offset)
