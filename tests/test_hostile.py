"""Hostile and extreme input: nothing is executed or written elsewhere, and a life goes on or says why not."""

import io
import json
import os
import pickle
import runpy
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import fomo.train
from fomo.clip import contrastive_loss
from fomo.clip import load as load_model
from fomo.datasets.cache import decode
from fomo.datasets.datafile import read
from fomo.datasets.infer import as_data_file
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.tables import Table
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import Failure, UserError
from fomo.load_recipe import load
from fomo.update import run_recipe

ROOT = Path(__file__).parents[1]


def invoke(*arguments):
    cli = runpy.run_path(str(ROOT / "fomo.py"))["cli"]
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def class_folders(root: Path, names: list[str], each: int) -> Path:
    for c, name in enumerate(names):
        for n in range(each):
            picture(root / name / f"{n}.png", 1000 * c + n)
    return root


def lives(scale: Path, folder: Path, content: dict, *overrides: str) -> list[dict]:
    """One update on a data file -> the lines of metrics.jsonl."""
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    said = ["stream.updates=1", "evaluation.frozen=false", *overrides]
    recipe = load(None, scale=str(scale), data=str(folder / "data.yaml"), overrides=said)
    run_recipe(recipe, folder / "run", resume=False, device="cpu")
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def hostile_files(folder: Path, ran: Path) -> dict[str, bytes]:
    """The same trap in every way that a checkpoint is pickled."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": Touch(ran)}, zipped)
    torch.save({"state_dict": Touch(ran)}, legacy, _use_new_zipfile_serialization=False)
    bare = pickle.dumps({"w": Touch(ran)})
    return {
        "zip.pt": zipped.getvalue(),
        "legacy.pth": legacy.getvalue(),
        "bare.bin": bare,
        "posing.safetensors": bare,
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["zip.pt", "legacy.pth", "bare.bin", "posing.safetensors"])
def test_a_pickle_that_would_run_code_is_refused_wherever_a_checkpoint_may_stand(tmp_path, small_scale, name):
    ran, path = tmp_path / "ran", tmp_path / name
    content = hostile_files(tmp_path, ran)[name]
    if name == "zip.pt":  # the trap works
        torch.load(io.BytesIO(content), weights_only=False)
        assert ran.exists()
        ran.unlink()
    path.write_bytes(content)
    save_file({"w": torch.zeros(2)}, tmp_path / "fine.safetensors")
    model = tmp_path / "model"
    model.mkdir()
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {}}))
    (model / f"open_clip_{'model.safetensors' if name.endswith('s') else 'pytorch_model.bin'}").write_bytes(
        content
    )
    for call in (lambda: load_model(None, str(path)), lambda: load_model("ViT-B-32", str(path))):
        with pytest.raises(UserError):
            call()
    data = small_scale.parent / "data.yaml"
    merged, out = tmp_path / "out.safetensors", tmp_path / "run"
    commands = [
        ("merge", "--rule", "interpolate", path, tmp_path / "fine.safetensors", "-o", merged),
        ("merge", "--rule", "task_arithmetic", "--base", path, tmp_path / "fine.safetensors", "-o", merged),
        ("merge", "--rule", "interpolate", model, model, "-o", merged),
        ("update", "--scale", small_scale, "--model", path, "--out", out),
        ("eval", "--scale", small_scale, "--data", data, "--model", model),
    ]
    for command in commands:
        done = invoke(*command)
        assert done.exit_code == 2 and "Traceback" not in done.output, done.output
        assert len(done.stderr.strip().splitlines()) == 1 and not ran.exists()
    assert not merged.exists()


def test_a_checkpoint_of_a_run_that_was_exchanged_for_a_pickle_is_not_run(tmp_path, small_scale):
    """Even where its name carries the right hash."""
    from fomo.runs.folder import file_hash

    recipe = load(None, scale=str(small_scale), overrides=["stream.updates=1"])
    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    ran, state = tmp_path / "ran", tmp_path / "run/state"
    newest = max(state.glob("*.pt"))
    newest.write_bytes(hostile_files(tmp_path, ran)["zip.pt"])
    newest.rename(newest.with_name(f"000099-{file_hash(newest)}.pt"))
    with pytest.raises((UserError, Failure, pickle.UnpicklingError)):
        run_recipe(recipe, tmp_path / "run", resume=True, device="cpu")
    assert not ran.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path"]
)
def test_tags_of_python_in_any_yaml_are_refused(tmp_path, small_scale, tag):
    ran, path = tmp_path / "ran", tmp_path / "it.yaml"
    path.write_text(f"data: {tag} [!!python/object/apply:pathlib.Path ['{ran}']]\n")
    for call in (
        lambda: load(path, scale=str(small_scale)),
        lambda: load(None, scale=str(path)),
        lambda: load(None, scale=str(small_scale), overrides=[path.read_text().replace(": ", "=", 1)]),
        lambda: read(path),
    ):
        with pytest.raises(UserError) as caught:
            call()
        assert "YAML" in str(caught.value) and not ran.exists()


def test_a_shards_members_are_never_written_whatever_they_are(tmp_path, monkeypatch):
    """Links, devices, long and odd names (climbing and absolute ones: tests/datasets/test_sources.py)."""
    content = io.BytesIO()
    Image.new("RGB", (8, 6)).save(content, "PNG")
    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        kinds = {
            tarfile.SYMTYPE: "/etc/hostname",
            tarfile.LNKTYPE: "../../x",
            tarfile.FIFOTYPE: "",
            tarfile.CHRTYPE: "",
        }
        for i, (kind, link) in enumerate(kinds.items()):
            info = tarfile.TarInfo(f"{i}.png")
            info.type, info.linkname = kind, link
            tar.addfile(info)
        for name in ("../../out/a\nb.png", "/tmp/" + 300 * "x" + ".png", "é🎈+++.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content.getvalue())
            tar.addfile(info, io.BytesIO(content.getvalue()))
    before = set(tmp_path.rglob("*"))
    source = Webdataset(str(tmp_path / "a.tar"))
    assert len(source) == 3 and all(decode(source, 8, i)[1] is None for i in range(3))
    assert set(tmp_path.rglob("*")) == before and not list(Path("/tmp").glob("xxx*"))
    assert not (tmp_path.parents[1] / "out").exists()


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_a_decompression_bomb_is_an_unreadable_picture(tmp_path):
    class_folders(tmp_path, ["a"], 1)
    (tmp_path / "a" / "bomb.png").write_bytes(bomb())
    source = Folder(str(tmp_path))
    problems = [decode(source, 8, i)[1] for i in range(2)]
    assert problems[0] is None and "bomb.png" in problems[1] and "decompression bomb" in problems[1]


def test_links_to_pictures_are_pictures_and_links_to_folders_lead_nowhere_below_a_class(tmp_path):
    """People make class folders of links. Nothing is written through one, and a circle of them ends."""
    outside = class_folders(tmp_path / "outside", ["x"], 3)
    photos = class_folders(tmp_path / "photos", ["cat"], 2)
    os.symlink(outside / "x" / "0.png", photos / "cat" / "link.png")
    os.symlink(tmp_path / "gone.png", photos / "cat" / "dangling.png")
    os.symlink("/etc/passwd", photos / "cat" / "passwd.png")
    os.symlink(outside, photos / "cat" / "more")
    os.symlink(photos, photos / "cat" / "circle")
    os.symlink(outside / "x", photos / "dog")
    source = Folder(str(photos))
    names = [Path(source.name_of(i)).name for i in range(len(source))]
    assert names == ["0.png", "1.png", "link.png", "passwd.png", "0.png", "1.png", "2.png"]
    assert source.classes == ["cat", "dog"]
    assert [names[i] for i in range(7) if decode(source, 8, i)[1]] == ["passwd.png"]


NAMES = [
    "c+++d",
    "emoji 🎈",
    "a\nb",
    "{}",
    "$HOME",
    "<b>&amp;",
    "naïve",
    ".hidden"[1:],
    "%s",
    "x" * 200,
    " padded ",
]


def test_class_names_of_every_kind_live_through_an_update_and_its_report(tmp_path, small_scale, capsys):
    photos = class_folders(tmp_path / "photos", NAMES, 12)
    file = as_data_file(photos, tmp_path / "own")
    lines = lives(small_scale, tmp_path, yaml.safe_load(file.read_text()))
    assert [line["update"] for line in lines] == [0, 1]
    assert set(read(file).adaptation["photos"].open("train").classes) == {n.strip() for n in NAMES}
    page = (tmp_path / "run/report.html").read_text()
    assert "<b>&amp;" not in page.replace("&lt;b&gt;&amp;amp;", "")


def test_class_names_of_labels_may_hold_slashes_and_a_stream_file_keeps_them(tmp_path, small_scale):
    rows = ["filepath,kind", *(f"{i}.png,{('a/b', '../c', '/d', 'e+++f')[i % 4]}" for i in range(40))]
    for i in range(40):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "shop.csv").write_text("\n".join(rows))
    entry = {"source": "csv", "train": "shop.csv", "caption": None, "concept": "kind", "holdout": 0.2}
    lines = lives(small_scale, tmp_path, {"adaptation": {"a/b": entry}})
    assert lines[-1]["datasets"].keys() == {"a/b"}
    said = ["--updates", 2, "--data", tmp_path / "data.yaml", "--scale", small_scale]
    for order, out in (("random", "order.json"), (tmp_path / "order.json", "again.json")):
        done = invoke("stream", "--order", order, *said, "-o", tmp_path / out)
        assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "again.json").read_text())
    assert written == json.loads((tmp_path / "order.json").read_text())
    assert set(written) == {"a/b+++a/b", "a/b+++../c", "a/b+++/d", "a/b+++e+++f"}


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="only there may names of files be any bytes")
def test_a_folder_whose_name_is_no_text_is_one_clear_mistake(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/photos/caf\xe9")
    picture(tmp_path / "1.png")
    os.rename(tmp_path / "1.png", os.fsencode(tmp_path) + b"/photos/caf\xe9/1.png")
    with pytest.raises(UserError, match=r"not UTF-8: caf\\udce9") as caught:
        as_data_file(tmp_path / "photos", tmp_path / "run")
    assert str(caught.value).isprintable()


def test_captions_beyond_ascii_and_of_10_000_characters_are_learnt(tmp_path, small_scale):
    texts = ["猫の写真", "naïve café 🎈", "кошка", "word " * 2000, "字" * 10_000, "a\u202eb\x07c"]
    for i in range(24):
        picture(tmp_path / "photos" / f"{i:02d}.png", i)
        (tmp_path / "photos" / f"{i:02d}.txt").write_text(texts[i % 6], encoding="utf-8")
    file = as_data_file(tmp_path / "photos", tmp_path / "own")
    lines = lives(small_scale, tmp_path, yaml.safe_load(file.read_text()))
    assert lines[-1]["update"] == 1 and 0 <= lines[-1]["datasets"]["photos"] <= 100


@pytest.mark.parametrize(("share", "refused"), [(0.005, False), (0.05, True)])
@pytest.mark.parametrize("keep", ["always", "never"])
def test_corrupt_pictures_are_skipped_and_named_up_to_one_percent(
    tmp_path, small_scale, capsys, share, refused, keep
):
    photos = class_folders(tmp_path / "photos", ["cat", "dog"], 200)
    broken = [photos / "cat" / f"{n}.png" for n in range(round(400 * share))]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    content = {"cache": keep, "adaptation": {"photos": {"source": "folder", "train": str(photos)}}}
    content["evaluation"] = {"shapes": {"source": "world", "domain": "shapes", "test": 2}}
    overrides = ["budget.steps=120", "mixture={update: 1, pretraining: 0, buffer: 0}"]
    if refused:
        with pytest.raises(UserError, match=r"pictures cannot be read.*limit of 1%"):
            lives(small_scale, tmp_path, content, *overrides)
        return
    assert lives(small_scale, tmp_path, content, *overrides)[-1]["update"] == 1
    told = capsys.readouterr().err
    assert "photos: 2 of 400 pictures cannot be read, first: " in told or keep == "never"
    assert str(photos / "cat") in told


def small(folder: Path, classes: int, each: int) -> dict:
    photos = class_folders(folder / "photos", [f"kind {c}" for c in range(classes)], each)
    test = {"source": "world", "domain": "shapes", "test": 2}
    return {
        "adaptation": {"photos": {"source": "folder", "train": str(photos)}},
        "evaluation": {"shapes": test},
    }


@pytest.mark.parametrize(("classes", "each"), [(1, 30), (1, 1), (2, 2), (3, 1)])
def test_one_concept_one_sample_and_batches_larger_than_the_pool_are_updates(
    tmp_path, small_scale, classes, each
):
    lines = lives(small_scale, tmp_path, small(tmp_path, classes, each), "optimizer.batch_size=16")
    assert [line["update"] for line in lines] == [0, 1]
    weights = load_file(tmp_path / "run/weights/update_001.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_an_update_without_a_picture_is_refused_before_anything_is_written(tmp_path, small_scale):
    empty = {"adaptation": {}, "evaluation": {"shapes": {"source": "world", "domain": "shapes", "test": 2}}}
    with pytest.raises(UserError, match="there is nothing to learn"):
        lives(small_scale, tmp_path, empty)
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}


def test_a_loss_that_is_no_number_names_update_and_step_and_the_last_good_weights_stay(
    tmp_path, small_scale, monkeypatch
):
    calls = 0

    def poisoned(features):
        nonlocal calls
        calls += 1
        return contrastive_loss(features) * (float("inf") if calls == 6 else 1)

    recipe = load(None, scale=str(small_scale), overrides=["evaluation.frozen=false"])
    run_recipe(recipe, tmp_path / "first", resume=False, device="cpu")  # the base model is made
    monkeypatch.setattr(fomo.train, "contrastive_loss", poisoned)
    with pytest.raises(Failure, match=r"update 2, step 1: the loss is (inf|nan)") as caught:
        run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    assert str(tmp_path / "run") in str(caught.value)
    for name in ("weights/update_001.safetensors", "model/open_clip_model.safetensors"):
        kept, good = (
            load_file(tmp_path / "run" / name),
            load_file(tmp_path / "first/weights/update_001.safetensors"),
        )
        assert all(torch.equal(kept[n], good[n]) for n in good)
    assert not (tmp_path / "run/weights/update_002.safetensors").exists()
    monkeypatch.setattr(fomo.train, "contrastive_loss", contrastive_loss)
    run_recipe(recipe, tmp_path / "run", resume=True, device="cpu")
    ends = [load_file(tmp_path / run / "weights/update_003.safetensors") for run in ("first", "run")]
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_a_table_with_paths_that_are_no_paths_is_read_and_its_pictures_are_broken(tmp_path):
    (tmp_path / "a.csv").write_text(
        "filepath,title\n/dev/null,a\n../../etc/passwd,b\n" + "x" * 5000 + ",c\na\0b,d\n"
    )
    try:
        source = Table(str(tmp_path / "a.csv"))
    except UserError as error:  # Python before 3.11 has no null characters in tables
        assert "not a readable table" in str(error)
        return
    assert source.key() and all(decode(source, 8, i)[1] for i in range(4))
