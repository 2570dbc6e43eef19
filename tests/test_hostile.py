"""Hostile and extreme input: nothing is executed or written elsewhere, and a run goes on or says why not."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from open_clip.transform import PreprocessCfg
from PIL import Image
from safetensors.torch import save_file
from small_runs import class_folders, invoke, picture, recipe_of, run, weights_of

from fomo import torchscript
from fomo.checkpoint_files import open_checkpoint
from fomo.clip import load as load_model
from fomo.datasets.cache import decode
from fomo.datasets.datafile import read
from fomo.datasets.infer import as_data_file
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.tables import Table
from fomo.datasets.sources.webdataset import Webdataset
from fomo.errors import UserError
from fomo.load_recipe import load


def updated(scale: Path, folder: Path, content: dict, *overrides: str) -> list[dict]:
    """One update on a data file -> the lines of metrics.jsonl."""
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    settings = ["stream.updates=1", "evaluation.frozen=false", *overrides]
    return run(recipe_of(scale, *settings, data=folder / "data.yaml"), folder / "run")


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def trap(name: str, ran: Path) -> bytes:
    """A checkpoint that makes a file, pickled in one of the ways that there are."""
    file = io.BytesIO()
    if name == "zip.pt":
        torch.save({"state_dict": Touch(ran)}, file)
    elif name == "script.pt":
        return archive_of(pickle.dumps(Touch(ran)))
    elif name == "legacy.pth":
        torch.save({"state_dict": Touch(ran)}, file, _use_new_zipfile_serialization=False)
    else:
        pickle.dump({"w": Touch(ran)}, file)
    return file.getvalue()


def archive_of(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """A TorchScript archive with this tree of modules."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "constants.pkl": b"", "code/x.py": b"", **records}.items():
            archive.writestr(f"a/{name}", content)
        archive.writestr("a/version", "3")
    return file.getvalue()


class Named:
    """Pickled as an object of a class of the archive's program, with these attributes."""

    def __init__(self, **attributes):
        self.__dict__ = attributes


class Tensors(pickle.Pickler):
    """As torch pickles: a storage by its name."""

    def persistent_id(self, value):
        return value if isinstance(value, tuple) and value[:1] == ("storage",) else None

    def reducer_override(self, value):
        if isinstance(value, Stride):
            rebuilt = (("storage", torch.FloatStorage, "0", "cpu", 2), value.offset, value.size, value.stride)
            return torch._utils._rebuild_tensor_v2, (*rebuilt, False, {})
        return NotImplemented


@dataclass
class Stride:
    """A tensor of storage 0, which has two numbers."""

    offset: int
    size: tuple
    stride: tuple


def tree(**attributes) -> bytes:
    file = io.BytesIO()
    Tensors(file, 2).dump(Named(**attributes))
    return file.getvalue()


TWO = {"data/0": b"\0\0\x80?\0\0\0@"}  # 1, 2


def test_an_honest_archive_is_read(tmp_path):
    (tmp_path / "a.pt").write_bytes(
        archive_of(tree(w=Stride(1, (1,), (1,)), inner=Named(b=Stride(0, (2,), (1,)))), **TWO)
    )
    found = {name: tensor.tolist() for name, tensor in open_checkpoint(tmp_path / "a.pt").items()}
    assert found == {"w": [2.0], "inner.b": [1.0, 2.0]}


def endless(levels: int) -> Named:
    """2 ** levels modules, of which so many are stored."""
    module = Named(w=Stride(0, (2,), (1,)))
    for _ in range(levels):
        module = Named(a=module, b=module)
    return module


def circle() -> Named:
    module = Named()
    module.inner = module
    return module


OUTSIDE = {
    "beyond its storage": (tree(w=Stride(0, (3,), (1,))), {}, TWO),
    "before its storage": (tree(w=Stride(-1, (2,), (1,))), {}, TWO),
    "with a stride out of it": (tree(w=Stride(0, (2, 2), (2, 1))), {}, TWO),
    "endless modules": (tree(m=endless(60)), {}, TWO),
    "a circle of modules": (tree(m=circle()), {}, TWO),
    "a bomb": (tree(w=Stride(0, (2,), (1,))), {"compression": zipfile.ZIP_DEFLATED}, {"data/0": bytes(10**7)}),
    "no module": (pickle.dumps([1]), {}, {}),
    "an attribute of a stand-in": (b"\x80\x02c__torch__ M\n}X\x01\x00\x00\x00aK\x01sb.", {}, {}),
    "cut": (tree(w=Stride(0, (2,), (1,)))[:-5], {}, TWO),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_archive_that_reaches_outside_or_goes_on_for_ever_is_one_line(case, tmp_path):
    pickled, how, records = OUTSIDE[case]
    (tmp_path / "a.pt").write_bytes(archive_of(pickled, **how, **records))
    before = {name: vars(torchscript)[name].__dict__.copy() for name in ("Anything", "Stored")}
    with pytest.raises(UserError) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert "a.pt: " in str(caught.value) and len(str(caught.value)) < 400
    assert before == {name: vars(torchscript)[name].__dict__.copy() for name in before}


def test_a_tensor_that_repeats_one_number_is_no_larger_than_its_storage(tmp_path):
    (tmp_path / "a.pt").write_bytes(archive_of(tree(w=Stride(0, (10**12,), (0,))), **TWO))
    assert open_checkpoint(tmp_path / "a.pt")["w"].shape == (10**12,)
    with pytest.raises(UserError, match="fits no architecture"):
        load_model(None, str(tmp_path / "a.pt"))


@pytest.mark.parametrize("where", ["open_clip", "transformers"])
def test_a_tokenizer_that_brings_a_program_is_not_run(where, tmp_path):
    """Even where the configuration says that it may be trusted."""
    transformers = pytest.importorskip("transformers")
    model, ran = tmp_path / "model", tmp_path / "ran"
    model.mkdir()
    (model / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    said = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(said))
    text = {"width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "x/y",
            "tokenizer_kwargs": {"trust_remote_code": True}}  # fmt: skip
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    file = "open_clip_config.json"
    if where == "transformers":
        file, config = "config.json", {"model_type": "clip", "auto_map": {"AutoModel": "evil.Evil"}}
    (model / file).write_text(json.dumps(config))
    save_file({"w": torch.zeros(2)}, model / "model.safetensors")
    data = tmp_path / "data.yaml"
    data.write_text("adaptation:\n  icons: {source: world, domain: icons, train: 6, test: 4}\n")
    for command in (("eval",), ("update", "--dry-run"), ("update", "--out", tmp_path / "run")):
        done = invoke(*command, "--model", model, "--data", data)
        assert done.exit_code == 2 and not ran.exists(), done.output
    with pytest.raises(UserError):
        load_model(None, str(model))
    assert not ran.exists()
    with pytest.raises(Exception, match="Evil"):  # the trap works: its class has nothing that a tokenizer has
        transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    assert ran.exists()


def test_the_trap_works(tmp_path):
    torch.load(io.BytesIO(trap("zip.pt", tmp_path / "ran")), weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["zip.pt", "legacy.pth", "bare.bin", "posing.safetensors", "script.pt"])
def test_a_pickle_that_would_run_code_is_refused_wherever_a_checkpoint_may_stand(tmp_path, small_scale, name):
    ran, path, model = tmp_path / "ran", tmp_path / name, tmp_path / "model"
    path.write_bytes(trap(name, ran))
    fine, merged = tmp_path / "fine.safetensors", tmp_path / "out.safetensors"
    save_file({"w": torch.zeros(2)}, fine)
    model.mkdir()
    (model / "open_clip_config.json").write_text(json.dumps({"model_cfg": {}, "preprocess_cfg": {}}))
    weights = "open_clip_model.safetensors" if name.endswith("s") else "open_clip_pytorch_model.bin"
    shutil.copy(path, model / weights)
    for architecture in (None, "ViT-B-32"):
        with pytest.raises(UserError):
            load_model(architecture, str(path))
    for command in (
        ("merge", "--rule", "interpolate", path, fine, "-o", merged),
        ("merge", "--rule", "task_arithmetic", "--base", path, fine, "-o", merged),
        ("merge", "--rule", "interpolate", model, model, "-o", merged),
        ("update", "--scale", small_scale, "--model", path, "--out", tmp_path / "run"),
        ("eval", "--scale", small_scale, "--data", small_scale.parent / "data.yaml", "--model", model),
    ):
        done = invoke(*command)
        assert done.exit_code == 2 and "Traceback" not in done.output, done.output
        assert len(done.stderr.strip().splitlines()) == 1 and not ran.exists()
    assert not merged.exists()


def test_a_checkpoint_of_a_run_that_was_exchanged_for_a_pickle_is_not_run(tmp_path, small_scale):
    """Even where its name carries the right hash."""
    recipe = recipe_of(small_scale, "stream.updates=1", "budget.steps=1", "evaluation.frozen=false")
    run(recipe, tmp_path / "run")
    content = trap("zip.pt", tmp_path / "ran")
    newest = max((tmp_path / "run/state").glob("0*.pt"))
    newest.write_bytes(content)
    newest.rename(newest.with_name(f"000099-{hashlib.sha256(content).hexdigest()[:16]}.pt"))
    with pytest.raises(UserError):
        run(recipe, tmp_path / "run", resume=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:pathlib.Path.touch", "!!python/object/new:pathlib.Path"]
)
def test_tags_of_python_in_any_yaml_are_refused(tmp_path, small_scale, tag):
    ran, path = tmp_path / "ran", tmp_path / "it.yaml"
    path.write_text(f"data: {tag} [!!python/object/apply:pathlib.Path ['{ran}']]\n")
    for call in (
        lambda: load(path, scale=str(small_scale)),
        lambda: recipe_of(path),
        lambda: recipe_of(small_scale, path.read_text().replace(": ", "=", 1)),
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
    assert len(source) == 3 and all(decode(source, PreprocessCfg(size=8), i)[1] is None for i in range(3))
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
    problems = [decode(source, PreprocessCfg(size=8), i)[1] for i in range(2)]
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
    assert [names[i] for i in range(7) if decode(source, PreprocessCfg(size=8), i)[1]] == ["passwd.png"]


NAMES = ["c+++d", "emoji 🎈", "a\nb", "{}", "$HOME", "<b>&amp;", "naïve", "%s", "x" * 200, " padded "]


def test_class_names_of_every_kind_pass_through_an_update_and_its_report(tmp_path, small_scale):
    photos = class_folders(tmp_path / "photos", NAMES, 12)
    file = as_data_file(photos, tmp_path / "own")
    scored = updated(small_scale, tmp_path, yaml.safe_load(file.read_text()))
    assert [line["update"] for line in scored] == [0, 1]
    assert set(read(file).adaptation["photos"].open("train").classes) == {n.strip() for n in NAMES}
    done = invoke("report", tmp_path / "run")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run/report.html").read_text()
    assert "<b>&amp;" not in page.replace("&lt;b&gt;&amp;amp;", "")


def test_class_names_of_labels_may_hold_slashes_and_a_stream_file_keeps_them(tmp_path, small_scale):
    rows = ["filepath,kind", *(f"{i}.png,{('a/b', '../c', '/d', 'e+++f')[i % 4]}" for i in range(40))]
    for i in range(40):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "shop.csv").write_text("\n".join(rows))
    entry = {"source": "csv", "train": "shop.csv", "caption": None, "concept": "kind", "holdout": 0.2}
    scored = updated(small_scale, tmp_path, {"adaptation": {"a/b": entry}})
    assert scored[-1]["datasets"].keys() == {"a/b"}
    settings = ["--updates", 2, "--data", tmp_path / "data.yaml", "--scale", small_scale]
    for order, out in (("random", "order.json"), (tmp_path / "order.json", "again.json")):
        done = invoke("stream", "--order", order, *settings, "-o", tmp_path / out)
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
    last = updated(small_scale, tmp_path, yaml.safe_load(file.read_text()))[-1]
    assert last["update"] == 1 and 0 <= last["datasets"]["photos"] <= 100


EVALUATION = {"shapes": {"source": "world", "domain": "shapes", "test": 2}}


def of_photos(photos: Path, **more: str) -> dict:
    entry = {"source": "folder", "train": str(photos)}
    return {"adaptation": {"photos": entry}, "evaluation": EVALUATION, **more}


@pytest.mark.parametrize(("broken", "refused"), [(1, False), (20, True)])
@pytest.mark.parametrize("cache", ["always", "never"])
def test_corrupt_pictures_are_skipped_and_named_up_to_one_percent(
    tmp_path, small_scale, capsys, broken, refused, cache
):
    photos = class_folders(tmp_path / "photos", ["cat", "dog"], 100)
    for path in sorted((photos / "cat").iterdir())[:broken]:
        path.write_bytes(path.read_bytes()[:60])
    overrides = ["budget.steps=60", "mixture={update: 1, pretraining: 0, buffer: 0}"]
    if refused:
        with pytest.raises(UserError, match=r"pictures cannot be read.*limit of 1%"):
            updated(small_scale, tmp_path, of_photos(photos, cache=cache), *overrides)
        return
    assert updated(small_scale, tmp_path, of_photos(photos, cache=cache), *overrides)[-1]["update"] == 1
    told = capsys.readouterr().err
    assert re.search(r"photos: 1 of \d+ pictures cannot be read, first: ", told) or cache == "never"
    assert str(photos / "cat/0.png") in told


@pytest.mark.parametrize(("classes", "each"), [(1, 30), (1, 2), (2, 2), (3, 2)])
def test_one_concept_one_sample_and_batches_larger_than_the_pool_are_updates(
    tmp_path, small_scale, classes, each
):
    photos = class_folders(tmp_path / "photos", [f"kind {c}" for c in range(classes)], each)
    content = of_photos(photos)
    content["adaptation"]["photos"]["one_class"] = classes == 1
    scored = updated(small_scale, tmp_path, content, "optimizer.batch_size=16")
    assert [line["update"] for line in scored] == [0, 1]
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run", 1).values())


def test_an_update_without_a_picture_is_refused_before_anything_is_written(tmp_path, small_scale):
    with pytest.raises(UserError, match="adaptation"):
        updated(small_scale, tmp_path, {"adaptation": {}, "evaluation": EVALUATION})
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"lock"}


def test_a_table_with_paths_that_are_no_paths_is_read_and_its_pictures_are_broken(tmp_path):
    (tmp_path / "a.csv").write_text(
        "filepath,title\n/dev/null,a\n../../etc/passwd,b\n" + "x" * 5000 + ",c\na\0b,d\n"
    )
    try:
        source = Table(str(tmp_path / "a.csv"))
    except UserError as error:  # Python before 3.11 has no null characters in tables
        assert "not a readable table" in str(error)
        return
    assert source.key() and all(decode(source, PreprocessCfg(size=8), i)[1] for i in range(4))
