"""What a model draws (dropout) and what it keeps of batches (batch norm) while it trains, whole and in parts."""

import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from torch import Tensor, nn

import fomo.update
from fomo.clip import contrastive_loss, encode
from fomo.devices import Precision
from fomo.distributed import ALONE, Ranks
from fomo.errors import Interrupted
from fomo.load_recipe import load
from fomo.methods import Method
from fomo.methods.base import Inputs
from fomo.passes import drawing
from fomo.train import backward, backward_in_parts, compiled

ROOT, CPU = Path(__file__).parents[1], torch.device("cpu")
TEXT = {"context_length": 16, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
RESNET = {"image_size": 32, "patch_size": None, "width": 8, "layers": [1, 1, 1, 1]}
DRAWS = (3, 1, 5)  # seed, update, step


def timm_tower(name: str, **more) -> dict:
    tower = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
    return {**tower, "image_size": 32, **more}


def model_of(vision: dict, text_dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    width = 64 if vision is RESNET else 16
    model = open_clip.CLIP(embed_dim=width, vision_cfg=vision, text_cfg=TEXT).train()
    for block in model.transformer.resblocks:
        block.attn.dropout = text_dropout
    return model


MODELS = {  # each draws something
    "patch dropout": (VIT | {"patch_dropout": 0.5}, 0.0),
    "attention of the text": (VIT, 0.3),
    "drop path": (timm_tower("test_vit", timm_drop_path=0.5, image_size=32), 0.0),
    "dropout before the head": (timm_tower("test_convnext", timm_pool="avg", timm_drop=0.5), 0.0),
    "all, with batch norm": (timm_tower("test_resnet", timm_pool="avg", timm_drop=0.5), 0.3),
}


def batch_of(size: int = 8, ranks: Ranks = ALONE) -> Inputs:
    """This rank's rows of a batch; all parts of it are the same pairs, so that only draws tell them apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 32, generator=generator).repeat_interleave(size // 2, 0)
    tokens = torch.randint(1, 60, (2, 16), generator=generator).repeat_interleave(size // 2, 0)
    tokens[:, -1] = 63
    rows = slice(ranks.rank, None, ranks.world_size)
    return Inputs(images[rows], tokens[rows], torch.ones(size, dtype=torch.int64)[rows], ranks)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name or "tracked" in name}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def in_parts(model: nn.Module, count: int, draws=DRAWS, encoder=encode, ranks: Ranks = ALONE) -> Tensor:
    precision = Precision("float32", CPU)
    return backward_in_parts(model, encoder, Method(), batch_of(ranks=ranks), precision, count, draws)


# --- draws -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_parts_are_those_of_the_same_draws_with_one_graph(name):
    """Written out: every part is encoded once with its draws, and autograd goes through all of them."""
    count, batch = 4, batch_of()
    model = model_of(*MODELS[name])
    parts = [(batch.images[i::count], batch.tokens[i::count]) for i in range(count)]
    features = []
    for i, (images, tokens) in enumerate(parts):
        with drawing((*DRAWS, i), CPU):
            features.append(encode(model, images, tokens))
    images, texts = (torch.cat([f[side] for f in features]) for side in (0, 1))
    loss = contrastive_loss(features[0]._replace(image_features=images, text_features=texts))
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    found = in_parts(model, count)
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert_close(gradients(model), expected)
    assert any(not features[0][side].equal(features[i][side]) for side in (0, 1) for i in (1, 2, 3))


@pytest.mark.parametrize("name", MODELS)
def test_draws_are_decided_by_seed_update_step_and_part(name):
    model, batch = model_of(*MODELS[name]), batch_of()
    for module in model.modules():  # else their statistics do not come into it
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0

    def loss(*draws: int) -> float:
        return backward(model, encode, Method(), batch, Precision("float32", CPU), draws).item()

    torch.manual_seed(1)
    first = loss(0, 0, 0)
    torch.manual_seed(2)
    assert loss(0, 0, 0) == first
    assert len({first, loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)}) == 4


def test_nobody_else_sees_that_a_model_draws():
    torch.manual_seed(7)
    expected = torch.randn(3)
    model = model_of(*MODELS["patch dropout"])
    torch.manual_seed(7)
    backward(model, encode, Method(), batch_of(), Precision("float32", CPU), DRAWS)
    in_parts(model, 4)
    with pytest.raises(ZeroDivisionError), drawing(DRAWS, CPU):
        torch.rand(5)
        raise ZeroDivisionError
    assert torch.randn(3).equal(expected)


def test_draws_change_nothing_in_a_model_that_draws_nothing():
    found = []
    for draws in ((), (0, 0, 0), DRAWS):
        model = model_of(VIT)
        loss = backward(model, encode, Method(), batch_of(), Precision("float32", CPU), draws)
        found.append({"loss": loss, **gradients(model)})
    assert all(
        a.equal(b) for other in found[1:] for a, b in zip(found[0].values(), other.values(), strict=True)
    )


def test_checkpointing_draws_the_same_again():
    found = []
    for enable in (False, True):
        model = model_of(*MODELS["attention of the text"])
        model.set_grad_checkpointing(enable)
        in_parts(model, 4)
        found.append(gradients(model))
    assert_close(*found)


@pytest.mark.slow
def test_a_compiled_model_draws_the_same_in_both_passes():
    torch._dynamo.reset()
    model, seen, fast = model_of(VIT, text_dropout=0.3), [], compiled()

    def encoder(*inputs):
        seen.append(fast(*inputs))
        return seen[-1]

    in_parts(model, 2, encoder=encoder)
    for first, second in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(first.text_features, second.text_features, atol=1e-5, rtol=0)
    assert not seen[0].text_features.allclose(seen[1].text_features)


# --- runs that are interrupted, and several ranks --------------------------------------------------------


@pytest.fixture
def dropping_scale(small_scale: Path, tmp_path: Path) -> Path:
    """The small scale with a model that drops half of its patches."""
    text = small_scale.read_text().replace(
        "width: 16, head_width", "patch_dropout: 0.5, width: 16, head_width"
    )
    assert "patch_dropout" in text
    (tmp_path / "data.yaml").write_text((small_scale.parent / "data.yaml").read_text())
    (tmp_path / "dropping.yaml").write_text(text)
    return tmp_path / "dropping.yaml"


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_that_is_interrupted_within_an_update_draws_on_as_if_it_were_not(
    dropping_scale, tmp_path, monkeypatch, accumulate
):
    overrides = ["stream.updates=2", f"optimizer.accumulate={accumulate}", "evaluation.frozen=false"]
    recipe = load(None, scale=str(dropping_scale), overrides=overrides)
    fomo.update.run_recipe(recipe, tmp_path / "whole", resume=False, device="cpu")
    torch.manual_seed(99)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(fomo.update.Trainer, "bookkeeping", interrupted(fomo.update.Trainer.bookkeeping, 6))
        fomo.update.run_recipe(recipe, tmp_path / "cut", resume=False, device="cpu")
    torch.manual_seed(98)
    fomo.update.run_recipe(recipe, tmp_path / "cut", resume=True, device="cpu")
    whole, cut = (load_file(tmp_path / f"{run}/weights/update_002.safetensors") for run in ("whole", "cut"))
    assert not [name for name in whole if not whole[name].equal(cut[name])]


def interrupted(bookkeeping, steps: int):
    """`bookkeeping`, with a signal to stop after so many steps of the run."""

    def count(trainer, *arguments):
        count.done += 1
        if count.done == steps:
            raise Interrupted(15)
        return bookkeeping(trainer, *arguments)

    count.done = 0
    return count


def step_of_a_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    ranks, model = Ranks(rank, size), model_of(*MODELS["all, with batch norm"])
    loss = in_parts(model, 2, ranks=ranks)
    ranks.all_reduce_([loss, *(p.grad for p in model.parameters())])
    torch.save({"loss": loss, **gradients(model), **statistics(model)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_draw_and_keep_what_one_rank_does_in_as_many_parts(tmp_path):
    """2 ranks with 2 parts are 1 rank with 4, dropout and running statistics included."""
    torch.multiprocessing.spawn(step_of_a_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = model_of(*MODELS["all, with batch norm"])
    alone = {"loss": in_parts(model, 4), **gradients(model), **statistics(model)}
    assert all(first[name].equal(second[name]) for name in alone)
    assert_close(first, alone, tolerance=1e-4)


# --- batch norms -----------------------------------------------------------------------------------------


def test_a_batch_in_parts_counts_once_in_the_running_statistics():
    """8 pairs in 3 parts of unequal size: by hand, for the first batch norm of a ResNet."""
    model, batch = model_of(RESNET), batch_of()
    generator = torch.Generator().manual_seed(1)
    batch = batch._replace(images=torch.randn(batch.images.shape, generator=generator))
    with torch.no_grad():
        before = statistics(model)
        outputs = [model.visual.conv1(batch.images[i::3]).transpose(0, 1).flatten(1) for i in range(3)]
    backward_in_parts(model, encode, Method(), batch, Precision("float32", CPU), 3, DRAWS)
    for name, measured in (("mean", [x.mean(1) for x in outputs]), ("var", [x.var(1) for x in outputs])):
        parts = sum(size / 8 * x for size, x in zip((3, 3, 2), measured, strict=True))
        expected = 0.9 * before[f"visual.bn1.running_{name}"] + 0.1 * parts
        torch.testing.assert_close(statistics(model)[f"visual.bn1.running_{name}"], expected)
    assert model.visual.bn1.num_batches_tracked == 1


def test_a_whole_batch_keeps_what_torch_keeps_also_when_it_is_computed_again():
    """Gradient checkpointing of a timm tower passes through its batch norms a second time."""
    plain = model_of(timm_tower("test_resnet", timm_pool="avg"))
    encode(plain, *batch_of()[:2])
    for enable in (False, True):
        model = model_of(timm_tower("test_resnet", timm_pool="avg"))
        model.set_grad_checkpointing(enable)
        backward(model, encode, Method(), batch_of(), Precision("float32", CPU), DRAWS)
        expected = statistics(plain)
        assert expected and all(found.equal(expected[name]) for name, found in statistics(model).items())


# --- layout ----------------------------------------------------------------------------------------------

STEP = """
import sys
import torch
from open_clip import get_model_config
from open_clip.model import _build_vision_tower
from types import SimpleNamespace
from fomo.datasets.samples import Batch
from fomo.train import on_device

config = get_model_config(sys.argv[1])
visual = _build_vision_tower(config["embed_dim"], config["vision_cfg"]).train()
size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
clip = SimpleNamespace(model=SimpleNamespace(visual=visual), image_size=size, mean=(0, 0, 0), std=(1, 1, 1))
canvas, boxes = torch.zeros(2, size, size, 3, dtype=torch.uint8), torch.tensor([[0.0, 0.0, size, size]] * 2)
((images, *_),) = on_device([Batch(canvas, boxes, torch.zeros(2, 5), torch.zeros(2))], clip, torch.device("cpu"))
print("channels last" if images.is_contiguous(memory_format=torch.channels_last) else "contiguous", flush=True)
visual(images).square().sum().backward()
print("done")
"""


@pytest.mark.parametrize(
    ("name", "layout"),
    [("MobileCLIP2-S0", "contiguous"), ("RN50", "channels last"), ("convnext_tiny", "channels last")],
)
def test_towers_of_convolutions_train_on_a_cpu_in_a_layout_that_works(name, layout):
    """In a process of its own: channels last, MobileCLIP dies of a segmentation fault."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{STEP}", name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [layout, "done"], done.stderr[-500:]
