"""TorchScript archives, as OpenAI's models are published: their tensors are read, their programs are not run.

What hostile archives could do: tests/test_hostile.py.
"""

import shutil
import zipfile

import open_clip
import pytest
import torch
from small_runs import assert_same, invoke

from fomo.checkpoint_files import open_checkpoint
from fomo.clip import load, new
from fomo.errors import UserError
from fomo.torchscript import read_torchscript

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """As OpenAI's: 16-bit weights beside 32-bit ones, numbers of the model among its buffers. -> it, its model."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG, quick_gelu=True)
    open_clip.model.convert_weights_to_fp16(model)
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))
    path = tmp_path_factory.mktemp("openai") / "ViT-small.pt"
    torch.jit.save(torch.jit.script(model), path)
    return path, model


@pytest.fixture
def known(monkeypatch):
    """The small architecture, in open_clip with and without QuickGELU, and with the tag of OpenAI."""
    for name, more in (("small", {}), ("small-quickgelu", {"quick_gelu": True})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**CONFIG, **more})
        tag = {"openai": open_clip.pretrained._PRETRAINED["ViT-B-32"]["openai"]}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tag)


def test_the_tensors_are_those_that_torch_would_load(archive):
    path, _ = archive
    assert_same(read_torchscript(path), torch.jit.load(path).state_dict())


def test_an_archive_of_openai_is_opened_with_its_activation(archive, known, capsys):
    path, _ = archive
    state = torch.jit.load(path).state_dict()
    state.pop("attn_mask")  # OpenAI's have none
    there = open_clip.model.build_model_from_openai_state_dict(state).float()
    images, tokens = torch.randn(2, 3, 32, 32), open_clip.tokenize(["a cat", "two dogs"])
    for name in (None, "small", "small/openai"):
        base, _, tag = (name or "").partition("/")
        clip = load(base or None, f"{tag}/{path}" if tag else str(path))
        assert clip.config["model_cfg"]["quick_gelu"] and clip.mean == open_clip.OPENAI_DATASET_MEAN
        with torch.no_grad():
            torch.testing.assert_close(clip.model.eval().encode_image(images), there.encode_image(images))
            torch.testing.assert_close(clip.model.encode_text(tokens), there.encode_text(tokens))
    told = capsys.readouterr().err
    assert "its program is not run" in told and "taken as small/openai" in told


def test_an_archive_merges_with_other_files(archive, tmp_path):
    path, _ = archive
    state = new({**CONFIG, "quick_gelu": True}, 1).model.state_dict()
    torch.save(state, tmp_path / "tuned.pt")
    done = invoke("merge", "--rule", "interpolate", "--set", "keep=0.5", path, tmp_path / "tuned.pt",
                  "-o", tmp_path / "merged.pt")  # fmt: skip
    assert done.exit_code == 0, done.output
    merged, old = torch.load(tmp_path / "merged.pt"), read_torchscript(path)
    assert merged.keys() == state.keys()
    torch.testing.assert_close(merged["visual.proj"], (old["visual.proj"].float() + state["visual.proj"]) / 2)


def test_a_damaged_archive_is_one_line(archive, tmp_path):
    path, _ = archive
    with zipfile.ZipFile(path) as whole:
        names = whole.namelist()
        for missing in ("/data/0", "/data.pkl"):
            with zipfile.ZipFile(tmp_path / "part.pt", "w") as part:
                for name in names:
                    if not name.endswith(missing):
                        part.writestr(name, whole.read(name))
            with pytest.raises(UserError) as caught:
                open_checkpoint(tmp_path / "part.pt")
            assert "part.pt: " in str(caught.value) and len(str(caught.value)) < 400
    shutil.copy(path, tmp_path / "cut.pt")
    with open(tmp_path / "cut.pt", "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(UserError, match="not a file of tensors"):
        open_checkpoint(tmp_path / "cut.pt")
