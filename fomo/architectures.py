"""Which model is meant: by open_clip's name, by what a checkpoint says of itself, or by its tensors' shapes.

Architectures with equal tensors may compute other features (QuickGELU or not) or want other pictures (mean, size,
how they are resized). Where more than one fits, nothing is guessed.
"""

import difflib
import functools
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from fomo import hub
from fomo.checkpoint_files import (
    CONFIG_FILE,
    NOT_TENSORS,
    Checkpoint,
    note,
    open_checkpoint,
    open_transformers,
    parse_config,
    shards,
    transformers_config,
    with_defaults,
)
from fomo.errors import UserError, one_line
from fomo.schema import differences
from fomo.torchscript import OPENAI
from fomo.weights import is_constant

HUB, LOCAL = "hf-hub:", "local-dir:"
POSITIONS = "visual.positional_embedding"


def locate(name: str | None, pretrained: str | None) -> tuple[str | None, Path | None]:
    """-> (open_clip's NAME, NAME/TAG or hf-hub:..., if said; a file or directory, if it is no download).

    pretrained: a tag, a file, a directory, or TAG/FILE: with the activation and the preprocessing of the tag.
    """
    label = "/".join(filter(None, (name, pretrained)))
    if name and pretrained and name.startswith((HUB, LOCAL)):
        raise UserError(f"model.pretrained: got {pretrained}, accepted: none, {name} has weights of its own")
    if name is None or name.startswith(LOCAL):
        path = Path((name or pretrained).removeprefix(LOCAL)).expanduser()
        if not path.exists():
            raise UserError(
                f"model {label}: no such file or directory; an open_clip model is written NAME/TAG"
            )
        return None, path
    if name.startswith(HUB):
        return name, None
    base, _, rest = label.partition("/")
    if base not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(base, open_clip.list_models(), n=3))
        problem = f"no such file or directory, and {base} is no name that open_clip knows"
        remedy = f", nearest: {near}" if near else f"; a repository of the hub is written {HUB}{label}"
        raise UserError(f"model {label}: {problem}{remedy}")
    tag, _, file = rest.partition("/")
    if open_clip.get_pretrained_cfg(base, tag):
        base = f"{base}/{tag}"
    else:
        tag, file = "", os.path.expanduser(rest)
    if (file and not Path(file).exists()) or not (file or tag):
        tags = open_clip.list_pretrained_tags_by_model(base)
        shown = difflib.get_close_matches(rest, tags, n=3) or tags[:3]
        problem = f"unknown weights {rest!r}, no tag and no file" if rest else "say which weights"
        accepted = f"{base}/FILE" + (
            f" or {base}/TAG, of {len(tags)} tags: {', '.join(shown)}" if tags else ""
        )
        raise UserError(f"model {label}: {problem}, accepted: {accepted}")
    return base, Path(file) if file else None


def configuration(name: str | None, pretrained: str | None, image_size: int | None = None) -> dict:
    """The content of a model's open_clip_config.json; no weights are fetched, and those of a file fit it."""
    named, path = locate(name, pretrained)
    if path:
        checkpoint = open_checkpoint(path)
        config = at_size(config_of(named, checkpoint), image_size, f"model {path}")
        with torch.device("meta"):
            model = build(config["model_cfg"], f"model {path}")
        by_names_of(model, checkpoint, resized=image_size is not None)
        return config
    config = hub_config(named) if named.startswith(HUB) else tag_config(named)
    return at_size(config, image_size, f"model {named}")


def hub_config(name: str) -> dict:
    """Of hf-hub:ORG/NAME."""
    found = fetched(hub.config_file, name)
    if found.name == CONFIG_FILE:
        return parse_config(found.read_text("utf-8", "replace"), f"model {name}: {CONFIG_FILE}")
    return transformers_config(found.parent, name, name.removeprefix(HUB))


def hub_checkpoint(name: str) -> Checkpoint | None:
    """Of hf-hub:ORG/NAME, if it is a model of transformers; open_clip fetches its own."""
    if not name.startswith(HUB) or fetched(hub.config_file, name).name == CONFIG_FILE:
        return None
    return open_transformers(name, *shards(fetched(hub.with_weights, name)), name.removeprefix(HUB))


def fetched(fetch: Callable[[str], Path], name: str) -> Path:
    try:
        return fetch(name.removeprefix(HUB))
    except NOT_TENSORS as error:
        raise UserError(f"model {name}: cannot be had: {one_line(error)}") from None


def at_size(config: dict, image_size: int | None, label: str) -> dict:
    """The configuration for pictures of another side; None: for those that it has."""
    model_cfg = square(config, label)["model_cfg"]
    vision = model_cfg["vision_cfg"]
    own, patch = (
        side_of(vision.get(key, default)) for key, default in (("image_size", 224), ("patch_size", 16))
    )
    if image_size in (None, own):
        return config
    tower = vision.get("timm_model_name") or ("a ResNet" if isinstance(vision.get("layers"), list) else None)
    if tower:
        problem = f"accepted: {own}, as its tower is {tower}, or a model with open_clip's own ViT"
        raise UserError(f"{label}: image_size: got {image_size}, {problem}")
    if isinstance(patch, int) and patch > 0 and image_size % patch:  # else open_clip refuses it
        near = " or ".join(str(n * patch) for n in {max(image_size // patch, 1), image_size // patch + 1})
        problem = f"accepted: a multiple of its patches' {patch}, as {near}"
        raise UserError(f"{label}: image_size: got {image_size}, {problem}")
    return {**config, "model_cfg": {**model_cfg, "vision_cfg": {**vision, "image_size": image_size}}}


def side_of(size: int | list | tuple) -> int:
    return size[0] if isinstance(size, list | tuple) else size


def config_of(name: str | None, checkpoint: Checkpoint) -> dict:
    """As NAME says, else as the checkpoint does, else as the shapes of its tensors allow."""
    label = f"model {checkpoint.label}"
    if name is None and checkpoint.config:
        return square(checkpoint.config, label)
    names = [name] if name else names_that_fit(frozenset(shapes_of(checkpoint).items()))
    if checkpoint.keys() >= OPENAI:  # its archives do not say the activation, but they are its own
        names = [f"{each}/openai" if open_clip.get_pretrained_cfg(each, "openai") else each for each in names]
    if not names:
        problem = f"fits no architecture of open_clip by its tensors (the first is {next(iter(checkpoint))})"
        raise UserError(
            f"{label}: {problem}; name it as NAME/FILE, or put its open_clip_config.json beside it"
        )
    choices = distinct({said: config for each in names for said, config in published(each).items()})
    if len(choices) > 1:
        one, *others = choices.values()
        fields = ", ".join(dict.fromkeys(field for other in others for field in differences(one, other)))
        problem = f"may be {', '.join(choices)}, which have equal tensors and differ in {fields}"
        raise UserError(f"{label}: {problem}: say which as NAME/FILE, or with --set model.name=NAME")
    found, config = next(iter(choices.items()))
    if name is None:
        note(f"{label}: taken as {found}, which alone its tensors fit")
    elif checkpoint.config and (fields := differences(checkpoint.config, config)):
        note(f"{label}: taken as {found}, as said; its own configuration differs in {', '.join(fields)}")
    return square(config, label)


def tag_config(name: str) -> dict:
    """Of NAME/TAG; of NAME with open_clip's default preprocessing."""
    base, _, tag = name.partition("/")
    config, known = open_clip.get_model_config(base), open_clip.get_pretrained_cfg(base, tag) or {}
    if known.get("quick_gelu"):
        config["quick_gelu"] = True
    return {"model_cfg": config, "preprocess_cfg": with_defaults(known)}


def published(name: str) -> dict[str, dict]:
    """What open_clip's NAME or NAME/TAG may be: a NAME has each preprocessing of the tags that it fits."""
    plain = tag_config(name)
    tags = [] if "/" in name else open_clip.list_pretrained_tags_by_model(name)
    tagged = {f"{name}/{tag}": tag_config(f"{name}/{tag}") for tag in tags}
    choices = distinct({said: c for said, c in tagged.items() if c["model_cfg"] == plain["model_cfg"]})
    return choices if len(choices) > 1 else {name: next(iter(choices.values()), plain)}


def distinct(choices: Mapping[str, dict]) -> dict[str, dict]:
    """The first of each that are equal."""
    found: dict[str, dict] = {}
    for said, config in choices.items():
        if config not in found.values():
            found[said] = config
    return found


def square(config: dict, label: str) -> dict:
    """The configuration, if its pictures are square."""
    size = config["model_cfg"]["vision_cfg"].get("image_size", 224)
    if isinstance(size, list | tuple) and len(set(size)) > 1:
        raise UserError(f"{label}: its pictures are {' x '.join(map(str, size))}, accepted: square ones")
    return config


# --- by shapes -------------------------------------------------------------------------------------------


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not is_constant(name, tensor)}


@functools.cache
def names_that_fit(shapes: frozenset) -> list[str]:
    """open_clip's architectures whose weights have these names and shapes."""
    found = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if plausible(config, dict(shapes)):
            with torch.device("meta"):
                model = build(config, f"model {name}")
            if shapes_of(model.state_dict()) == dict(shapes):
                found.append(name)
    return found


def plausible(config: dict, shapes: Mapping[str, tuple]) -> bool:
    """A cheap test before an architecture is built: kind of vision tower, and the text's width and depth."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    if "hf_model_name" in text:
        return False  # cannot be built without a file from the hub
    prefix = "text." if "text.token_embedding.weight" in shapes else ""
    depth = sum(name.startswith(f"{prefix}transformer.") and name.endswith("ln_1.weight") for name in shapes)
    tokens = shapes.get(f"{prefix}token_embedding.weight")
    if tokens != (text.get("vocab_size", 49408), text["width"]) or depth != text["layers"]:
        return False
    if "timm_model_name" in vision:
        return any(name.startswith("visual.trunk.") for name in shapes)
    conv = shapes.get("visual.conv1.weight", (0,))
    return isinstance(vision["layers"], list) or conv[::3] == (vision["width"], vision["patch_size"])


# --- models ----------------------------------------------------------------------------------------------


def build(model_cfg: dict, label: str) -> nn.Module:
    """open_clip's model of a model_cfg, with random weights. label: begins an error's message."""
    config = deepcopy(model_cfg)
    try:
        text, vision = config["text_cfg"], config["vision_cfg"]
        custom = config.pop("custom_text", False) or "hf_model_name" in text
        if "hf_model_name" in text:
            import transformers  # noqa: F401  open_clip builds it with this, if it is installed

            text["hf_model_pretrained"] = False
        if "timm_model_name" in vision:
            vision["timm_model_pretrained"] = False
        kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
        return kind(**config) if custom else open_clip.CLIP(**config)
    except ImportError as error:
        raise needs_transformers(label, error) from None
    except (*NOT_TENSORS, ArithmeticError) as error:
        raise UserError(f"{label}: open_clip makes no model of its model_cfg: {one_line(error)}") from None


def needs_transformers(label: str, error: ImportError) -> UserError:
    """Of a text tower or tokenizer that open_clip takes from Hugging Face."""
    return UserError(f"{label}: {one_line(error)}: pip install -r requirements-hf.txt")


def tokenizer_of(config: dict, folder: Path | None, label: str) -> object:
    """folder: the model's, in which the files of a Hugging Face tokenizer may be; else they are the hub's."""
    text = config["model_cfg"]["text_cfg"]
    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    name = text.get("hf_tokenizer_name")
    if not name:
        return open_clip.SimpleTokenizer(**options)
    source = str(folder) if folder and any(folder.glob("tokenizer*")) else name
    options["trust_remote_code"] = False  # whatever a configuration says: a folder may hold programs
    try:
        return HFTokenizer(source, tokenizer_mode=text.get("tokenizer_mode"), **options)
    except ImportError as error:
        raise needs_transformers(label, error) from None
    except NOT_TENSORS as error:
        raise UserError(f"{label}: its tokenizer {source} cannot be had: {one_line(error)}") from None


def by_names_of(model: nn.Module, checkpoint: Checkpoint, resized: bool = False) -> dict[str, Tensor]:
    """The checkpoint's tensors under the model's names, if its weights are the model's.

    resized: with position embeddings interpolated, by open_clip, to the number of patches that the model has.
    """
    tensors, state = convert_state_dict(model, dict(checkpoint)), model.state_dict()  # Apple's own MobileCLIP
    if resized and POSITIONS in tensors:
        stored = tensors[POSITIONS]
        with suppress(RuntimeError):  # of those that are no square grid: they do not fit, as is said below
            resize_pos_embed(whole := {POSITIONS: stored.float()}, model)
            tensors[POSITIONS] = whole[POSITIONS].to(stored.dtype)
    if hasattr(model, "text"):  # saved by CLIP, where the text tower is the model itself
        tensors = convert_to_custom_text_state_dict(tensors)
    wanted, found = shapes_of(state), shapes_of(tensors)
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unknown to it" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name] and not {found[name], wanted[name]} <= {(), (1,)}:  # a logit scale
            wrong.append(f"{name} is {found[name]}, not {wanted[name]}")
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        problem = f"its tensors are not this architecture's: {'; '.join(wrong[:2])}{more}"
        raise UserError(f"model {checkpoint.label}: {problem}")
    return tensors


def load_weights(model: nn.Module, checkpoint: Checkpoint, resized: bool = False) -> None:
    """Into the model; buffers that only one of both has, or of another size, stay as the model makes them."""
    tensors, state = by_names_of(model, checkpoint, resized), model.state_dict()
    fitting = [name for name in state if name in tensors and tensors[name].numel() == state[name].numel()]
    for name in fitting:
        state[name].copy_(tensors[name].reshape(state[name].shape))
    if odd := sorted((tensors.keys() | state.keys()) - set(fitting)):
        note(
            f"model {checkpoint.label}: buffers passed over, which not every version has: {', '.join(odd[:3])}"
        )
