"""Methods that train a part of the parameters and leave the rest as it is: locked towers, LNFit, BitFit.

    locked   Zhai et al. 2022, LiT, arXiv 2111.07991            all but one tower, or all but what patterns name
    lnfit    De Min et al. 2023, arXiv 2308.09610               weights and biases of all LayerNorms
    bitfit   Ben Zaken et al. 2022, arXiv 2106.10199            all biases, those of LayerNorms and in_proj too

What is trained is trained as in finetuning. The logit scale (SigLIP's logit bias with it) belongs to the text
tower: `locked` trains it when the image tower is locked, the other two never; `temperature.learn: true` overrides.

The released code picks by name alone (`ln_` for LNFit), which finds the LayerNorms of open_clip's towers only.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fomo.clip import text_tower
from fomo.errors import FieldError, UserError
from fomo.methods.base import Method

TOWERS = {"image": r"^visual\.", "text": r"^(?!visual\.)"}  # patterns of parameter names


def train_only(model: nn.Module, chosen: set[str]) -> list[nn.Parameter]:
    """Freeze all parameters but those named in `chosen`; -> what is trained.

    A batch norm of which nothing is trained keeps its running statistics and normalises with them.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in chosen)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.register_forward_pre_hook(keep_statistics)
    return [p for p in model.parameters() if p.requires_grad]


def keep_statistics(norm: nn.Module, inputs: tuple) -> None:
    """Before each forward pass: the loop calls model.train() before each step."""
    norm.eval()


def in_towers(
    model: nn.Module, chosen: set[str], what: str, towers: Collection[str] = tuple(TOWERS)
) -> set[str]:
    """`chosen`, or a UserError if one of the towers of `model` has none of `what`."""
    for tower in towers:
        if not any(re.search(TOWERS[tower], name) for name in chosen):
            part = getattr(model.visual, "trunk", model.visual) if tower == "image" else text_tower(model)
            raise UserError(f"{what}: the {tower} tower of this model ({type(part).__name__}) has none")
    return chosen


@dataclass
class Locked(Method):
    """Say `tower` or `freeze`; the default locks the text tower."""

    tower: Literal["image", "text"] | None = None  # image, or text (with the logit scale)
    freeze: list[str] | None = None  # regular expressions, searched for in open_clip's parameter names

    def __post_init__(self):
        if self.tower is not None and self.freeze is not None:
            raise FieldError("method.freeze", "say either tower or freeze, not both")
        for i, pattern in enumerate(self.freeze or []):
            try:
                re.compile(pattern)
            except re.error as error:
                raise FieldError(
                    f"method.freeze[{i}]", f"{pattern!r} is no regular expression: {error}"
                ) from None

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        names = {name for name, _ in model.named_parameters()}
        chosen = set(names)
        patterns = [TOWERS[self.tower or "text"]] if self.freeze is None else self.freeze
        for i, pattern in enumerate(patterns):
            found = {name for name in names if re.search(pattern, name)}
            if not found:
                some = ", ".join(sorted(names)[:3])
                raise FieldError(
                    f"method.freeze[{i}]", f"{pattern!r} matches no parameter of this model ({some}, ...)"
                )
            chosen -= found
        trained = train_only(model, chosen)
        if not trained:
            raise FieldError("method.freeze", f"{patterns} leave nothing to train in this model")
        return trained


@dataclass
class LnFit(Method):
    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        norms = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        chosen = {f"{path}.{name}" for path, norm in norms for name, _ in norm.named_parameters()}
        return train_only(model, in_towers(model, chosen, "lnfit trains LayerNorms"))


@dataclass
class BitFit(Method):
    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        chosen = {name for name, _ in model.named_parameters() if "bias" in name and name != "logit_bias"}
        return train_only(model, in_towers(model, chosen, "bitfit trains biases"))
