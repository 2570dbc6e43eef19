"""Which of open_clip's architectures a file of weights belongs to, by the names and shapes of its tensors."""

import pickle

import open_clip
import torch
from safetensors import SafetensorError

from fomo.errors import UserError, one_line

# What reading a file that is no checkpoint, or a failed download, may raise.
NOT_TENSORS = (
    RuntimeError,
    ValueError,
    OSError,
    EOFError,
    KeyError,
    AttributeError,
    StopIteration,
    SafetensorError,
)
NOT_TENSORS += (pickle.UnpicklingError,)


def architecture_of(checkpoint: str) -> str:
    """The open_clip architecture whose tensors have the names and shapes of a checkpoint's."""
    try:
        shapes = {n: tuple(t.shape) for n, t in open_clip.factory.load_state_dict(checkpoint).items()}
    except NOT_TENSORS as error:
        raise UserError(f"model {checkpoint}: not a file of tensors: {one_line(error)}") from None
    for name in open_clip.list_models():
        if plausible(open_clip.get_model_config(name), shapes):
            config = open_clip.get_model_config(name)
            kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
            with torch.device("meta"):
                model = kind(**config)
            if {n: tuple(t.shape) for n, t in model.state_dict().items()} == shapes:
                return name
    raise UserError(
        f"model {checkpoint}: fits no architecture of open_clip; name it with --set model.name=NAME"
    )


def plausible(config: dict, shapes: dict) -> bool:
    """A cheap test before an architecture is built: plain ViT or ResNet towers, same text width and depth."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    positional = shapes.get("positional_embedding", shapes.get("text.positional_embedding", (0, 0)))
    if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in config:
        return False
    depth = sum(n.endswith("ln_1.weight") and not n.startswith("visual.") for n in shapes)
    conv = shapes.get("visual.conv1.weight", (0,))
    same_vision = isinstance(vision["layers"], list) or (
        conv[0] == vision["width"] and conv[-1] == vision["patch_size"]
    )
    return same_vision and positional[-1] == text["width"] and depth == text["layers"]
