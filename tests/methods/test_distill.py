"""Distillation against its formula written with loops."""

import math

import pytest
import torch
from small_runs import assert_same, run_method
from torch import nn

from fomo.clip import encode
from fomo.errors import FieldError
from fomo.methods import build_method
from fomo.methods.base import Inputs


class Towers(nn.Module):
    """Two linear towers and a logit scale."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode_image, self.encode_text = nn.Linear(3, 4), nn.Linear(3, 4)
        self.logit_scale = nn.Parameter(torch.tensor(3.0))


def batch_of(pools, seed=0):
    images, tokens = torch.randn(2, len(pools), 3, generator=torch.Generator().manual_seed(seed))
    return Inputs(images, tokens, torch.tensor(pools))


def moved(model):
    """The model after some training."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


def penalty_of(method, model, batch):
    return method.penalty(model, batch, encode(model, batch.images, batch.tokens))


def by_hand(model, teacher, batch, temperature):
    """T²/2 (KL over rows + KL over columns), on the pairs of pool 0, in Python floats."""
    own = [i for i, pool in enumerate(batch.pools.tolist()) if pool == 0]
    tables = []
    for net in (teacher, model):
        images, texts, scale, _ = encode(net, batch.images[own], batch.tokens[own])
        logits = (scale * images @ texts.T / temperature).tolist()
        tables.append((logits, [list(column) for column in zip(*logits, strict=True)]))
    total = 0.0
    for kept, now in zip(*tables, strict=True):  # rows, then columns
        for old, new in zip(kept, now, strict=True):
            sums = [math.log(sum(math.exp(value) for value in row)) for row in (old, new)]
            for a, b in zip(old, new, strict=True):
                p, q = a - sums[0], b - sums[1]
                total += math.exp(p) * (p - q) / len(own)
    return temperature**2 * total / 2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_penalty_is_the_formula_on_the_pretraining_pairs(temperature):
    model, batch = Towers(), batch_of([0, 0, 0, 1, 1, 2])
    method = build_method({"name": "distill", "weight": 0.7, "temperature": temperature})
    method.prepare(model)
    expected = 0.7 * by_hand(moved(model), Towers(), batch, temperature)
    assert expected > 0.01
    assert penalty_of(method, model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_at_the_start_there_is_nothing_to_learn_from_the_teacher():
    model = Towers()
    method = build_method({"name": "distill"})
    method.prepare(model)
    penalty = penalty_of(method, model, batch_of([0, 0, 0, 1]))
    penalty.backward()
    assert penalty.item() == pytest.approx(0, abs=1e-6)
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters())


def test_other_pairs_do_not_count():
    model = Towers()
    method = build_method({"name": "distill"})
    method.prepare(model)
    moved(model)
    one, other = batch_of([0, 1, 0, 2], seed=1), batch_of([0, 1, 0, 2], seed=2)
    other.images[[0, 2]], other.tokens[[0, 2]] = one.images[[0, 2]], one.tokens[[0, 2]]
    torch.testing.assert_close(penalty_of(method, model, one), penalty_of(method, model, other))
    assert penalty_of(method, model, batch_of([1, 2, 1])) == 0.0


def test_the_teacher_is_no_part_of_the_model():
    model = Towers()
    names = list(model.state_dict())
    method = build_method({"name": "distill"})
    parameters = method.prepare(model)
    assert list(model.state_dict()) == names and len(parameters) == len(names)
    penalty_of(method, moved(model), batch_of([0, 0, 1])).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(torch.equal(t, Towers().state_dict()[n]) for n, t in method.teacher.state_dict().items())


def test_the_teacher_of_a_checkpoint_replaces_the_one_prepared():
    first, second = (build_method({"name": "distill"}) for _ in range(2))
    first.prepare(Towers())
    second.prepare(moved(Towers()))
    second.load_state(first.state())
    assert all(torch.equal(t, Towers().state_dict()[n]) for n, t in second.teacher.state_dict().items())


def test_similarities_are_float32_under_autocast():
    model = Towers()
    method = build_method({"name": "distill"})
    method.prepare(model)
    moved(model)
    batch = batch_of([0, 0, 0, 0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        features = encode(model, batch.images, batch.tokens)
        under = method.penalty(model, batch, features)
        method.teacher.load_state_dict(model.state_dict())
        same = method.penalty(model, batch, features)
    assert under.dtype == torch.float32
    assert same.item() == pytest.approx(0, abs=1e-6)  # rounding of similarities would differ by direction


def test_mistakes_are_refused():
    for field, value in (("weight", -1), ("temperature", 0)):
        with pytest.raises(FieldError, match=rf"method\.{field}"):
            build_method({"name": "distill", field: value})


def test_without_weight_it_is_finetuning(small_scale, tmp_path):
    finetuned = run_method(small_scale, tmp_path / "finetune", "{name: finetune}")
    assert_same(finetuned, run_method(small_scale, tmp_path / "distill", "{name: distill, weight: 0}"))


def test_a_run_cut_within_an_update_ends_bit_identically(small_scale, tmp_path):
    whole = run_method(small_scale, tmp_path / "whole", "{name: distill, weight: 5}")
    assert_same(whole, run_method(small_scale, tmp_path / "cut", "{name: distill, weight: 5}", cut=6))
