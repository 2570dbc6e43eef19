"""A small open_clip model of every family that methods work on, and steps of training as the loop takes them."""

import open_clip
import torch
from torch import nn

from fomo.clip import contrastive_loss, encode
from fomo.methods.base import Method
from fomo.recipe import Optimizer

TEXT = {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
VISION = {
    "vit": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "resnet": {"image_size": 32, "width": 4, "layers": [1, 1, 1, 1]},
    "convnext": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": ""},
    "siglip": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token"},
}


def small_model(family: str, seed: int = 0) -> nn.Module:
    """vit, resnet: CLIP. custom: a ViT in CustomTextCLIP. convnext, siglip: timm towers in CustomTextCLIP."""
    torch.manual_seed(seed)
    vision = VISION["vit" if family == "custom" else family]
    if family in ("vit", "resnet"):
        model = open_clip.CLIP(8, vision, TEXT)
        for name, parameter in model.named_parameters():
            if name.endswith("bn3.weight"):  # zeros: nothing before them would have a gradient
                nn.init.ones_(parameter)
        return model
    bias = -10.0 if family == "siglip" else None
    return open_clip.CustomTextCLIP(8, vision, TEXT, init_logit_bias=bias)


def vit_b16() -> nn.Module:
    """Without weights."""
    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-B-16"))


def pairs(model: nn.Module, seed: int = 0, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    size = model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    return torch.randn(n, 3, side, side, generator=draw), torch.randint(1, 50, (n, 12), generator=draw)


def take_step(model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, number: int) -> float:
    """What train.py does with a batch; -> the loss before the step."""
    model.train()
    loss = contrastive_loss(encode(model, *pairs(model, seed=number)))
    loss.backward()
    optimizer.step()
    method.after_step(model, lr=0.0)
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def take_steps(model: nn.Module, method: Method, parameters: list[nn.Parameter], n: int = 3) -> None:
    optimizer = method.optimizer(parameters, Optimizer(lr=0.02))
    for number in range(n):
        take_step(model, method, optimizer, number)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors, buffers too, that are no longer what they were, bit by bit."""
    after = model.state_dict()
    assert list(after) == list(before)
    return {name for name in before if not torch.equal(before[name], after[name])}
