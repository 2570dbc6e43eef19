"""The budget against the paper's Table 4, closed forms and hand counts.

CPU, no downloads:  python -m pytest tests/budget
"""

import dataclasses
import json
import runpy

import open_clip
import pytest
import torch
from click.testing import CliRunner

import fomo.budget.mafs
from fomo.budget.flops_memory import Fake, Peak, Training, count
from fomo.budget.mafs import PAPER, Work, architecture, counted_once, training_of, work_of
from fomo.errors import UserError
from fomo.load_recipe import ROOT, load
from fomo.methods import METHODS, Method, build_method
from fomo.recipe import Model

# Table 4: GFLOPs of a step, GB, steps of an update for T = 20, 50, 100, 200. ViT-B-16, batch 512, 1.8e9 GFLOPs.
TABLE_4 = {
    "finetune": (63394.7585, 46.5917, [1420, 568, 284, 142]),
    "locked-text": (57254.6183, 37.5761, [1949, 780, 390, 195]),
    "locked-image": (27176.6698, 11.8847, [12982, 5193, 2596, 1298]),
    "lnfit": (43165.5968, 30.5566, [3179, 1272, 636, 318]),
    "bitfit": (43165.5968, 30.5546, [3179, 1272, 636, 318]),
    "lora-4": (54479.2515, 40.5449, [1898, 759, 380, 190]),
    "lora-64": (54505.0151, 40.6757, [1891, 757, 378, 189]),
    "dora-4": (54479.8241, 40.6582, [1893, 757, 379, 189]),
    "dora-64": (54514.1754, 40.7871, [1886, 754, 377, 189]),
    "vera-4": (54479.3393, 40.5449, [1898, 759, 380, 190]),
    "vera-64": (54507.8336, 40.5742, [1896, 758, 379, 190]),
    "ewc": (6276081.094, 47.207, [14, 6, 3, 1]),
    "si": (63394.7585, 46.6523, [1418, 567, 284, 142]),
    "zs-merge": (63394.7585, 46.5917, [1420, 568, 284, 142]),
    "ft-merge": (63394.7585, 46.5917, [1420, 568, 284, 142]),
    "ema-merge": (63394.7585, 46.5917, [1420, 568, 284, 142]),
}
SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 2},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 3},
}


def run(*words):
    cli = runpy.run_path(str(ROOT.parent / "fomo.py"))["cli"]
    return CliRunner().invoke(cli, ["budget", *map(str, words)])


def training(method="finetune", batch_size=6, half=False, config=SMALL, **fields):
    return Training(config, {"name": method, **fields}, batch_size, half, pretraining=2)


def b16(name, *overrides):
    changes = ["budget={gflops: 1.8e9}", *overrides]
    return load(ROOT / "methods" / f"{name}.yaml", scale="b16", overrides=changes)


# --- Table 4 ---


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_4)
def test_a_step_has_the_flops_of_table_4(name):
    flops = TABLE_4[name][0]
    recipe = b16(name)
    work = work_of(dataclasses.replace(recipe, budget=dataclasses.replace(recipe.budget, fisher="per_step")))
    if name == "vera-64":  # the released code multiplies by diagonals as matrices: these terms fit both ranks
        assert work.gflops_per_step == pytest.approx(flops - diagonals(64), rel=1e-8)
    else:
        assert work.gflops_per_step == pytest.approx(flops, rel=3e-5)


def diagonals(rank):
    """GFLOPs: 2 d² r + 24 d r² in each of 12 blocks of widths 768 and 512."""
    return sum(12 * (2 * d**2 * rank + 24 * d * rank**2) for d in (768, 512)) / 1e9


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_4)
def test_the_memory_multiplier_is_within_a_twentieth_of_the_papers(name):
    work = work_of(b16(name))
    assert work.multiplier == pytest.approx(PAPER[name], abs=0.05)
    assert PAPER[name] == pytest.approx(TABLE_4[name][1] / TABLE_4["finetune"][1], abs=1.1e-4)
    if name == "finetune":  # the paper's 46.6 GB are what the driver had reserved
        assert 0.95 < work.peak_memory / 46.5917e9 < 1


@pytest.mark.slow
def test_with_the_papers_memory_the_steps_are_the_papers(tmp_path):
    table = tmp_path / "memory.csv"
    table.write_text("method,peak_gib\n" + "".join(f"{n},{row[1]}\n" for n, row in TABLE_4.items()))
    words = ["--scale", "b16", "--set", "budget={gflops: 1.8e9}", "--fisher", "per_step", "--json"]
    result = run(*words, "--methods", ",".join(TABLE_4), "--memory-table", table)
    rows = json.loads(result.stdout)["rows"]
    assert {row["method"]: list(row["steps"].values()) for row in rows} == {
        n: r[2] for n, r in TABLE_4.items()
    }


@pytest.mark.slow
def test_ewc_charged_once_per_update_has_1303_steps():
    work = dataclasses.replace(work_of(b16("ewc")), multiplier=1.0132)
    assert work.gflops_per_update == pytest.approx(98 * 63394.7585, rel=1e-8)
    assert work.steps(1.8e9, 20) == 1303


# --- FLOPs in closed form ---


def block(tokens, width):
    """FLOPs of a transformer block's forward pass on one sequence: (matrix products, attention)."""
    return 24 * tokens * width**2, 4 * tokens**2 * width


def closed_form(batch_size):
    """A step of SMALL: backward, a product is made twice and attention 2.5 times; pixels need no gradient."""
    patches, (dense, attention) = 4, (0, 0)
    for tokens, width, layers in ((patches + 1, 16, 2), (12, 24, 3)):
        products, scores = block(tokens, width)
        dense, attention = dense + layers * products, attention + layers * scores
        dense += 2 * width * 8  # the projection
    pixels = 2 * patches * 3 * 16**2 * 16
    logits = 2 * batch_size * 8
    return batch_size * (3 * dense + 3.5 * attention + 2 * pixels + 3 * logits)


@pytest.mark.parametrize("batch_size", [2, 6])
@pytest.mark.parametrize("half", [False, True])
def test_finetuning_has_the_flops_of_the_closed_form(batch_size, half):
    assert count(training(batch_size=batch_size, half=half)).step_flops == closed_form(batch_size)


@pytest.mark.parametrize("name, passes", [("lora", 3), ("dora", 4), ("vera", 3)])
def test_an_adapter_adds_products_of_its_factors(name, passes):
    """B A once after the step and, in DoRA and VeRA, for the gradient; each trained factor's slope."""
    counts = [count(training(name, rank=rank, batch_size=2)).step_flops for rank in (2, 5)]
    product = 2 * 7 * (2 * 16**2 + 3 * 24**2)  # of rank 1: in_proj and c_proj are 7 d² in each block
    assert counts[1] - counts[0] == 3 * passes * product


def test_the_teacher_reads_the_pretraining_pairs_only():
    counts = [
        count(dataclasses.replace(training("distill", batch_size=6), pretraining=n)).step_flops
        for n in (0, 3)
    ]
    forward = (closed_form(1) - 6 * 8) / 3  # about: attention and pixels are not made thrice
    assert counts[0] == closed_form(6)
    assert counts[1] - counts[0] == pytest.approx(3 * forward, rel=0.15)


def test_what_is_locked_has_no_backward_pass():
    text, image = (count(training("locked", tower=tower)).step_flops for tower in ("image", "text"))
    assert text < closed_form(6) and image < closed_form(6)
    lnfit, bitfit = (count(training(name)).step_flops for name in ("lnfit", "bitfit"))
    assert lnfit == bitfit < 0.75 * closed_form(6)


# --- memory by hand ---


def test_the_peak_is_what_lives_at_the_same_time():
    with Peak(0) as memory:
        first = torch.zeros(1000)
        second = torch.zeros(1000, dtype=torch.float64)
        view = second.view(10, 100).T
        first.add_(1)
        assert (memory.now, memory.peak) == (12_000, 12_000)
        del first
        assert memory.now == 8_000
        third = torch.zeros(500)
        del second
        assert (memory.now, memory.peak) == (10_000, 12_000)
        del view, third
        assert memory.now == 0


def test_saved_activations_and_gradients_are_followed():
    with Fake(), Peak(0) as memory:
        weight = torch.zeros(300, 200, requires_grad=True)
        inputs = torch.zeros(50, 300)
        loss = (inputs @ weight).relu().sum()
        kept = 4 * (300 * 200 + 50 * 300 + 50 * 200 + 1)  # relu saves what it returns
        assert (memory.now, memory.peak) == (kept, kept + 4 * 50 * 200 - 4)  # its input is gone
        loss.backward()
        assert memory.now == 4 * (2 * 300 * 200 + 50 * 300 + 1)


PARAMETERS = sum(p.numel() for p in open_clip.CLIP(**SMALL).parameters())


def test_finetuning_holds_weights_gradients_and_two_moments():
    """At two pairs and a large vocabulary, activations are next to nothing."""
    config = {**SMALL, "text_cfg": {**SMALL["text_cfg"], "vocab_size": 40_000}}
    parameters = sum(p.numel() for p in open_clip.CLIP(**config).parameters())
    assert count(training(batch_size=2, config=config)).peak_memory == pytest.approx(
        16 * parameters, rel=0.03
    )


@pytest.mark.parametrize(
    "copies, name, fields",
    [
        (2, "ewc", {}),  # where the update began, and the Fisher
        (3, "si", {}),  # where it began, the path, the importance
        (1, "distill", {}),  # the teacher
        (1, "merge", {}),  # the running average
        (2, "merge", {"init": "zeroshot"}),  # and the original
        (2, "merge", {"rule": "ties"}),  # likewise
        (3, "merge", {"tune": {"name": "ewc"}}),
    ],
)
def test_methods_hold_so_many_copies_of_the_weights(copies, name, fields):
    """In the second update, when activations are at their peak."""
    settings = training(name, batch_size=64, **fields)
    finetuning = count(dataclasses.replace(settings, method={"name": "finetune"})).peak_memory
    added = (count(settings).peak_memory - finetuning) / (4 * PARAMETERS)
    assert added == pytest.approx(
        copies, abs=0.3 if name == "distill" else 0.001
    )  # its teacher has features, too


def test_half_precision_keeps_less_and_layer_norms_in_float32():
    whole, half = (count(training(batch_size=256, half=half)).peak_memory for half in (False, True))
    assert 0.5 < half / whole < 0.95


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "convnext_base"])
def test_models_of_every_family_are_counted(name):
    config = architecture(Model(name=name))
    counted = count(training(config=config, half=True, batch_size=8))
    assert counted.step_flops > 0 and counted.peak_memory > 0


# --- what methods declare ---


def test_the_fisher_costs_whole_batches():
    assert build_method({"name": "ewc"}).cost(10.0, 512) == (0.0, 980.0)
    assert build_method({"name": "ewc", "samples": 1024}).cost(10.0, 512) == (0.0, 20.0)
    assert Method().cost(10.0, 512) == (0.0, 0.0)


@pytest.mark.parametrize(
    "fields, flops",
    [
        ({}, 3),
        ({"rule": "slerp"}, 10),
        ({"deploy": "all"}, 6),
        ({"init": "finetuned", "deploy": "finetuned"}, 0),
    ],
)
def test_a_merge_costs_flops_of_each_parameter(fields, flops):
    merge = build_method({"name": "merge", **fields})
    merge.prepare(open_clip.CLIP(**SMALL))
    buffers = 12 * 12  # the mask of the text tower
    held = sum(t.numel() for t in open_clip.CLIP(**SMALL).state_dict().values())
    assert held in (PARAMETERS, PARAMETERS + buffers)
    assert merge.cost(1.0, 8) == (0, flops * held)


def test_a_merge_passes_on_what_its_tuning_costs():
    merge = build_method({"name": "merge", "tune": {"name": "ewc", "samples": 16}})
    merge.prepare(open_clip.CLIP(**SMALL))
    plain = build_method({"name": "merge"})
    plain.prepare(open_clip.CLIP(**SMALL))
    assert merge.cost(1e6, 8)[1] == 2e6 + plain.cost(1e6, 8)[1]


def test_galore_pays_for_its_singular_vectors_once_in_a_while():
    costs = []
    for gap in (1, 100):
        method = build_method({"name": "galore", "rank": 4, "gap": gap})
        method.prepare(torch.nn.Linear(30, 10))
        costs.append(method.cost(1.0, 8)[0])
    assert costs == [6 * 30 * 10**2 + 20 * 10**3, pytest.approx((6 * 30 * 10**2 + 20 * 10**3) / 100)]


def test_a_method_that_looks_at_values_is_named(monkeypatch):
    class Looking(Method):
        def penalty(self, model, batch, features):
            return 1.0 if features.logit_scale.item() > 1 else 0.0

    monkeypatch.setitem(METHODS, "looking", Looking)
    with pytest.raises(UserError, match=r"method\.name: what looking costs depends on the values of tensors"):
        count(training("looking"))


# --- steps ---


def test_work_buys_steps_after_what_an_update_costs_at_its_end():
    work = Work(gflops_per_step=10.0, gflops_per_update=100.0, peak_memory=1, multiplier=0.5)
    assert work.mafs_per_step == 5.0
    assert work.steps(1000.0, 4) == 40  # (1000 / 4 / 0.5 - 100) / 10
    assert work.minimum(4) == 220.0
    assert (work.steps(220.0, 4), work.steps(200.0, 4), work.steps(1.0, 4)) == (1, 0, 0)


def test_per_step_charges_the_fisher_at_every_step(small_scale):
    works = []
    for fisher in ("once", "per_step"):
        changes = ["method={name: ewc, samples: 36}", f"budget={{steps: 5, fisher: {fisher}}}"]
        works.append(work_of(load(None, scale=str(small_scale), overrides=changes)))
    once, per_step = works
    assert once.gflops_per_update == pytest.approx(3 * once.gflops_per_step)  # batches of 12
    assert (per_step.gflops_per_step, per_step.gflops_per_update) == (
        pytest.approx(4 * once.gflops_per_step),
        0,
    )


def test_finetuning_has_multiplier_one_and_auto_is_half_precision(small_scale):
    works = {}
    for precision in ("auto", "bf16", "fp16", "float32"):
        changes = [f"precision={precision}", "optimizer.batch_size=256"]
        works[precision] = work_of(load(None, scale=str(small_scale), overrides=changes))
    assert works["auto"] == works["bf16"] == works["fp16"]
    assert works["auto"].multiplier == works["float32"].multiplier == 1
    assert works["auto"].peak_memory < works["float32"].peak_memory


def test_what_was_counted_is_not_counted_again(small_scale, tmp_path, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path))
    recipe = load(None, scale=str(small_scale), overrides=["method={name: lora, rank: 3}"])
    work = work_of(recipe)

    def never(training):
        raise AssertionError("counted again")

    monkeypatch.setattr(fomo.budget.mafs, "count", never)
    assert work_of(recipe) == work
    other = dataclasses.replace(recipe, method={"name": "lora", "rank": 2})
    with pytest.raises(AssertionError, match="counted again"):
        counted_once(training_of(other))


def test_a_models_architecture_is_read_from_wherever_it_is(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL}))
    torch.save(open_clip.CLIP(**SMALL).state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    assert architecture(Model(pretrained=str(tmp_path))) == SMALL
    assert architecture(Model(name=f"local-dir:{tmp_path}")) == SMALL
    assert architecture(Model(name="ViT-B-32", pretrained="openai"))["quick_gelu"]
    with pytest.raises(UserError, match=r"ViT-B-61/openai: .*nearest: .*ViT-B-16"):
        architecture(Model(name="ViT-B-61", pretrained="openai"))


# --- the command ---


def test_json_has_the_promised_fields(small_scale):
    result = run("--scale", small_scale, "--methods", "lnfit,lora-4,ewc", "--updates", "2,3", "--json")
    table = json.loads(result.stdout)
    assert list(table) == ["scale", "batch_size", "total_gflops", "rows"]
    fields = ["method", "gflops_per_step", "peak_memory_gib", "memory_multiplier", "mafs_per_step", "steps"]
    assert all(list(row) == fields for row in table["rows"])
    assert [row["method"] for row in table["rows"]] == ["lnfit", "lora-4", "ewc"]
    finetuning = work_of(load(None, scale=str(small_scale)))
    assert table["total_gflops"] == 4 * 3 * finetuning.mafs_per_step  # T = 3 updates of 4 steps
    for row in table["rows"]:
        assert list(row["steps"]) == ["2", "3"]
        assert row["mafs_per_step"] == row["gflops_per_step"] * row["memory_multiplier"]
    assert table["rows"][0]["steps"]["3"] == round(
        table["total_gflops"] / 3 / table["rows"][0]["mafs_per_step"]
    )


def test_the_table_is_printed(small_scale):
    result = run("--scale", small_scale, "--methods", "finetune,lora-4", "--set", "budget={gflops: 1e4}")
    lines = result.stdout.splitlines()
    assert lines[0].endswith("10,000 GFLOPs in all, memory-adjusted; steps of an update, if there are T")
    assert "T=200" in lines[1] and "paper" not in lines[1]
    assert [line.split()[0] for line in lines[2:]] == ["finetune", "lora-4"]


def test_a_memory_table_replaces_what_it_names(small_scale, tmp_path):
    table = tmp_path / "memory.csv"
    table.write_text("method,peak_gib\nfinetune,2\nlnfit,0.5\n")
    words = ["--scale", small_scale, "--methods", "lnfit,bitfit", "--json"]
    lnfit, bitfit = json.loads(run(*words, "--memory-table", table).stdout)["rows"]
    assert (lnfit["peak_memory_gib"], lnfit["memory_multiplier"]) == (0.5, 0.25)
    counted = json.loads(run(*words).stdout)["rows"][1]["peak_memory_gib"]
    assert (bitfit["peak_memory_gib"], bitfit["memory_multiplier"]) == (counted, round(counted / 2, 4))


MISTAKES = {
    "--methods": ["--methods", "lora"],
    "--updates": ["--updates", "20,0"],
    "--updates[0]": ["--updates", "a"],
    "budget.hours": ["--set", "budget={hours: 2}"],
    "--measure": ["--measure"],
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(named, small_scale):
    if named == "--measure" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = run("--scale", small_scale, "--methods", "finetune", *MISTAKES[named])
    assert result.exit_code == 2
    assert result.stdout == "" and named in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read"),
        ("", "method,peak_gib"),
        ("name,gb\nlora-4,3\n", "method,peak_gib"),
        ("method,peak_gib\nlora4,3\n", "line 2.method: unknown 'lora4'"),
        ("method,peak_gib\nlora-4,3\nlora-4,3\n", "line 3: lora-4 stands there twice"),
        ("method,peak_gib\nlora-4,much\n", "line 2.peak_gib"),
        ("method,peak_gib\nlora-4,-1\n", "line 2.peak_gib"),
        ("method,peak_gib\nlora-4\n", "line 2.peak_gib"),
    ],
)
def test_mistakes_in_a_memory_table_are_named(content, message, small_scale, tmp_path):
    table = tmp_path / "memory.csv"
    if content is not None:
        table.write_text(content)
    result = run("--scale", small_scale, "--methods", "finetune", "--memory-table", table)
    assert result.exit_code == 2
    assert f"--memory-table {table}" in result.stderr and message in result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_measured_peak_is_near_the_counted_one():
    words = "--scale b32 --set optimizer.batch_size=128 --methods finetune,lnfit --measure --json"
    for row in json.loads(run(*words.split()).stdout)["rows"]:
        assert row["measured_peak_gib"] == pytest.approx(row["peak_memory_gib"], rel=0.1)
