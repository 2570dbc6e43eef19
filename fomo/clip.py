"""open_clip models: loading and saving, features, the contrastive loss.

Shapes: B pairs in a batch, L tokens of text, S image side, D embedding width.
"""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from fomo.architectures import (
    HUB,
    at_size,
    build,
    config_of,
    configuration,
    hub_checkpoint,
    load_weights,
    locate,
    needs_transformers,
    tokenizer_of,
)
from fomo.checkpoint_files import CONFIG_FILE, NOT_TENSORS, WEIGHTS_FILE, open_checkpoint, write_checkpoint
from fomo.devices import Precision
from fomo.errors import UserError, one_line

LONGEST = 4096  # tokens of any text


class Features(NamedTuple):
    """What one step computes, normalised; penalties use it instead of a second forward pass."""

    image_features: Tensor  # (B, D)
    text_features: Tensor  # (B, D)
    logit_scale: Tensor  # (), already exponentiated
    logit_bias: Tensor | None = None  # (), SigLIP models only


@dataclass
class Clip:
    """An open_clip model with what belongs to it."""

    model: nn.Module
    config: dict  # content of open_clip_config.json: model_cfg, preprocess_cfg
    tokenizer: object
    precision: str = "auto"  # of its forward passes (devices.Precision)

    @property
    def image_size(self) -> int:
        size = self.model.visual.image_size
        return size[0] if isinstance(size, (tuple, list)) else size

    @property
    def preprocess(self) -> PreprocessCfg:
        """What open_clip's own transform of the deployed model does to a picture."""
        return PreprocessCfg(**self.config["preprocess_cfg"])

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.preprocess.mean)

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.preprocess.std)

    def precision_on(self, device: torch.device) -> Precision:
        return Precision(self.precision, device, self.config["model_cfg"]["embed_dim"])

    def tokenize(self, texts: list[str]) -> list:
        """Token ids of each text as an int32 array, cut after its end where the text tower allows it."""
        tokens = self.tokenizer(texts)  # (n, context)
        text = text_tower(self.model)
        if not trimmable(text):
            return list(tokens.to(torch.int32).numpy())
        ends = tokens.argmax(-1) if pool_type(text) == "argmax" else (tokens == eos_id(text)).int().argmax(-1)
        return [
            row[: end + 1].to(torch.int32).numpy() for row, end in zip(tokens, ends.tolist(), strict=True)
        ]


def text_tower(model: nn.Module) -> nn.Module:
    """CLIP is its own text tower, CustomTextCLIP keeps it in `.text`."""
    return getattr(model, "text", model)


def pool_type(text: nn.Module) -> str | None:
    return getattr(text, "text_pool_type", getattr(text, "pool_type", None))


def eos_id(text: nn.Module) -> int | None:
    return getattr(text, "text_eos_id", getattr(text, "eos_id", None))


def trimmable(text: nn.Module) -> bool:
    """Whether what stands after a caption's end cannot change its features: causal, pooled at the end."""
    causal = getattr(text, "attn_mask", None) is not None and getattr(text, "cls_emb", None) is None
    return causal and pool_type(text) in ("argmax", "eos")


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, L) ids with any L up to the context -> (B, D).

    open_clip's own encode_text adds the full positional embedding and so insists on the full context. A causal
    tower computes the same on the first L positions (differences are rounding), which saves a third of a
    ViT-B-32 step.
    """
    text = text_tower(model)
    if not trimmable(text):
        return model.encode_text(tokens)
    length = tokens.shape[1]
    dtype = text.transformer.get_cast_dtype()
    x = text.token_embedding(tokens).to(dtype) + text.positional_embedding[:length].to(dtype)
    x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])  # (B, L, width)
    x = text_global_pool(text.ln_final(x), tokens, pool_type(text), eos_token_id=eos_id(text))
    if isinstance(text.text_projection, nn.Linear):
        return text.text_projection(x)
    return x if text.text_projection is None else x @ text.text_projection


def encode(model: nn.Module, images: Tensor, tokens: Tensor) -> Features:
    """images (B, 3, S, S) normalised, tokens (B, L) -> features on the unit sphere."""
    return Features(
        F.normalize(model.encode_image(images).float(), dim=-1),
        F.normalize(encode_text(model, tokens).float(), dim=-1),
        model.logit_scale.exp(),
        getattr(model, "logit_bias", None),
    )


def ids_of_texts(tokens: Tensor) -> Tensor:
    """(B, L) token ids, zeros after each text's end -> (B,) int64, the same for the same text whatever L is.

    A hash: odd 64-bit factors drawn once, sums modulo 2^64, so B texts meet by chance with B^2 / 2^64.
    """
    draws = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (LONGEST,), generator=draws) | 1
    return (tokens * factors[: tokens.shape[1]].to(tokens.device)).sum(1)


def contrastive_loss(features: Features, text_ids: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over the batch (paper, section 4: the pretraining objective), scalar.

    Models with a logit bias were trained with the sigmoid loss of SigLIP (arXiv 2303.15343) and keep it.
    text_ids: (B,), the same for the same text. A picture is then right with every text that is its own: labels of
    the sigmoid are +1, targets of the softmax are spread over them (UniCL, arXiv 2204.03610, equation 3). For a
    softmax without dropout that is the same function: equal texts have equal logits.
    """
    logits = features.logit_scale * features.image_features @ features.text_features.T  # (B, B)
    equal = None if text_ids is None else (text_ids[:, None] == text_ids).to(logits.dtype)  # (B, B)
    if features.logit_bias is not None:
        right = torch.eye(len(logits), device=logits.device, dtype=logits.dtype) if equal is None else equal
        return -F.logsigmoid((2 * right - 1) * (logits + features.logit_bias)).sum() / len(logits)
    if equal is not None:
        targets = equal / equal.sum(1, keepdim=True)
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def load(name: str | None, pretrained: str | None, image_size: int | None = None) -> Clip:
    """Load a model by open_clip's name and tag, a checkpoint file, or a directory or repository of the hub that
    open_clip, transformers or we wrote.

    What architecture a file has: architectures.config_of. image_size: side of pictures, if another than its own.
    """
    named, path = locate(name, pretrained)
    checkpoint = open_checkpoint(path) if path else hub_checkpoint(named)
    if checkpoint is None:
        return download(named, image_size)
    label = f"model {checkpoint.label}"
    config = at_size(config_of(named if path else None, checkpoint), image_size, label)
    clip = assemble(config, checkpoint.folder, label)
    load_weights(clip.model, checkpoint, resized=image_size is not None)
    return clip


def download(name: str, image_size: int | None) -> Clip:
    """open_clip's NAME/TAG, or hf-hub:... of open_clip."""
    label, config = f"model {name}", configuration(name, None, image_size)
    base, _, tag = (name, "", "") if name.startswith(HUB) else name.partition("/")
    tokenizer = tokenizer_of(config, None, label)  # first: it may be what is missing
    how = {"force_quick_gelu": bool(config["model_cfg"].get("quick_gelu")), "force_image_size": image_size}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quick-gelu hints: tag_config handles them
            model = open_clip.create_model(base, pretrained=tag or None, require_pretrained=True, **how)
    except ImportError as error:
        raise needs_transformers(label, error) from None
    except NOT_TENSORS as error:
        raise UserError(f"{label}: cannot be loaded: {one_line(error)}") from None
    return finish(model, config, tokenizer)


def new(config: dict, seed: int) -> Clip:
    """A model with random weights from open_clip's model_cfg, the same for the same seed."""
    torch.manual_seed(seed)
    return assemble({"model_cfg": config, "preprocess_cfg": {}}, None, "model.config")


def assemble(config: dict, folder: Path | None, label: str) -> Clip:
    """With random weights, of the content of open_clip_config.json. folder: where its tokenizer may be."""
    model = build(config["model_cfg"], label)
    pictures = {**asdict(PreprocessCfg(size=model.visual.image_size)), **config["preprocess_cfg"]}
    open_clip.model.set_model_preprocess_cfg(model, pictures)
    return finish(model, {"model_cfg": config["model_cfg"]}, tokenizer_of(config, folder, label))


def finish(model: nn.Module, config: dict, tokenizer: object) -> Clip:
    preprocess = model.visual.preprocess_cfg.items()
    config["preprocess_cfg"] = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocess}
    return Clip(model, config, tokenizer)


def save(clip: Clip, directory: Path) -> None:
    """Write what open_clip opens as "local-dir:DIRECTORY" and hubs accept as it is."""
    write_checkpoint(clip.model.state_dict(), directory / WEIGHTS_FILE, clip.config)
    (directory / CONFIG_FILE).write_text(json.dumps(clip.config, indent=2) + "\n")
    if hasattr(clip.tokenizer, "save_pretrained"):
        clip.tokenizer.save_pretrained(directory)
