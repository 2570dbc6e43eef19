"""The merge command on files of weights: names stay, prefixes stripped, mistakes named."""

import json
import runpy
from pathlib import Path

import open_clip
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fomo.clip import load, new, save

ROOT = Path(__file__).parents[1]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def merge(*arguments):
    cli = runpy.run_path(str(ROOT / "fomo.py"))["cli"]
    return CliRunner().invoke(cli, ["merge", *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two model directories with the same architecture and other weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        save(new(CONFIG, seed), folder / str(seed))
    return folder / "0", folder / "1"


def state(path):
    return load(None, str(path)).model.state_dict()


def test_directories_merge_into_a_directory_that_open_clip_opens(models, tmp_path):
    done = merge("--rule", "interpolate", "--set", "keep=0.25", *models, "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    old, new_, merged = state(models[0]), state(models[1]), state(tmp_path / "merged")
    for name in old:
        torch.testing.assert_close(merged[name], 0.25 * old[name] + 0.75 * new_[name])
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}/merged")
    assert torch.equal(model.visual.proj, merged["visual.proj"])


def test_any_file_of_named_tensors_is_merged_and_keeps_its_names(tmp_path):
    a, b = ({"x": torch.full((2,), v), "steps": torch.tensor(int(v))} for v in (1.0, 3.0))
    save_file(a, tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in b.items()}}, tmp_path / "b.pt")
    for out in ("c.safetensors", "c.pt"):
        done = merge("--rule", "interpolate", "--set", "keep=0.5", tmp_path / "a.safetensors", tmp_path / "b.pt",
                     "-o", tmp_path / out)  # fmt: skip
        assert done.exit_code == 0, done.output
        merged = (
            load_file(tmp_path / out) if out.endswith("s") else torch.load(tmp_path / out, weights_only=True)
        )
        assert merged["x"].tolist() == [2.0, 2.0] and merged["steps"] == 3


@pytest.mark.parametrize("order", [("float", "half"), ("half", "float")])
def test_a_merge_is_stored_in_the_widest_dtype_or_the_one_that_is_asked_for(order, tmp_path):
    fine = torch.tensor([1.0, 1.0 + 2**-20])  # in bfloat16 both are 1
    save_file({"x": fine, "y": fine.bfloat16(), "n": torch.tensor(1)}, tmp_path / "float.safetensors")
    save_file(
        {"x": fine.bfloat16(), "y": fine.bfloat16(), "n": torch.tensor(1)}, tmp_path / "half.safetensors"
    )
    files, out = [tmp_path / f"{name}.safetensors" for name in order], tmp_path / "out.safetensors"
    done = merge("--rule", "interpolate", "--set", "keep=0.5", *files, "-o", out)
    merged = load_file(out)
    assert torch.equal(merged["x"], (fine + 1) / 2) and merged["y"].dtype == torch.bfloat16
    assert "warning: the models have tensors in bfloat16 and float32" in done.stderr
    done = merge("--rule", "interpolate", "--set", "keep=0.5", "--dtype", "float16", *files, "-o", out)
    kinds = {name: tensor.dtype for name, tensor in load_file(out).items()}
    assert kinds == {"x": torch.float16, "y": torch.float16, "n": torch.int64} and not done.stderr.count(
        "warning"
    )


def test_rules_on_task_vectors_take_a_base(models, tmp_path):
    save(new(CONFIG, 2), tmp_path / "base")
    out = tmp_path / "merged.safetensors"
    done = merge(
        "--rule", "task_arithmetic", "--set", "scale=0.5", "--base", tmp_path / "base", *models, "-o", out
    )
    assert done.exit_code == 0, done.output
    base, one, two, merged = state(tmp_path / "base"), state(models[0]), state(models[1]), load_file(out)
    for name in base:
        torch.testing.assert_close(merged[name], 0.5 * (one[name] + two[name]))
    assert merge("--rule", "ties", *models, "-o", out).exit_code == 2


def test_what_update_merges_the_command_merges(small_scale, tmp_path):
    """EMA-merge through `update` is the command applied to the running average and the stored expert."""
    from fomo.load_recipe import load as load_recipe
    from fomo.update import run_recipe

    spec = "method={name: merge, keep: 0.7, deploy: finetuned, init: ema}"
    tuned = load_recipe(None, scale=str(small_scale), overrides=[spec, "stream.updates=1"])
    run_recipe(tuned, tmp_path / "tuned", resume=False, device="cpu")
    ema = load_recipe(
        None, scale=str(small_scale), overrides=["method={name: merge, keep: 0.7}", "stream.updates=1"]
    )
    run_recipe(ema, tmp_path / "ema", resume=False, device="cpu")
    files = [tmp_path / "tuned/weights" / f"update_00{n}.safetensors" for n in (0, 1)]
    out = tmp_path / "merged.safetensors"
    assert merge("--rule", "interpolate", "--set", "keep=0.7", *files, "-o", out).exit_code == 0
    expected, merged = load_file(tmp_path / "ema/weights/update_001.safetensors"), load_file(out)
    assert all(torch.equal(expected[name], merged[name]) for name in expected)


def test_a_sweep_scores_each_value_and_draws_the_curve(models, small_scale, tmp_path):
    done = merge("--rule", "interpolate", "--sweep", "keep=0,0.5,1", "--data", small_scale.parent / "data.yaml",
                 *models, "-o", tmp_path / "curve.png")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["keep", "0", "0.5", "1"]
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_of_words(models, small_scale, tmp_path):
    done = merge("--rule", "ties", "--base", models[0], "--sweep", "scope=model,tensor", *models,
                 "--data", small_scale.parent / "data.yaml", "-o", tmp_path / "curve.svg")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["scope", "model", "tensor"]


def test_mistakes_are_one_line(models, tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "b.safetensors")
    save_file({"y": torch.zeros(2)}, tmp_path / "c.safetensors")
    (tmp_path / "d.pt").write_bytes(b"no tensors")
    a, b, c, d = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors", "d.pt"))
    cases = [
        (["--rule", "interpolate", a, b], "models differ in tensor x"),
        (["--rule", "interpolate", a, c], "models differ in 2 tensor names"),
        (["--rule", "interpolate", a, d], "not a file of tensors"),
        (["--rule", "interpolate", a, tmp_path / "gone.pt"], "no such file"),
        (["--rule", "interpol", a, a], "did you mean interpolate?"),
        (["--rule", "interpolate", "--set", "keep=2", a, a], "keep: got 2, accepted: a number from 0 to 1"),
        (["--rule", "interpolate", "--set", "scale=2", a, a], "scale: unknown field"),
        (["--rule", "slerp", a, a, a], "two models, old and new"),
        (["--rule", "interpolate", "--sweep", "keep", a, a], "--sweep: write KEY=A,B,C"),
    ]
    for arguments, expected in cases:
        done = merge(*arguments, "-o", tmp_path / "out.safetensors")
        assert done.exit_code == 2 and expected in done.stderr, done.output
        assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out.safetensors").exists()
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())).count("part") == 0
