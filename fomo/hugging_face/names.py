"""The names of a model's tensors in open_clip and in Hugging Face transformers, side by side.

    Renamed(tensors, CLIP, to="transformers")      the same tensors by the other names, read one at a time

N is the number of a layer, * is weight and bias. Where one side has several names, their tensors one below the
other are the tensor of the other side, in the proportions of `parts`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fomo.errors import UserError, one_line


class Change(NamedTuple):
    """What else differs between two tensors than their names."""

    to_transformers: Callable[[Tensor], Tensor]
    to_open_clip: Callable[[Tensor], Tensor]


SAME = Change(lambda t: t, lambda t: t)
TRANSPOSED = Change(Tensor.t, Tensor.t)  # x @ W here, a Linear there
WITHOUT_BATCH = Change(lambda t: t.reshape(t.shape[1:]), lambda t: t[None])
SCALAR = Change(lambda t: t.reshape(()), SAME.to_open_clip)
ONE_NUMBER = Change(lambda t: t.reshape(1), lambda t: t.reshape(()))


class Row(NamedTuple):
    open_clip: str
    transformers: str
    change: Change = SAME
    parts: tuple[int, ...] = ()


def under(open_clip: str, transformers: str, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of a part of a model, with the names of where it is put before theirs."""
    for row in rows:
        ours, theirs = (
            " ".join(prefix + name for name in names.split())
            for prefix, names in ((open_clip, row.open_clip), (transformers, row.transformers))
        )
        yield row._replace(open_clip=ours, transformers=theirs)


BLOCK = (
    Row("ln_1.*", "layer_norm1.*"),
    Row("attn.in_proj_*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*", parts=(1, 1, 1)),
    Row("attn.out_proj.*", "self_attn.out_proj.*"),
    Row("ln_2.*", "layer_norm2.*"),
    Row("mlp.c_fc.*", "mlp.fc1.*"),
    Row("mlp.c_proj.*", "mlp.fc2.*"),
)
TEXT = (
    Row("token_embedding.weight", "embeddings.token_embedding.weight"),
    Row("positional_embedding", "embeddings.position_embedding.weight"),
    *under("transformer.resblocks.N.", "encoder.layers.N.", BLOCK),
    Row("ln_final.*", "final_layer_norm.*"),
)
VISION = (
    Row("conv1.weight", "embeddings.patch_embedding.weight"),
    Row("class_embedding", "embeddings.class_embedding"),
    Row("positional_embedding", "embeddings.position_embedding.weight"),
    Row("ln_pre.*", "pre_layrnorm.*"),
    *under("transformer.resblocks.N.", "encoder.layers.N.", BLOCK),
    Row("ln_post.*", "post_layernorm.*"),
)
TIMM_BLOCK = (
    Row("norm1.*", "layer_norm1.*"),
    Row("attn.qkv.*", "self_attn.q_proj.* self_attn.k_proj.* self_attn.v_proj.*", parts=(1, 1, 1)),
    Row("attn.proj.*", "self_attn.out_proj.*"),
    Row("norm2.*", "layer_norm2.*"),
    Row("mlp.fc1.*", "mlp.fc1.*"),
    Row("mlp.fc2.*", "mlp.fc2.*"),
)
TIMM_VISION = (
    Row("patch_embed.proj.*", "embeddings.patch_embedding.*"),
    Row("pos_embed", "embeddings.position_embedding.weight", WITHOUT_BATCH),
    *under("blocks.N.", "encoder.layers.N.", TIMM_BLOCK),
    Row("norm.*", "post_layernorm.*"),
    Row("attn_pool.latent", "head.probe"),
    Row("attn_pool.q.* attn_pool.kv.*", "head.attention.in_proj_*", parts=(1, 2)),
    Row("attn_pool.proj.*", "head.attention.out_proj.*"),
    Row("attn_pool.norm.*", "head.layernorm.*"),
    Row("attn_pool.mlp.fc1.*", "head.mlp.fc1.*"),
    Row("attn_pool.mlp.fc2.*", "head.mlp.fc2.*"),
)
CLIP = (
    *under("visual.", "vision_model.", VISION),
    Row("visual.proj", "visual_projection.weight", TRANSPOSED),
    *under("", "text_model.", TEXT),
    Row("text_projection", "text_projection.weight", TRANSPOSED),
    Row("logit_scale", "logit_scale", SCALAR),
)
SIGLIP = (
    *under("visual.trunk.", "vision_model.", TIMM_VISION),
    *under("text.", "text_model.", TEXT),
    Row("text.text_projection.*", "text_model.head.*"),
    Row("logit_scale", "logit_scale", ONE_NUMBER),
    Row("logit_bias", "logit_bias", ONE_NUMBER),
)
TABLES = {"clip": CLIP, "siglip": SIGLIP}  # by transformers' model_type


class Part(NamedTuple):
    """How a tensor is made: the sources one below the other, changed, of which it is the rows from `share` on."""

    sources: tuple[str, ...]
    change: Callable[[Tensor], Tensor] = SAME.to_open_clip
    share: tuple[int, int, int] | None = None  # from, to, of how many; None: all


class Renamed(Mapping):
    """Tensors by the names of the other side. What the table does not know keeps its name."""

    def __init__(
        self, tensors: Mapping[str, Tensor], table: Iterable[Row], to: Literal["open_clip", "transformers"]
    ):
        self.tensors, self.parts = tensors, {}
        for sources, targets, row in directed(table, to, layers_of(tensors)):
            if all(name in tensors for name in sources):
                change = row.change.to_transformers if to == "transformers" else row.change.to_open_clip
                for target, share in zip(targets, shares(row.parts, len(targets)), strict=True):
                    self.parts[target] = Part(sources, change, share)
        used = {name for part in self.parts.values() for name in part.sources}
        self.unknown = [name for name in tensors if name not in used]
        self.parts |= {name: Part((name,)) for name in self.unknown}

    def __getitem__(self, name: str) -> Tensor:
        part = self.parts[name]
        try:
            found = [self.tensors[source] for source in part.sources]
            tensor = part.change(torch.cat(found) if len(found) > 1 else found[0])
            if part.share is None:
                return tensor
            start, end = (len(tensor) * n // part.share[2] for n in part.share[:2])
            return tensor[start:end].clone()  # files of tensors hold no two that share memory
        except (RuntimeError, IndexError, TypeError) as error:
            shapes = ", ".join(f"{source} {tuple(self.tensors[source].shape)}" for source in part.sources)
            raise UserError(f"tensor {name} cannot be made of {shapes}: {one_line(error)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


def layers_of(tensors: Iterable[str]) -> int:
    """Of the deepest tower."""
    found = (re.search(r"\b(?:resblocks|blocks|layers)\.(\d{1,4})\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def directed(
    table: Iterable[Row], to: str, layers: int
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Row]]:
    """Each pair of names, or of groups of them: (those there are, those that are wanted, its row)."""
    for row in table:
        pair = (
            [row.open_clip, row.transformers] if to == "transformers" else [row.transformers, row.open_clip]
        )
        for n in range(layers if ".N." in row.open_clip else 1):
            for kind in ("weight", "bias") if "*" in row.open_clip else ("",):
                sources, targets = (
                    tuple(names.replace(".N.", f".{n}.").replace("*", kind).split()) for names in pair
                )
                yield sources, targets, row


def shares(parts: tuple[int, ...], count: int) -> list[tuple[int, int, int] | None]:
    """(1, 2), 2 -> (0, 1, 3), (1, 3, 3); a single target is the whole."""
    if count == 1:
        return [None]
    ends = [sum(parts[: i + 1]) for i in range(count)]
    return [(end - part, end, ends[-1]) for part, end in zip(parts, ends, strict=True)]
