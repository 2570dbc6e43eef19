"""Shared by all tests: a cache of their own, one thread, a small recipe whose base model takes a second."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"


def pytest_configure(config):
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """Caches go to a folder of this session; FOMO_CACHE is restored for whoever runs pytest in a process."""
    before = os.environ.get("FOMO_CACHE")
    os.environ["FOMO_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("FOMO_CACHE") if before is None else os.environ.update(FOMO_CACHE=before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real test pictures; users will not have it."""
    folder = Path(os.environ.get("FOMO_TEST_DATA", SHARED))
    if not folder.is_dir():
        pytest.skip(f"real pictures are not here: {folder}")
    os.environ["FOMO_TEST_DATA"] = str(folder)
    return folder


SMALL_DATA = """
pretraining:
  - {source: world, domain: shapes, style: mixed, per_concept: 8}
adaptation:
  symbols: {source: world, domain: symbols, train: 6, test: 4}
  flags: {source: world, domain: flags, train: 6, test: 4}
evaluation:
  shapes-inverted: {source: world, domain: shapes, style: inverted, test: 4}
"""

SMALL_SCALE = """
model:
  config:
    embed_dim: 16
    vision_cfg: {image_size: 32, patch_size: 16, width: 16, head_width: 8, layers: 1}
    text_cfg: {context_length: 77, vocab_size: 49408, width: 16, heads: 2, layers: 1}
  pretraining: {data: data.yaml, samples: 32, batch_size: 16, lr: 1e-3}
data: data.yaml
stream: {updates: 3}
budget: {steps: 4}
optimizer: {batch_size: 12}
evaluation: {subset: 1.0, keep_weights: null, frozen: true}
defaults:
  lr: {finetune: 1e-2}
  keep: 0.5
"""


@pytest.fixture(scope="session")
def small_scale(tmp_path_factory) -> Path:
    """A scale file: T = 3 updates of 4 steps of 12, a CLIP of 0.8 M parameters, nearly all vocabulary."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "data.yaml").write_text(SMALL_DATA)
    (folder / "small.yaml").write_text(SMALL_SCALE)
    return folder / "small.yaml"
