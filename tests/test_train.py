"""The training step against a plain one, and mixed precision."""

import pytest
import torch

from fomo.datasets import datafile
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Collection, Samples
from fomo.methods import Method
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer, load
from fomo.train import Precision, on_device, train

CPU = torch.device("cpu")
SETTINGS = Optimizer(lr=1e-2, batch_size=8)


def steps(small_scale, precision):
    """Four steps on the pretraining pool -> (losses, the model)."""
    recipe = load(None, scale=str(small_scale))
    clip = starting_model(recipe.model, CPU)
    data = datafile.read(recipe.data)
    pool = Collection([Samples(s, clip, clip.image_size, "pool") for s in data.pool()])
    batches = Batches([("pretraining", pool_of(pool, (0,)), 8)], 0, 0, 4)
    optimizer = Method().optimizer(list(clip.model.parameters()), SETTINGS)
    done = train(clip, Method(), optimizer, batches.loader(), lambda step: 1e-2, device=CPU,
                 precision=Precision(precision, CPU), clip_norm=1.0, max_scale=100.0)  # fmt: skip
    return [step.loss.item() for step in done], clip, batches


def test_a_step_is_open_clips_loss_clipping_and_adamw(small_scale):
    import open_clip

    losses, ours, batches = steps(small_scale, "float32")
    clip = starting_model(load(None, scale=str(small_scale)).model, CPU)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=1e-2, weight_decay=0.2)
    expected = []
    for inputs in on_device(batches.loader(), clip, CPU):
        tokens = torch.nn.functional.pad(inputs.tokens, (0, 77 - inputs.tokens.shape[1]))
        image_features, text_features, scale = clip.model(inputs.images, tokens)
        loss = open_clip.ClipLoss()(image_features, text_features, scale)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.model.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    for name in ("logit_scale", "visual.proj", "text_projection"):  # others have gradients of pure rounding
        torch.testing.assert_close(
            ours.model.state_dict()[name], clip.model.state_dict()[name], atol=1e-4, rtol=1e-3
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32_with_float32_weights(small_scale, precision):
    """The first loss is that of float32 up to rounding; later ones drift (fp16 skips steps that overflow)."""
    full, _, _ = steps(small_scale, "float32")
    mixed, clip, _ = steps(small_scale, precision)
    assert mixed[0] == pytest.approx(full[0], rel=0.01) and mixed[0] != full[0]
    assert all(p.isfinite().all() for p in clip.model.parameters()) and mixed[-1] < mixed[0]
    assert all(p.dtype == torch.float32 for p in clip.model.parameters())
