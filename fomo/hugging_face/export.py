"""A model as other libraries open it: a directory that transformers' from_pretrained takes.

python fomo.py export runs/photos --to transformers photos-hf/
"""

import json
import re
import string
from functools import reduce
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fomo.architectures import by_names_of, config_of
from fomo.atomic import staged_folder, write_tensors
from fomo.checkpoint_files import note
from fomo.clip import Clip, assemble
from fomo.errors import FieldError, UserError
from fomo.hugging_face.configs import MODELS, config_json
from fomo.hugging_face.folder import CONFIG, WORDS
from fomo.hugging_face.names import TABLES, Renamed
from fomo.hugging_face.pictures import image_processor
from fomo.merge_files import open_weights
from fomo.runs.folder import Run, is_run
from fomo.runs.lineage import head_of

PUNCTUATION = f"[{re.escape(string.punctuation)}]"
NEEDED = (
    "export --to transformers needs transformers for its tokenizer files: pip install -r requirements-hf.txt"
)


def export(model: str, out: Path) -> Path:
    """Write a run's deployed model, or any that `--model` takes, as transformers has them; -> `out`.

    The weights keep their dtypes. Raises a UserError where transformers has no such model.
    """
    transformers = library()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already, expected a new or an empty folder")
    if run := is_run(Path(model)):
        head_of(Path(model))  # refuses a run that is not finished
    checkpoint = open_weights(str(Run(Path(model)).model) if run else model)
    config, label = config_of(None, checkpoint), f"model {checkpoint.label}"
    with torch.device("meta"):
        clip = assemble(config, checkpoint.folder, label)
    try:
        said = config_json(clip.config["model_cfg"], end_of_text(clip))
        pictures = image_processor(clip.config["preprocess_cfg"], clip.image_size)
        refuse_words(clip.config["model_cfg"]["text_cfg"])
    except FieldError as error:
        raise UserError(f"{label}: {error}") from None
    tensors = renamed(by_names_of(clip.model, checkpoint), said["model_type"], label)
    said["dtype"] = str(reduce(torch.promote_types, {t.dtype for t in tensors.values()}))[6:]
    with staged_folder(out) as staging:
        (staging / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
        write_tensors(tensors, staging / "model.safetensors")
        write_processor(transformers, said["model_type"], clip, pictures, staging)
    return out


def library() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise UserError(NEEDED) from None
    return transformers


def renamed(tensors: dict[str, Tensor], kind: str, label: str) -> dict[str, Tensor]:
    """By the names of transformers; buffers are left out, which it makes itself."""
    if kind == "clip":  # whose text tower is part of it or stands apart, as `text`
        tensors = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    weights = {
        name: t for name, t in tensors.items() if t.is_floating_point() and not name.endswith("attn_mask")
    }
    result = Renamed(weights, TABLES[kind], "transformers")
    if result.unknown:
        found = f"has {result.unknown[0]}"
        raise UserError(f"{label}: {found}, of which {MODELS[kind]} has no counterpart")
    return dict(result)


# --- the processor ---------------------------------------------------------------------------------------


def end_of_text(clip: Clip) -> int | None:
    """The id with which the tokenizer ends a text."""
    inner = getattr(clip.tokenizer, "tokenizer", None)
    return inner.eos_token_id if inner else clip.tokenizer.eot_token_id


def refuse_words(text: dict) -> None:
    """A FieldError for what a tokenizer of transformers does not do to a text."""
    accepted = {"clean"} if text.get("hf_tokenizer_name") else set()
    odd = (text.get("tokenizer_kwargs") or {}).keys() - accepted
    if odd:
        raise FieldError(
            f"text_cfg.tokenizer_kwargs.{min(odd)}", "transformers has no tokenizer that does this"
        )


def write_processor(transformers: ModuleType, kind: str, clip: Clip, pictures: dict, folder: Path) -> None:
    """The files of CLIPProcessor or SiglipProcessor: a tokenizer and how pictures are prepared."""
    name, text = {"clip": "CLIP", "siglip": "Siglip"}[kind], clip.config["model_cfg"]["text_cfg"]
    if hasattr(clip.tokenizer, "tokenizer"):
        clean = (text.get("tokenizer_kwargs") or {}).get("clean", "whitespace")
        tokenizer = as_trained(transformers, clip.tokenizer.tokenizer, clean)
    else:
        write_words(clip.tokenizer, folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = text.get("context_length", 77)
    if kind == "siglip":  # it was trained without a mask, on texts padded to the context
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = ["input_ids"]
    images = getattr(transformers, f"{name}ImageProcessor")(**pictures)
    processor = getattr(transformers, f"{name}Processor")(image_processor=images, tokenizer=tokenizer)
    processor.save_pretrained(folder)
    images.save_pretrained(folder)  # preprocessor_config.json, which versions before 5 read


def write_words(tokenizer, folder: Path) -> None:
    """vocab.json and merges.txt, of which CLIPTokenizer is made, from open_clip's own byte-pair encoding."""
    theirs = {ours: word for word, ours in WORDS.items()}
    vocabulary = {theirs.get(word, word): number for word, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def as_trained(transformers: ModuleType, tokenizer, clean: str):
    """A tokenizer with open_clip's cleaning of texts in front, which transformers' classes would not keep."""
    from tokenizers import Regex, normalizers

    core, canonical = getattr(tokenizer, "backend_tokenizer", None), clean == "canonicalize"
    if core is None:  # on sentencepiece: SiglipTokenizer cleans texts itself
        note(
            f"export: {type(tokenizer).__name__} cleans texts its own way: it drops _, which here is a space"
        )
        return tokenizer
    steps = [normalizers.Replace("_", " "), normalizers.Replace(Regex(PUNCTUATION), "")] if canonical else []
    steps += [] if clean == "whitespace" else [normalizers.Lowercase()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    core.normalizer = normalizers.Sequence([*steps, *([core.normalizer] if core.normalizer else [])])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, padding_side=tokenizer.padding_side, **tokenizer.special_tokens_map
    )
