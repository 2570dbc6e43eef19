"""Learning rates that differ within a model: of the text tower, and by depth.

Layer decay is that of BEiT (arXiv 2106.08254, as released): of the L blocks of a tower block l = 1..L has the
share d^(L + 1 - l) of the peak, what stands before the blocks d^(L + 1), and what follows them all of it.
"""

import re
from collections.abc import Iterable

from torch import nn

from fomo.errors import UserError
from fomo.methods.subsets import TOWERS
from fomo.recipe import Optimizer
from fomo.weights import BLOCK

# What follows the blocks: final norms, projections, heads and pools, the scale and bias of the logits.
AFTER = re.compile(
    r"(^|\.)(ln_post|ln_final|norm|fc_norm|proj|text_projection|head|attn_?pool|logit_\w+)(\.|$)"
)


def param_groups(
    named: Iterable[tuple[str, nn.Parameter]], parameters: list[nn.Parameter], settings: Optimizer
) -> list:
    """For a torch optimizer: `parameters` as they are, or in groups with an `lr_share` of the scheduled rate.

    named: what the parameters are called, as open_clip does.
    """
    if settings.lr_text is None and settings.layer_decay == 1:
        return parameters
    names = {parameter: name for name, parameter in named}
    depths = depths_of(names.values()) if settings.layer_decay < 1 else {}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        name = names[parameter]
        share = settings.layer_decay ** depths.get(name, 0)
        if settings.lr_text is not None and is_of_text(name):
            share *= settings.lr_text / settings.lr
        groups.setdefault(share, []).append(parameter)
    return [{"params": of_share, "lr_share": share} for share, of_share in groups.items()]


def is_of_text(name: str) -> bool:
    return bool(re.search(TOWERS["text"], name)) and not name.startswith("logit_")


def depths_of(names: Iterable[str]) -> dict[str, int]:
    """How many layers are above each parameter in its tower."""
    names = list(names)
    found = {name: (is_of_text(name), int(block[2]) + 1) for name in names if (block := BLOCK.match(name))}
    last = {text: max((n for t, n in found.values() if t == text), default=0) for text in (False, True)}
    if not all(last.values()):
        tower = "image" if not last[False] else "text"
        raise UserError(f"optimizer.layer_decay: the {tower} tower of this model has no blocks, accepted: 1")
    depths = {}
    for name in names:
        top = last[is_of_text(name)] + 1
        outside = top if AFTER.search(name) and "patch_embed" not in name else 0
        depths[name] = top - (found[name][1] if name in found else outside)
    return depths
