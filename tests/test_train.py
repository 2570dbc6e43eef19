"""The training step against a plain one, and mixed precision."""

from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from small_runs import CPU, recipe_of
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from fomo.clip import Features, contrastive_loss, encode, ids_of_texts, new
from fomo.datasets import datafile
from fomo.datasets.mixture import Batches, pool_of
from fomo.datasets.samples import Batch, Collection, Samples
from fomo.devices import Precision
from fomo.methods import Method, build_method
from fomo.methods.base import Inputs
from fomo.pretrain import starting_model
from fomo.recipe import Optimizer
from fomo.train import backward, backward_in_parts, compiled, moved, on_device, train

LR = 2e-3
SETTINGS = Optimizer(lr=LR, batch_size=8)


def clip_and_batches(small_scale):
    recipe = recipe_of(small_scale)
    clip = starting_model(recipe.model, CPU)
    pool = Collection([Samples(s, clip, clip.image_size, "pool") for s in datafile.read(recipe.data).pool()])
    return clip, Batches([("pretraining", pool_of(pool, (0,)), 8)], 0, 0, 4)


@pytest.fixture
def clip_and_batch(small_scale):
    clip, batches = clip_and_batches(small_scale)
    return clip, next(iter(on_device(batches.loader(), clip, CPU)))


def train_on(batches, clip, method, optimizer, precision="float32", max_scale=100.0, **options):
    return train(clip, method, optimizer, batches, lambda step: LR, device=CPU, clip_norm=1.0,
                 precision=Precision(precision, CPU), max_scale=max_scale, **options)  # fmt: skip


def steps(small_scale, precision="float32", **options):
    """Four steps on the pretraining pool -> (losses, the model, the batches)."""
    clip, batches = clip_and_batches(small_scale)
    optimizer = Method().optimizer(list(clip.model.parameters()), SETTINGS)
    done = train_on(batches.loader(), clip, Method(), optimizer, precision, **options)
    return [step.loss.item() for step in done], clip, batches


def step_of(model, method, batch, parts=None):
    """The loss and the gradients of a batch; in parts, or of the whole at once."""
    model.zero_grad()
    how = model, encode, method, batch, Precision("float32", CPU)
    loss = backward_in_parts(*how, parts) if parts else backward(*how)
    return loss, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_step_is_open_clips_loss_clipping_and_adamw(small_scale):
    losses, ours, batches = steps(small_scale)
    clip, _ = clip_and_batches(small_scale)
    optimizer = torch.optim.AdamW(clip.model.parameters(), lr=LR, weight_decay=0.2)
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
    full, _, _ = steps(small_scale)
    mixed, clip, _ = steps(small_scale, precision)
    assert mixed[0] == pytest.approx(full[0], rel=0.01) and mixed[0] != full[0]
    assert all(p.isfinite().all() for p in clip.model.parameters())
    assert mixed[-1] == pytest.approx(full[-1], rel=0.3)
    assert all(p.dtype == torch.float32 for p in clip.model.parameters())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(clip_and_batch, count):
    """8 pairs also in 3 parts of unequal size, and one by one; the scale's gradient counts once."""
    clip, batch = clip_and_batch
    whole, expected = step_of(clip.model, Method(), batch)
    loss, found = step_of(clip.model, Method(), batch, count)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5) and not loss.requires_grad
    assert_close(found, expected)
    assert expected["logit_scale"].abs() > 1e-4


class Sigmoid(nn.Module):
    """Two linear towers with the scale and the bias of SigLIP."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encode_image, self.encode_text = nn.Linear(3, 4), nn.Linear(3, 4)
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-1.0))


def test_a_logit_bias_counts_once_too():
    model, batch = Sigmoid(), Inputs(*torch.randn(2, 5, 3), torch.zeros(5, dtype=torch.int64))
    assert_close(step_of(model, Method(), batch, 2)[1], step_of(model, Method(), batch)[1])


def written_out(features, texts, sigmoid):
    """The loss of pairs of which some have the same text, pair by pair, in double precision."""
    scale, count = features.logit_scale.double(), len(texts)
    logit = scale * features.image_features.double() @ features.text_features.double().T
    total = 0.0
    for i in range(count):
        same = [j for j in range(count) if texts[j] == texts[i]]
        if sigmoid:
            signs = [1 if j in same else -1 for j in range(count)]
            logits = logit[i] + features.logit_bias
            total -= sum(torch.log(torch.sigmoid(sign * logits[j])) for j, sign in enumerate(signs))
        else:
            for row in (logit[i], logit[:, i]):  # of a picture over texts, of a text over pictures
                total -= sum(row[j] - torch.logsumexp(row, 0) for j in same) / len(same) / 2
    return float(total / count)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("texts", ["abcdef", "aabbcc", "aaaaab", "aaaaaa"])
def test_equal_captions_are_positives_of_each_others_pictures(sigmoid, texts):
    torch.manual_seed(0)
    images, by_text = (
        F.normalize(torch.randn(6, 4), dim=1),
        {t: F.normalize(torch.randn(4), dim=0) for t in "abcdef"},
    )
    bias = torch.tensor(-1.0) if sigmoid else None
    features = Features(images, torch.stack([by_text[t] for t in texts]), torch.tensor(5.0), bias)
    ids = ids_of_texts(torch.tensor([[49406, ord(t), 49407] for t in texts]))
    loss = contrastive_loss(features, ids).item()
    assert loss == pytest.approx(written_out(features, texts, sigmoid), abs=1e-5)
    alone = contrastive_loss(features).item()
    same = texts == "abcdef" or not sigmoid  # equal texts have equal logits, so a softmax sees no difference
    assert (loss == pytest.approx(alone, abs=1e-5)) == same
    assert alone == pytest.approx(written_out(features, range(6), sigmoid), abs=1e-5)


def test_the_sigmoid_loss_gets_sure_of_what_it_is_taught():
    """Two classes of 8: with equal captions as negatives the right pair ends at 1 of 8."""
    ids = torch.arange(2).repeat_interleave(8)
    probabilities = {}
    for given in (None, ids):
        logit = torch.zeros(2, requires_grad=True)  # of the right and of the wrong class
        optimizer = torch.optim.Adam([logit], lr=0.1)
        for _ in range(300):
            images = torch.eye(2)[ids]
            texts = torch.where(torch.eye(2)[ids] > 0, logit[0], logit[1])
            optimizer.zero_grad()
            contrastive_loss(Features(images, texts, torch.tensor(1.0), torch.tensor(0.0)), given).backward()
            optimizer.step()
        probabilities[given is None] = torch.sigmoid(logit[0]).item()
    assert probabilities[True] == pytest.approx(1 / 8, abs=1e-3) and probabilities[False] > 0.99


def test_ids_of_texts_do_not_depend_on_the_padding_and_tell_texts_apart():
    tokens = torch.randint(1, 49408, (500, 7), generator=torch.Generator().manual_seed(1))
    ids = ids_of_texts(tokens)
    assert ids.equal(ids_of_texts(F.pad(tokens, (0, 70)))) and len(ids.unique()) == 500
    assert not ids_of_texts(tokens.flip(1)).equal(ids)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_equal_captions_are_seen_over_the_parts_of_a_batch(count, sigmoid):
    model = Sigmoid()
    if not sigmoid:
        model.logit_bias = None
    tokens = torch.randn(3, 3)[[0, 1, 0, 2, 0, 1]]
    batch = Inputs(torch.randn(6, 3), tokens, torch.zeros(6), text_ids=torch.tensor([0, 1, 0, 2, 0, 1]))
    whole, expected = step_of(model, Method(), batch)
    loss, found = step_of(model, Method(), batch, count)
    assert loss.item() == pytest.approx(whole.item(), abs=1e-5)
    assert_close(found, expected)
    negatives = step_of(model, Method(), batch._replace(text_ids=None))[0].item()
    assert (whole.item() == pytest.approx(negatives, abs=1e-3)) != sigmoid


def test_penalties_of_parts_add_up(clip_and_batch):
    """One that depends on the weights alone counts once; one that is a mean over pairs is their mean."""

    class Both(Method):
        def penalty(self, model, batch, features):
            weights = sum(p.square().sum() for p in model.parameters())
            return 0.1 * weights + (features.image_features * features.text_features).sum(1).mean()

    clip, batch = clip_and_batch
    whole, expected = step_of(clip.model, Both(), batch)
    loss, found = step_of(clip.model, Both(), batch, 3)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    assert_close(found, expected)


def test_parts_have_the_mixture_of_the_batch():
    """Distillation needs pairs of the pretraining pool in each part; a batch has them at its beginning."""
    seen = []

    class Spy(Method):
        def penalty(self, model, batch, features):
            seen.append(batch.pools.tolist())
            return 0.0

    pools = torch.tensor([0, 0, 1, 1, 2, 2])
    step_of(Sigmoid(), Spy(), Inputs(*torch.randn(2, 6, 3), pools), 2)
    assert seen == [[0, 1, 2], [0, 1, 2]]


def losses_of(small_scale, name, accumulate):
    clip, batches = clip_and_batches(small_scale)
    method = build_method({"name": name})
    torch.manual_seed(0)
    parameters = method.prepare(clip.model)
    method.before_update(clip.model)
    if name == "ewc":
        method.after_update(clip.model, on_device(batches.loader(), clip, CPU))  # from here it has a penalty
    optimizer = method.optimizer(parameters, SETTINGS)
    done = train_on(batches.loader(), clip, method, optimizer, max_scale=None, accumulate=accumulate)
    return [step.loss.item() for step in done]


@pytest.mark.parametrize("name", ["finetune", "ewc", "si", "lora", "dora"])
def test_methods_take_the_same_steps_in_parts(small_scale, name):
    assert losses_of(small_scale, name, 2) == pytest.approx(losses_of(small_scale, name, 1), abs=1e-5)


def test_distillation_in_parts_compares_within_each_part(small_scale):
    """At the first step model and teacher agree and the term is 0; then each part has its own."""
    parts, whole = losses_of(small_scale, "distill", 2), losses_of(small_scale, "distill", 1)
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)
    assert parts[2] == pytest.approx(whole[2], rel=0.1) and parts[2] != whole[2]


def test_checkpointing_changes_no_gradient_and_keeps_less(clip_and_batch):
    clip, batch = clip_and_batch
    found, memory = [], []
    for enable in (False, True):
        clip.model.set_grad_checkpointing(enable)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            loss = contrastive_loss(encode(clip.model, batch.images, batch.tokens))
        loss.backward()
        found.append(gradients(clip.model))
        memory.append(sum(sizes))
        clip.model.zero_grad()
    assert_close(*found)
    assert memory[1] < 0.8 * memory[0]


def test_a_compiled_model_is_compiled_once_for_each_of_three_lengths(small_scale, monkeypatch):
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    clip, _ = clip_and_batches(small_scale)
    encoder, images = compiled(), torch.randn(2, 3, 32, 32)
    for length in (5, 9, 16, 17, 30, 32, 33, 60, 77, 12):
        tokens = torch.randint(1, 40000, (2, length))
        tokens[:, -1] = 49407
        with torch.no_grad():
            ours, plain = encoder(clip.model, images, tokens), encode(clip.model, images, tokens)
        assert_close(
            ours._asdict() | {"logit_bias": torch.zeros(())},
            plain._asdict() | {"logit_bias": torch.zeros(())},
        )
    assert counter.frame_count == 3


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps(small_scale):
    torch._dynamo.reset()
    eager, _, _ = steps(small_scale)
    fast, _, _ = steps(small_scale, compile=True)
    assert fast == pytest.approx(eager, abs=1e-5)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read back, shapes that depend on values."""

    waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.waiting:
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_reads_no_value_back_from_the_device(small_scale, accumulate):
    clip, batches = clip_and_batches(small_scale)
    optimizer = Method().optimizer(list(clip.model.parameters()), SETTINGS)
    loaded = [batches[step] for step in range(4)]  # a DataLoader reads the seed that it draws
    with Reads() as reads:
        *_, last = train_on(loaded, clip, Method(), optimizer, accumulate=accumulate)
        assert not reads.found
        last.loss.item()
        assert reads.found


def test_towers_of_convolutions_get_channels_last_and_compute_the_same():
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": [1] * 4, "width": 8, "head_width": 8, "image_size": 64, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    clip = new(config, 0)
    clip.model.eval()
    canvas = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 2)
    batch = Batch(canvas, boxes, torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    (inputs,) = on_device([batch], clip, CPU)
    assert inputs.images.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        last, first = (
            clip.model.encode_image(images) for images in (inputs.images, inputs.images.contiguous())
        )
    torch.testing.assert_close(last, first, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_a_gpu_in_order_and_whole():
    batches = [Batch(*(torch.full((64, 64, 64, 3), i).pin_memory() for _ in range(4))) for i in range(8)]
    for i, batch in enumerate(moved(batches, torch.device("cuda"))):
        torch.cuda._sleep(10**7)
        assert all((tensor == i).all() for tensor in batch)
