"""EWC against loops over scalars, on a CLIP of three parameters."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from small_models import pairs, small_model
from torch import nn

from fomo.methods import build_method
from fomo.methods.base import Inputs


class ThreeParameters(nn.Module):
    """Images (B, 2) and tokens (B, 2) on the plane, one scalar in each tower, and the logit scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))
        self.logit_scale = nn.Parameter(torch.tensor(1.3))

    def encode_image(self, images):
        return images * torch.stack([self.a, torch.ones(())])

    def encode_text(self, tokens):
        return tokens * torch.stack([torch.ones(()), self.b])


def loss_of(a, b, s, batch):
    """The contrastive loss, written again with plain tensors."""
    images = F.normalize(batch.images * torch.stack([a, torch.ones(())]), dim=1)
    texts = F.normalize(batch.tokens * torch.stack([torch.ones(()), b]), dim=1)
    logits = s.exp() * images @ texts.T
    return -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2


def batches(count, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 2, size, 2, generator=generator)
    return [Inputs(images, tokens, torch.zeros(size)) for images, tokens in made]


def ewc_after(updates, **fields):
    """A model and its EWC after some updates without training, each on batches of its own."""
    model, method = ThreeParameters(), build_method({"name": "ewc", **fields})
    method.prepare(model)
    for update in range(updates):
        method.before_update(model)
        method.after_update(model, batches(3, seed=update))
    method.before_update(model)
    return model, method


def squares(some_batches):
    """Mean over batches of the squared gradient, one scalar at a time."""
    mean = {"a": 0.0, "b": 0.0, "logit_scale": 0.0}
    for batch in some_batches:
        values = [torch.tensor(v, requires_grad=True) for v in (0.7, -0.4, 1.3)]
        loss_of(*values, batch).backward()
        for name, value in zip(mean, values, strict=True):
            mean[name] += value.grad.item() ** 2 / len(some_batches)
    return mean


def test_fisher_is_the_mean_square_of_batch_gradients():
    _, method = ewc_after(1)
    for name, expected in squares(batches(3)).items():
        assert method.importance[name].item() == pytest.approx(expected, rel=1e-4)


def test_fisher_is_taken_in_the_precision_it_is_told():
    """Under a merge, too. bf16 rounds a and the features to 8 bits: near the float32 Fisher, but not it."""
    for spec in ({"name": "ewc"}, {"name": "merge", "tune": {"name": "ewc"}}):
        fishers = []
        for dtype, autocast in (
            (torch.float32, nullcontext),
            (torch.bfloat16, lambda: torch.autocast("cpu", torch.bfloat16)),
        ):
            model, method = small_model("vit"), build_method(spec)
            method.prepare(model)
            method.before_update(model)
            seen = []
            model.visual.conv1.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y.dtype))
            method.after_update(model, [Inputs(*pairs(model), torch.zeros(4))], autocast)
            assert seen == [dtype]
            fishers.append(getattr(method, "tune", method).importance["visual.proj"])
        assert not torch.equal(*fishers)
        torch.testing.assert_close(*fishers, rtol=0.3, atol=fishers[0].max().item() * 0.05)


def test_fisher_decays_from_update_to_update():
    _, method = ewc_after(2, decay=0.25)
    old, new = squares(batches(3, seed=0)), squares(batches(3, seed=1))
    for name in old:
        assert method.importance[name].item() == pytest.approx(0.25 * old[name] + new[name], rel=1e-4)


@pytest.mark.parametrize(("samples", "used"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (1000, 3)])
def test_fisher_stops_after_the_samples(samples, used):
    _, method = ewc_after(1, samples=samples)
    expected = squares(batches(3)[:used])
    assert method.importance["a"].item() == pytest.approx(expected["a"], rel=1e-4)


def test_penalty_and_gradient_are_those_of_a_loop():
    model, method = ewc_after(2, strength=7.0)
    assert method.penalty(model, None, None).item() == 0  # at the anchor
    with torch.no_grad():
        for p, move in zip(model.parameters(), (0.3, -0.2, 0.5), strict=True):
            p += move
    expected, gradients = 0.0, {}
    for name, p in model.named_parameters():
        distance = p.item() - method.anchor[name].item()
        expected += 7.0 / 2 * method.importance[name].item() * distance**2
        gradients[name] = 7.0 * method.importance[name].item() * distance
    penalty = method.penalty(model, None, None)
    penalty.backward()
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad.item() == pytest.approx(gradients[name], rel=1e-5)


def test_nothing_holds_the_first_update():
    model, method = ewc_after(0)
    assert method.penalty(model, None, None) == 0.0


def test_estimating_moves_nothing():
    model, method = ThreeParameters(), build_method({"name": "ewc"})
    model.norm = nn.BatchNorm1d(2)
    model.encode_image = lambda images: model.norm(images * model.a)
    method.prepare(model)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method.after_update(model, batches(3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert method.importance["norm.weight"].shape == (2,)


def test_only_trained_parameters_have_a_fisher():
    model, method = ThreeParameters(), build_method({"name": "ewc"})
    model.logit_scale.requires_grad_(False)
    method.prepare(model)
    method.before_update(model)
    method.after_update(model, batches(2))
    assert method.importance.keys() == method.anchor.keys() == {"a", "b"}


def test_under_a_merge_the_anchor_is_what_the_update_starts_from():
    model = ThreeParameters()
    method = build_method({"name": "merge", "keep": 0.75, "tune": {"name": "ewc"}})
    method.prepare(model)
    method.before_update(model)
    with torch.no_grad():
        model.a += 1.0
    method.after_update(model, batches(2))
    method.before_update(model)
    assert method.tune.anchor["a"].item() == pytest.approx(0.75 * 0.7 + 0.25 * 1.7)
    assert method.tune.anchor["a"].item() == model.a.item()
