"""What lies in a directory that transformers wrote, as open_clip says it. The library is not needed for this."""

import json
from collections.abc import Mapping
from pathlib import Path

import open_clip

from fomo.errors import FieldError, UserError
from fomo.hugging_face.configs import MODELS, Text, model_cfg, tower
from fomo.hugging_face.pictures import preprocess_cfg

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "tokenizer_config.json")
WORDS = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}  # transformers': open_clip's


def model_type(folder: Path) -> str | None:
    """What transformers would open a directory as; None if it is none of its."""
    try:
        said = json.loads((folder / CONFIG).read_text("utf-8", "replace"))
    except (OSError, ValueError):
        return None
    return str(said["model_type"]) if isinstance(said, dict) and "model_type" in said else None


def open_clip_config(folder: Path, repository: str | None = None) -> tuple[dict, list[str]]:
    """The content of an open_clip_config.json, and remarks on what cannot be said in it.

    repository: the directory's name on the hub, if it comes from there.
    """
    label, kind = str(folder / CONFIG), model_type(folder)
    if kind not in MODELS:
        accepted = " and ".join(f"{name} ({MODELS[name]})" for name in MODELS)
        raise UserError(f"{label}: model_type: got {kind}, accepted: {accepted}")
    config = json.loads((folder / CONFIG).read_text("utf-8", "replace"))
    try:
        text, vision = (tower(config, kind, number) for number in range(2))
        cfg, remarks = model_cfg(config, kind)
        words, of_words = tokenizer_cfg(folder, kind, text, repository)
        pictures, of_pictures = preprocess_cfg(folder, kind, vision.image_size)
    except FieldError as error:
        raise UserError(f"{label}: {error}") from None
    cfg["text_cfg"] |= words
    return {"model_cfg": cfg, "preprocess_cfg": pictures}, remarks + of_words + of_pictures


def tokenizer_cfg(folder: Path, kind: str, text: Text, repository: str | None) -> tuple[dict, list[str]]:
    """Nothing for CLIP's own byte-pair encoding, which open_clip has; else where the tokenizer is to be had.

    A deployed model takes it from its own directory; the name counts where a file is moved or put on the hub.
    """
    own = open_clip.SimpleTokenizer().encoder
    fits = kind == "clip" and text.vocab_size == len(own)
    if not any((folder / name).exists() for name in TOKENIZERS):
        if not fits:
            raise UserError(f"{folder}: no tokenizer, expected one of {', '.join(TOKENIZERS)}")
        return {}, ["no tokenizer lies beside it: open_clip's own is taken"]
    if fits and {WORDS.get(word, word): number for word, number in vocabulary(folder).items()} == own:
        return {}, []
    name = repository or str(folder.resolve())
    if kind == "clip":
        return {"hf_tokenizer_name": name}, []
    released = (open_clip.get_model_config(m)["text_cfg"] for m in open_clip.list_models() if "SigLIP" in m)
    same = {cfg["vocab_size"]: cfg["hf_tokenizer_name"] for cfg in released}
    name = repository or same.get(text.vocab_size, name)
    return {"hf_tokenizer_name": name, "tokenizer_kwargs": {"clean": "canonicalize"}}, []


def vocabulary(folder: Path) -> Mapping[str, int]:
    """Of a byte-pair encoding."""
    for name in ("vocab.json", "tokenizer.json"):
        try:
            found = json.loads((folder / name).read_text("utf-8", "replace"))
            found = found["model"]["vocab"] if name == "tokenizer.json" else found
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if isinstance(found, dict):
            return found
    return {}
