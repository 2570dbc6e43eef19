"""Files of weights: opened without running code, by open_clip's names, with their model's configuration.

Tensors do not say which activation, how many heads or what preprocessing they were trained with. So the
safetensors files that are written here carry open_clip_config.json in their metadata.
"""

import functools
import json
import pickle
import re
import sys
import warnings
import zipfile
from collections import ChainMap
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor

from fomo.atomic import OnDisk, write_tensors
from fomo.errors import UserError, one_line
from fomo.hugging_face.folder import CONFIG, model_type, open_clip_config
from fomo.hugging_face.names import TABLES, Renamed
from fomo.torchscript import read_torchscript

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
CONFIG_KEY = "open_clip_config"  # in the metadata of a safetensors file
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
ENTRIES = ("state_dict", "model_state_dict", "model", "module")  # of what training programs save, the weights
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|\b_orig_mod\.")  # of a parallel and a compiled model
THEIRS = "text_model.embeddings.token_embedding.weight"  # transformers' name
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode", "fill_color")
# What reading a file that is no checkpoint, or a failed download, may raise.
NOT_TENSORS = (RuntimeError, ValueError, OSError, EOFError, LookupError, AttributeError, StopIteration)
NOT_TENSORS += (SafetensorError, pickle.UnpicklingError, TypeError, AssertionError)


class Checkpoint(Mapping):
    """The named tensors of a model, read one at a time where the file allows it, and what is known of it."""

    def __init__(
        self,
        label: str,
        stored: Mapping[str, Tensor],
        config: dict | None = None,  # content of open_clip_config.json
        file: Path | None = None,
        folder: Path | None = None,  # where its tokenizer may be
    ):
        self.label, self.stored, self.config, self.file, self.folder = label, stored, config, file, folder
        outer = "model." if "model.logit_scale" in stored else ""  # of a LightningModule
        self.names = {WRAPPERS.sub("", name.removeprefix(outer)): name for name in stored}
        if len(self.names) < len(stored):
            raise UserError(f"{label}: has tensors twice, with and without the prefix of a wrapper")
        if changed := next((name for plain, name in self.names.items() if plain != name), None):
            note(f"{label}: prefixes are taken off its names, as off {changed}")

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@functools.cache
def note(line: str) -> None:
    """Say once, on standard error, what was guessed or left out."""
    print(line, file=sys.stderr)


def open_checkpoint(path: Path) -> Checkpoint:
    """A file, or the one that open_clip reads in a directory, or a model of transformers.

    Its configuration is in the directory; of a file it is what its metadata says, else what lies beside it, or in
    the model/ of the run whose weights/ or experts/ hold it.
    """
    if path.is_dir() and not (path / CONFIG_FILE).exists() and model_type(path):
        return open_transformers(str(path), *shards(path))
    file = weights_file(path) if path.is_dir() else path
    stored = read_tensors(file)
    if THEIRS in Checkpoint(str(path), stored):
        return open_transformers(str(path), stored, file)
    places = [
        file.parent,
        *([file.parent.parent / "model"] if file.parent.name in ("weights", "experts") else []),
    ]
    folder = next((place for place in places if (place / CONFIG_FILE).is_file()), None)
    config = None
    if isinstance(stored, OnDisk) and CONFIG_KEY in stored.metadata and not (folder and path.is_dir()):
        config = parse_config(stored.metadata[CONFIG_KEY], f"{file}: {CONFIG_KEY} in its metadata")
    elif folder:
        config = parse_config((folder / CONFIG_FILE).read_text("utf-8", "replace"), str(folder / CONFIG_FILE))
    return Checkpoint(str(path), stored, config, file, folder or file.parent)


def open_transformers(
    label: str, stored: Mapping[str, Tensor], file: Path, repository: str | None = None
) -> Checkpoint:
    """A model of transformers, under open_clip's names.

    stored: its tensors; file: theirs, or the list of their files; repository: where it is on the hub.
    """
    config = transformers_config(file.parent, label, repository)
    table = TABLES[model_type(file.parent)]
    return Checkpoint(
        label, Renamed(Checkpoint(label, stored), table, "open_clip"), config, file, file.parent
    )


def transformers_config(folder: Path, label: str, repository: str | None = None) -> dict:
    """The content of open_clip_config.json for a model of transformers."""
    if model_type(folder) is None:
        where = f"expected its {CONFIG} in {folder}"
        raise UserError(f"model {label}: its tensors have the names of transformers; {where}")
    config, remarks = open_clip_config(folder, repository)
    for remark in remarks:
        note(f"model {label}: {remark}")
    return config


def shards(folder: Path) -> tuple[Mapping[str, Tensor], Path]:
    """The tensors of a model that transformers wrote, in one file or in several, and that file or their index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return read_tensors(folder / name), folder / name
        if index.exists():
            return ChainMap(*(read_tensors(folder / part) for part in files_of(index))), index
    wanted = "model.safetensors or pytorch_model.bin, or the index of their parts"
    raise UserError(f"model {folder}: no file of weights in this directory, expected {wanted}")


def files_of(index: Path) -> list[str]:
    """The names of the files that an index lists."""
    try:
        names = sorted({*map(str, json.loads(index.read_text("utf-8", "replace"))["weight_map"].values())})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{index}: expected weight_map, the file of each tensor") from None
    if odd := next((name for name in names if Path(name).name != name), None):
        raise UserError(f"{index}: got {odd!r}, accepted: names of files beside it")
    return names


def weights_file(directory: Path) -> Path:
    found = _find_checkpoint_in_dir(directory)
    if found is None:
        wanted = f"expected are {CONFIG_FILE} and {WEIGHTS_FILE}"
        raise UserError(f"model {directory}: no file of weights in this directory, {wanted}")
    if sum(file.suffix in SUFFIXES for file in directory.iterdir()) > 1:
        note(f"model {directory}: of several files of weights, {Path(found).name} is read")
    return Path(found)


def parse_config(text: str, label: str) -> dict:
    try:
        config = json.loads(text)
        towers = [config["model_cfg"][tower] for tower in ("vision_cfg", "text_cfg")]
        pictures = with_defaults(config.get("preprocess_cfg") or {})
        if not all(isinstance(tower, dict) for tower in towers):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        wanted = "model_cfg (with vision_cfg and text_cfg) and preprocess_cfg, as open_clip writes them"
        raise UserError(f"{label}: expected {wanted}") from None
    return {"model_cfg": config["model_cfg"], "preprocess_cfg": pictures}


def with_defaults(said: Mapping[str, Any]) -> dict:
    """How pictures are prepared, with open_clip's defaults for what is not said."""
    filled = {**asdict(PreprocessCfg()), **{key: value for key, value in said.items() if value is not None}}
    return {key: list(x) if isinstance(x := filled[key], tuple) else x for key in PREPROCESSING}


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """By the names that the file has."""
    try:
        with open(path, "rb") as file:
            head = file.read(40)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path}: a pointer of Git LFS in place of the file, which `git lfs pull` fetches"
            )
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            return OnDisk(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a file of tensors, or cut short: {one_line(error)}") from None
    content = read_torch_file(path)
    while isinstance(content, Mapping):
        entry = next((key for key in ENTRIES if isinstance(content.get(key), Mapping)), None)
        if entry is None:
            break
        note(f"{path}: read is its entry {entry}")
        content = content[entry]
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(name): tensor for name, tensor in entries if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"{path}: not a file of named tensors but of a {type(content).__name__}")
    return tensors


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote, as far as it is tensors and plain values; nothing in it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript and old pickles, which are refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except NOT_TENSORS as error:  # torch's own words end in the advice to load what was refused
        if "TorchScript" in str(error):
            return tensors_of_program(path)
        if refused := re.search(r"GLOBAL (\w\S*)", str(error)):
            remedy = "save the tensors alone, with torch.save(model.state_dict(), FILE)"
            problem = f"not a file of tensors alone, it holds {refused[1]}, which may run code: {remedy}"
        else:
            problem = "not a file of tensors that torch.save or safetensors wrote, or cut short"
        raise UserError(f"{path}: {problem}") from None


def tensors_of_program(path: Path) -> dict[str, Tensor]:
    """Of a TorchScript archive, which is never run."""
    try:
        tensors = read_torchscript(path)
    except (*NOT_TENSORS, zipfile.BadZipFile, MemoryError) as error:
        problem = f"a TorchScript archive whose tensors cannot be read without running it: {one_line(error)}"
        raise UserError(f"{path}: {problem}; save them with torch.save(model.state_dict(), FILE)") from None
    if not tensors:
        raise UserError(f"{path}: a TorchScript archive without tensors")
    note(f"{path}: a TorchScript archive, of which the tensors are read; its program is not run")
    return tensors


def write_checkpoint(tensors: Mapping[str, Tensor], path: Path, config: dict | None) -> None:
    """A safetensors file that says how its model is configured."""
    write_tensors(tensors, path, {CONFIG_KEY: json.dumps(config)} if config else None)
