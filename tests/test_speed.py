"""The comparison with open_clip's loop: both sides see the same work, and the rows say what scripts rely on."""

import json
from dataclasses import replace

import pytest
import speed as bench
import torch
from click.testing import CliRunner
from PIL import Image
from small_runs import FORKS, serve

import fomo.clip
from fomo.clip import new
from fomo.errors import UserError

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def case(tmp_path):
    case = bench.Case("tiny", CONFIG, batch_size=6, steps=2, device="cpu", threads=1, workers=0)
    bench.write_pictures(case, None, tmp_path)
    return case


def turn(name, case, folder, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(folder / "cache"))
    return next(bench.SIDES[name](case, folder, torch.device("cpu")))


def test_both_sides_see_the_same_pictures_and_captions(case, tmp_path, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    clip = new(CONFIG, 0)
    source = bench.pictures_of(tmp_path)
    pairs = bench.Pairs(source, clip)
    assert len(pairs) == case.pictures == 18
    samples = bench.Samples(source, clip, 32, "pictures")
    for index in range(len(pairs)):
        picture, tokens = pairs[index]
        own = samples.caption(index, 0.0)
        assert picture.shape == (3, 32, 32) and tokens.shape == (77,)
        assert tokens[: len(own)].tolist() == own.tolist() and not tokens[len(own) :].any()
        assert (samples.pixels[index] == Image.open(tmp_path / f"{index}.jpg")).all()


def test_plain_gives_every_caption_the_whole_context_and_makes_no_cache(case, tmp_path, monkeypatch):
    lengths, encode_text = [], fomo.clip.encode_text

    def spied(model, tokens):
        lengths.append(tokens.shape[1])
        return encode_text(model, tokens)

    monkeypatch.setattr(fomo.clip, "encode_text", spied)
    turn("plain", case, tmp_path, monkeypatch)
    assert lengths == [77] * 3
    assert not list((tmp_path / "cache").glob("pixels/*"))
    turn("ours", case, tmp_path, monkeypatch)
    assert len(lengths) == 6 and max(lengths[3:]) < 40
    assert list((tmp_path / "cache").glob("pixels/*"))


def test_a_turn_counts_the_steps_after_the_warm_ones(case, tmp_path, monkeypatch):
    """With a clock that only moves by one second per batch asked for."""
    for name in bench.SIDES:
        now = [0.0]
        monkeypatch.setattr("fomo.runs.step_log.time.monotonic", lambda now=now: now[0])
        fetch = torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data

        def slow(self, now=now, fetch=fetch):
            data = fetch(self)
            now[0] += 1.0
            return data

        with monkeypatch.context() as patch:
            patch.setattr(torch.utils.data.dataloader._SingleProcessDataLoaderIter, "_next_data", slow)
            took = turn(name, case, tmp_path, monkeypatch)
        assert took.rate == pytest.approx(case.batch_size) and took.waited == pytest.approx(1.0)
        assert took.memory > 2**20


def test_the_clock_stops_before_worker_processes_are_ended(case, tmp_path, monkeypatch):
    workers, events = torch.utils.data.dataloader._MultiProcessingDataLoaderIter, []
    shutdown = workers._shutdown_workers
    monkeypatch.setattr(bench, "turn", lambda *_: events.append("stopped"))
    monkeypatch.setattr(workers, "_shutdown_workers", lambda self: events.append("ended") or shutdown(self))
    for name in bench.SIDES:
        events.clear()
        turn(name, replace(case, workers=1), tmp_path, monkeypatch)
        assert events[0] == "stopped" and "ended" in events


def test_the_peer_decays_matrices_only_as_open_clip_does():
    model = new(CONFIG, 0).model
    plain, rest = bench.peers_optimizer(model).param_groups
    assert plain["weight_decay"] == 0 and rest["weight_decay"] == 0.2
    assert len(plain["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert any(p is model.logit_scale for p in plain["params"])
    assert any(p is model.text_projection for p in rest["params"])


def test_the_ratio_is_the_median_of_the_turns_ratios(case):
    ours = [bench.Turn(rate, 0.1, 100) for rate in (10.0, 20.0, 60.0)]
    peer = [bench.Turn(rate, 0.2, 200) for rate in (10.0, 5.0, 20.0)]
    row = bench.row("train", case, ours, peer)
    assert row["ours"] == 20 and row["peer"] == 10 and row["ratio"] == 3 and row["ratios"] == [1, 4]
    assert row["data_wait"] == [0.1, 0.2] and row["peak_memory"] == [100, 200]


def test_the_command_prints_the_rows_that_scripts_rely_on(monkeypatch):
    small = bench.Case("tiny", CONFIG, batch_size=4, steps=1, device="cpu", threads=1, workers=0)
    monkeypatch.setattr(bench, "case_of", lambda model, *_: replace(small, model=model))
    serve()
    monkeypatch.setattr("multiprocessing.get_context", lambda kind: FORKS)  # quicker than `spawn`
    result = CliRunner().invoke(bench.main, ["--json", "--model", "tiny", "--turns", "1"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    (row,) = [row for row in rows if row["what"] == "train"]
    assert row["model"] == "tiny" and row["unit"] == "samples/s" and len(rows) == 2
    assert row["ratio"] == pytest.approx(row["ours"] / row["peer"]) and row["ours"] > 0
    assert "tiny" in bench.text({"rows": rows})


def test_a_model_that_is_no_plain_clip_is_refused():
    with pytest.raises(UserError, match="ViT-B-16-SigLIP: neither tiny nor a plain CLIP"):
        bench.case_of("ViT-B-16-SigLIP", None, None, "cpu", 0)
