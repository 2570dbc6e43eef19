"""EWC against loops over scalars, on a CLIP of three parameters."""

import pytest
import torch
import torch.nn.functional as F
from small_runs import assert_same, run_method
from torch import nn

from fomo.errors import FieldError
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
        assert method.fisher[name].item() == pytest.approx(expected, rel=1e-4)


def test_fisher_decays_from_update_to_update():
    _, method = ewc_after(2, decay=0.25)
    old, new = squares(batches(3, seed=0)), squares(batches(3, seed=1))
    for name in old:
        assert method.fisher[name].item() == pytest.approx(0.25 * old[name] + new[name], rel=1e-4)


@pytest.mark.parametrize(("samples", "used"), [(1, 1), (5, 1), (6, 2), (10, 2), (11, 3), (1000, 3)])
def test_fisher_stops_after_the_samples(samples, used):
    _, method = ewc_after(1, samples=samples)
    expected = squares(batches(3)[:used])
    assert method.fisher["a"].item() == pytest.approx(expected["a"], rel=1e-4)


def test_penalty_and_gradient_are_those_of_a_loop():
    model, method = ewc_after(2, strength=7.0)
    assert method.penalty(model, None, None).item() == 0  # at the anchor
    with torch.no_grad():
        for p, move in zip(model.parameters(), (0.3, -0.2, 0.5), strict=True):
            p += move
    expected, slopes = 0.0, {}
    for name, p in model.named_parameters():
        distance = p.item() - method.anchor[name].item()
        expected += 7.0 / 2 * method.fisher[name].item() * distance**2
        slopes[name] = 7.0 * method.fisher[name].item() * distance
    penalty = method.penalty(model, None, None)
    penalty.backward()
    assert penalty.item() == pytest.approx(expected, rel=1e-5)
    for name, p in model.named_parameters():
        assert p.grad.item() == pytest.approx(slopes[name], rel=1e-5)


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
    assert method.fisher["norm.weight"].shape == (2,)


def test_only_trained_parameters_have_a_fisher():
    model, method = ThreeParameters(), build_method({"name": "ewc"})
    model.logit_scale.requires_grad_(False)
    method.prepare(model)
    method.before_update(model)
    method.after_update(model, batches(2))
    assert method.fisher.keys() == method.anchor.keys() == {"a", "b"}


def test_under_a_merge_the_anchor_is_what_the_update_starts_from():
    model = ThreeParameters()
    method = build_method({"name": "merge", "keep": 0.75, "tune": {"name": "ewc"}})
    method.prepare(model)
    method.before_update(model)
    with torch.no_grad():
        model.a += 1.0
    method.after_update(model, batches(2))
    method.before_update(model)
    assert method.inner.anchor["a"].item() == pytest.approx(0.75 * 0.7 + 0.25 * 1.7)
    assert method.inner.anchor["a"].item() == model.a.item()


def test_mistakes_are_refused():
    for field, value in (("strength", -1), ("decay", 1.5), ("samples", 0)):
        with pytest.raises(FieldError, match=rf"method\.{field}"):
            build_method({"name": "ewc", field: value})


def test_without_strength_it_is_finetuning(small_scale, tmp_path):
    finetuned = run_method(small_scale, tmp_path / "finetune", "{name: finetune}")
    assert_same(finetuned, run_method(small_scale, tmp_path / "ewc", "{name: ewc, strength: 0}"))


def test_strength_holds_the_weights_back():
    moved = []
    for strength in (0.0, 1.0):
        model, method = ewc_after(1, strength=strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        (batch,) = batches(1, seed=5)
        for _ in range(100):
            optimizer.zero_grad()
            loss = loss_of(model.a, model.b, model.logit_scale, batch)
            (loss + method.penalty(model, None, None)).backward()
            optimizer.step()
        moved.append(sum((p - method.anchor[n]).abs().item() for n, p in model.named_parameters()))
    assert moved[1] < 0.5 * moved[0]


def test_a_run_cut_within_an_update_ends_bit_identically(small_scale, tmp_path):
    method = "{name: ewc, strength: 100, decay: 0.9, samples: 24}"
    whole = run_method(small_scale, tmp_path / "whole", method)
    assert_same(whole, run_method(small_scale, tmp_path / "cut", method, cut=6))
