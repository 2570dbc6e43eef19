"""How models are configured: config.json of transformers and model_cfg of open_clip, from one to the other.

model_cfg(config)     config.json -> open_clip's, and a remark where they differ
config_json(cfg)      the other way; what transformers has no word for is refused
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, Literal

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from fomo.errors import FieldError
from fomo.schema import Count, Positive, build, convert

MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}  # by model_type
TANH = {"approximate": "tanh"}  # of GELU
EPS = 1e-5  # of torch's layer norm


@dataclass(frozen=True)
class Tower:
    """The fields that decide what a tower computes, by the names of transformers."""

    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    hidden_act: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh", "gelu_new"]
    layer_norm_eps: Positive


@dataclass(frozen=True)
class Vision(Tower):
    image_size: Count
    patch_size: Count


@dataclass(frozen=True)
class Text(Tower):
    vocab_size: Count
    max_position_embeddings: Count
    eos_token_id: int | None = None


# What transformers takes where a config.json says nothing.
DEFAULTS: dict[str, tuple[Text, Vision]] = {
    "clip": (
        Text(512, 2048, 12, 8, "quick_gelu", 1e-5, 49408, 77, 49407),
        Vision(768, 3072, 12, 12, "quick_gelu", 1e-5, 224, 32),
    ),
    "siglip": (
        Text(768, 3072, 12, 12, "gelu_pytorch_tanh", 1e-6, 32000, 64),
        Vision(768, 3072, 12, 12, "gelu_pytorch_tanh", 1e-6, 224, 16),
    ),
}
ONLY = {"num_channels": 3, "vision_use_head": True}  # what else a tower may say, and its one accepted value


# --- config.json -> model_cfg ----------------------------------------------------------------------------


def model_cfg(config: dict, kind: str) -> tuple[dict, list[str]]:
    """Of a config.json whose model_type is `kind`. Raises a FieldError for what open_clip has not."""
    text, vision = (tower(config, kind, number) for number in range(2))
    return clip_cfg(config, text, vision) if kind == "clip" else siglip_cfg(text, vision)


def tower(config: dict, kind: str, number: int) -> Text | Vision:
    """The first is the text's."""
    default, where = DEFAULTS[kind][number], ("text_config", "vision_config")[number]
    said = convert(config.get(f"{where}_dict") or config.get(where) or {}, dict, where)
    for name, only in ONLY.items():
        if said.get(name, only) != only:
            raise FieldError(f"{where}.{name}", f"got {said[name]!r}, accepted: {only}")
    known = {f.name: said[f.name] for f in fields(default) if said.get(f.name) is not None}
    known |= {
        name: side(known[name], f"{where}.{name}") for name in known.keys() & {"image_size", "patch_size"}
    }
    found = build(type(default), {**asdict(default), **known}, where)
    if found.hidden_size % found.num_attention_heads:
        problem = f"got {found.num_attention_heads}, accepted: a divisor of hidden_size {found.hidden_size}"
        raise FieldError(f"{where}.num_attention_heads", problem)
    return found


def side(size: Any, where: str) -> Any:
    """Of a square, which may be said by two numbers."""
    if not isinstance(size, list | tuple) or not size:
        return size
    if len({*map(str, size)}) > 1:
        raise FieldError(where, f"got {size}, accepted: one number, for squares")
    return size[0]


def shape_cfg(said: Tower) -> dict:
    """What both towers have; open_clip's defaults are left out."""
    cfg: dict = {"width": said.hidden_size, "layers": said.num_hidden_layers}
    if said.intermediate_size != 4 * said.hidden_size:  # open_clip makes it as int(width * mlp_ratio)
        cfg["mlp_ratio"] = math.ceil(said.intermediate_size / said.hidden_size * 1e4) / 1e4
    if said.layer_norm_eps != EPS:
        cfg["norm_kwargs"] = {"eps": said.layer_norm_eps}
    if said.hidden_act in ("gelu_pytorch_tanh", "gelu_new"):
        cfg["act_kwargs"] = TANH
    return cfg


def text_cfg(text: Text) -> dict:
    length = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    return {**length, **shape_cfg(text), "heads": text.num_attention_heads}


def clip_cfg(config: dict, text: Text, vision: Vision) -> tuple[dict, list[str]]:
    quick = {tower.hidden_act == "quick_gelu" for tower in (text, vision)}
    if len(quick) > 1:
        found = f"got {vision.hidden_act} beside {text.hidden_act} in text_config"
        raise FieldError("vision_config.hidden_act", f"{found}, accepted: quick_gelu in both or in neither")
    words = text_cfg(text)
    # 2 is an old mistake, by which transformers takes the highest id of a text, as open_clip does anyway.
    if text.eos_token_id not in (None, 2, text.vocab_size - 1):
        words |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    pictures = {"image_size": vision.image_size, "patch_size": vision.patch_size, **shape_cfg(vision)}
    heads = vision.hidden_size // vision.num_attention_heads
    if heads != CLIPVisionCfg.head_width:
        pictures["head_width"] = heads
    width = convert(config.get("projection_dim", 512), Count, "projection_dim")
    cfg = {"embed_dim": width, "vision_cfg": pictures, "text_cfg": words}
    return {**cfg, **({"quick_gelu": True} if quick == {True} else {})}, []


def siglip_cfg(text: Text, vision: Vision) -> tuple[dict, list[str]]:
    """open_clip has SigLIP's vision towers from timm, by name and with the activation that they have there."""
    name = timm_name(vision)
    remarks, computed = [], timm_tower(name).hidden_act
    if computed != vision.hidden_act:
        what = f"its vision tower is timm's {name}, with {computed} in place of {vision.hidden_act}"
        remarks.append(f"{what}: features differ a little from those in transformers")
    timm_cfg = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    cfg = {
        "embed_dim": vision.hidden_size,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": vision.image_size, **timm_cfg},
        "text_cfg": {**text_cfg(text), "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }
    return cfg, remarks


def timm_name(vision: Vision) -> str:
    import timm

    names = timm.list_models("vit_*_siglip_*", exclude_filters="*_gap_*")
    sized = [name for name in names if name.endswith(f"_patch{vision.patch_size}_siglip_{vision.image_size}")]
    for name in sized:
        if replace(timm_tower(name), hidden_act=vision.hidden_act) == vision:
            return name
    found = f"got {vision.num_hidden_layers} layers of width {vision.hidden_size} on pictures of "
    found += f"{vision.image_size} in patches of {vision.patch_size}"
    raise FieldError("vision_config", f"{found}, accepted: the shapes of timm's {', '.join(sized or names)}")


@cache
def timm_tower(name: str) -> Vision:
    """What timm's model of this name is, if it is of SigLIP's kind."""
    import timm

    try:
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0, global_pool="map")
        block, patches, act = trunk.blocks[0], trunk.patch_embed, trunk.blocks[0].mlp.act
        if trunk.cls_token is not None:
            raise TypeError
        tanh = "tanh" in f"{type(act).__name__} {getattr(act, 'approximate', '')}".lower()
        return Vision(
            hidden_size=trunk.embed_dim,
            intermediate_size=block.mlp.fc1.out_features,
            num_hidden_layers=len(trunk.blocks),
            num_attention_heads=block.attn.num_heads,
            hidden_act="gelu_pytorch_tanh" if tanh else "gelu",
            layer_norm_eps=trunk.norm.eps,
            image_size=patches.img_size[0],
            patch_size=patches.patch_size[0],
        )
    except (RuntimeError, AttributeError, TypeError, ValueError, AssertionError, LookupError):
        accepted = "open_clip's own ViT, as CLIPModel, or timm's vit_*_siglip_*, as SiglipModel"
        raise FieldError("vision_cfg.timm_model_name", f"got {name}, accepted: {accepted}") from None


# --- model_cfg -> config.json ----------------------------------------------------------------------------

# open_clip's fields that transformers has by another name, and those that change no feature.
EXPRESSED = {
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size act_kwargs norm_kwargs timm_model_name",
    "text_cfg": "layers width heads mlp_ratio context_length vocab_size act_kwargs norm_kwargs eos_id "
    "hf_tokenizer_name tokenizer_kwargs",
}
NO_FEATURE = {
    "vision_cfg": "patch_dropout pos_embed_type attn_pooler_queries attn_pooler_heads timm_model_pretrained "
    "timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path",
    "text_cfg": "pad_id hf_model_pretrained hf_proj_type hf_pooler_type",
}


def config_json(cfg: dict, eos: int | None) -> dict:
    """The content of config.json. eos: the id with which the tokenizer ends a text.

    Raises a FieldError that names the first field which CLIPModel and SiglipModel cannot express.
    """
    if "multimodal_cfg" in cfg:
        raise FieldError("multimodal_cfg", "a captioner (CoCa), which transformers has not")
    kind = "siglip" if cfg["vision_cfg"].get("timm_model_name") else "clip"
    text, vision = siglip_towers(cfg) if kind == "siglip" else clip_towers(cfg, eos)
    width = {"projection_dim": cfg["embed_dim"]} if kind == "clip" else {}
    words = {name: value for name, value in asdict(text).items() if value is not None}
    return {
        "architectures": [MODELS[kind]],
        "model_type": kind,
        **width,
        "text_config": {**words, **(width or {"projection_size": cfg["embed_dim"]})},
        "vision_config": {**asdict(vision), **width},
    }


def clip_towers(cfg: dict, eos: int | None) -> tuple[Text, Vision]:
    said, words, quick = cfg["vision_cfg"], cfg["text_cfg"], bool(cfg.get("quick_gelu"))
    if isinstance(said["layers"], list):
        raise FieldError("vision_cfg.layers", f"got {said['layers']}, a ResNet, accepted: a ViT")
    if cfg.get("init_logit_bias") is not None:
        raise FieldError("init_logit_bias", "a bias of the logits, which CLIPModel has not")
    by_id = words.get("pool_type") == "eos"
    refuse_others(said, "vision_cfg", "clip")
    refuse_others(words, "text_cfg", "clip", pool_type="eos" if by_id else "argmax")
    full = asdict(CLIPVisionCfg(**said))
    vision = Vision(
        **shape_of(full, quick, "vision_cfg", full["width"] // full["head_width"]),
        image_size=side(full["image_size"], "vision_cfg.image_size"),
        patch_size=side(full["patch_size"], "vision_cfg.patch_size"),
    )
    text = text_of(words, quick)
    if by_id:
        eos = words.get("eos_id", CLIPTextCfg.eos_id)
        if eos == 2:
            raise FieldError("text_cfg.eos_id", "got 2, by which CLIPModel means the highest id of a text")
    return replace(text, eos_token_id=eos if by_id or eos == text.vocab_size - 1 else 2), vision


def siglip_towers(cfg: dict) -> tuple[Text, Vision]:
    said, words = cfg["vision_cfg"], cfg["text_cfg"]
    vision, size = (
        timm_tower(said["timm_model_name"]),
        side(said.get("image_size", 224), "vision_cfg.image_size"),
    )
    refuse_others(said, "vision_cfg", "siglip", timm_pool="map", timm_proj="none")
    refuse_others(words, "text_cfg", "siglip", no_causal_mask=True, proj_bias=True, pool_type="last")
    for name, found, has in (
        ("vision_cfg.image_size", size, vision.image_size),
        ("embed_dim", cfg["embed_dim"], vision.hidden_size),
    ):
        if found != has:
            raise FieldError(name, f"got {found}, its tower has {has}")
    return text_of(words, bool(cfg.get("quick_gelu"))), vision


def refuse_others(cfg: dict, where: str, kind: str, **needed: Any) -> None:
    """A FieldError for the first field that is neither expressed, nor as needed, nor as by default."""
    defaults = {f.name: f.default for f in fields(CLIPVisionCfg if where == "vision_cfg" else CLIPTextCfg)}
    free = f"{EXPRESSED[where]} {NO_FEATURE[where]}".split()
    wanted = {name: default for name, default in defaults.items() if name not in free} | needed
    for name in {**wanted, **cfg}:
        value = cfg.get(name, defaults.get(name))
        if name in wanted and value != wanted[name]:
            raise FieldError(f"{where}.{name}", f"got {value!r}, {MODELS[kind]} has {wanted[name]!r}")
        if name not in defaults:
            raise FieldError(f"{where}.{name}", f"got {value!r}, which {MODELS[kind]} does not know")


def text_of(said: dict, quick: bool) -> Text:
    full = asdict(CLIPTextCfg(**said))
    shape = shape_of(full, quick, "text_cfg", full["heads"])
    return Text(**shape, vocab_size=full["vocab_size"], max_position_embeddings=full["context_length"])


def shape_of(full: dict, quick: bool, where: str, heads: int) -> dict:
    """The fields of a Tower."""
    act, norm = full["act_kwargs"] or {}, full["norm_kwargs"] or {}
    if act not in ({}, TANH):
        raise FieldError(f"{where}.act_kwargs", f"got {act}, accepted: {TANH}")
    if norm.keys() - {"eps"}:
        raise FieldError(f"{where}.norm_kwargs", f"got {norm}, accepted: eps")
    return {
        "hidden_size": full["width"],
        "intermediate_size": int(full["width"] * full["mlp_ratio"]),
        "num_hidden_layers": full["layers"],
        "num_attention_heads": heads,
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if act else "gelu",
        "layer_norm_eps": norm.get("eps", EPS),
    }
