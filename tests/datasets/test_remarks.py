"""Where a line helps there is one, with a number and a remedy: in `data check`, a dry run and an update."""

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image

from fomo.budget.dry_run import dry_run
from fomo.clip import new, save
from fomo.datasets.check import check
from fomo.datasets.datafile import read
from fomo.datasets.remarks import CODE, Reader, codes_among, glance, of_batches, reader_of
from fomo.datasets.understood import open_all
from fomo.load_recipe import load
from fomo.recipe import Model
from tests.datasets.inputs import draw, noise, samples, shard, table

VISION = {"image_size": 32, "patch_size": 16, "width": 16, "head_width": 8, "layers": 1}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
FOLDER = {"source": "folder", "holdout": 0.3}


def written(folder, **content):
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def lines(file, reader=None) -> list[str]:
    """What a glance says; `data check` looks at everything and says the same of a small set."""
    said = glance(read(file), reader or Reader(), open_all(read(file)))
    if reader is None:
        assert set(said) <= set(check(file).warnings)
    return said


@pytest.mark.parametrize(
    "name",
    [
        *("n02099601", "0", "17", "class_3", "Class 12", "label-7", "id5", "x00123"),
        *("1.0", "12.00", "0001_", "_0001", "-1", "#4", "(7)", "class 3.0"),
    ],
)
def test_codes_are_told_from_names(name):
    assert CODE.fullmatch(name)


@pytest.mark.parametrize(
    "name",
    [
        "747-400",
        "A380",
        "7 up",
        "cat",
        "class",
        "MP3 player",
        "id card",
        "n.a.",
        "R2D2",
        "3.5 mm jack",
        "2-0",
    ],
)
def test_names_with_digits_are_names(name):
    assert not CODE.fullmatch(name)


@pytest.mark.parametrize("form", ["c{}", "n{}", "s{:02d}", "Group_{}", "type {}"])
def test_names_that_only_number_the_classes_are_codes(form):
    for first in (0, 1):
        names = [form.format(i) for i in range(first, first + 10)]
        assert codes_among(names) == names
        assert codes_among([*names, "cat"]) == codes_among(names[::2]) == []


@pytest.mark.parametrize(
    "names", [["A300", "A310", "A320"], ["F1"], ["boeing 737", "boeing 747", "boeing 757"]]
)
def test_models_of_things_are_names(names):
    assert codes_among(names) == []


@pytest.mark.parametrize("label", ["0", "1.0", "0001_"])
def test_numeric_labels_are_told_whatever_they_stand_in(tmp_path, label):
    """Else a class is described as `a photo of a 0.`, and nobody has said so."""
    others = {"0": "1", "1.0": "2.0", "0001_": "0002_"}
    for n, name in enumerate((label, others[label]) * 3):
        draw(tmp_path / "pets" / name / f"{n}.png", noise(n))
    rows = [[f"pets/{name}/{n}.png", name] for n, name in enumerate((label, others[label]) * 3)]
    table(tmp_path / "pets.csv", [["filepath", "label"], *rows])
    shard(tmp_path / "a.tar", samples(4, cls=lambda n: str(n % 2)))
    (tmp_path / "classes.txt").write_text(f"{label}\n{others[label]}\n")
    columns = {"source": "csv", "caption": None, "concept": "label", "train": "pets.csv", "holdout": 0.3}
    folder, shards = {**FOLDER, "train": "pets"}, {"source": "webdataset", "train": "a.tar", "holdout": 0.3}
    for spec in (folder, columns, shards):
        said = lines(written(tmp_path, adaptation={"pets": spec}))
        (line,) = (line for line in said if "class names" in line)
        assert line.startswith("adaptation.pets: 2 of 2 class names are codes or numbers, first: ")


def test_numeric_labels_of_torchvision_are_told(real_data, tmp_path):
    mnist = {"source": "torchvision", "name": "MNIST", "root": str(real_data / "mnist")}
    data = read(written(tmp_path, adaptation={"mnist": mnist}))
    said = glance(data, Reader(), open_all(data))
    assert any("10 of 10 class names are codes or numbers, first: '0'" in line for line in said)


def test_pictures_of_floats_from_0_to_1_are_black_and_the_remark_says_so(tmp_path):
    """The oracle is open_clip's transform, which reads a picture by PIL's `convert("RGB")`."""
    levels = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for i, (scale, kind) in enumerate(
        ((1, np.float32), (65535, np.float32), (65535, np.uint16), (255, np.uint8))
    ):
        for n in range(3):
            draw(
                tmp_path / "pets" / "cat" / f"{i}{n}.tif", Image.fromarray((scale * levels + n).astype(kind))
            )
    black, white = (
        (np.asarray(Image.open(tmp_path / f"pets/cat/{n}0.tif").convert("RGB")) / 255) for n in (0, 1)
    )
    assert black.max() <= 1 / 255 and (white[1:] == 1).all()
    draw(tmp_path / "pets" / "dog" / "1.png", noise(1))
    said = lines(written(tmp_path, adaptation={"pets": {**FOLDER, "train": "pets"}}))
    deep = [line for line in said if "16 or 32 bits" in line]
    assert deep and all("white all above 255 and black all below 1" in line for line in deep)


def test_what_is_wrong_with_class_names(tmp_path):
    for name in ("n02099601", "dog", "Sea_lion", "sea lion"):
        for i in range(3):
            draw(tmp_path / "pets" / name / f"{i}.png", noise(i))
    codes, twins = lines(written(tmp_path, adaptation={"pets": {**FOLDER, "train": "pets"}}))
    assert codes.startswith("adaptation.pets: 1 of 4 class names are codes or numbers, first: 'n02099601'; ")
    assert twins.startswith("adaptation.pets: 2 of 4 class names differ from another only in case")


def test_names_without_pictures(tmp_path):
    shard(tmp_path / "a.tar", samples(4, cls=lambda n: str(n % 2)))
    (tmp_path / "classes.txt").write_text("cat\ndog\nyak\nemu\n")
    (line,) = lines(written(tmp_path, evaluation={"pets": {"source": "webdataset", "test": "a.tar"}}))
    assert line.startswith("evaluation.pets: 2 of 4 class names have no picture, first: 'yak'")


@pytest.mark.parametrize("context", [32, 64, 77])
def test_cut_captions_are_counted_by_the_models_tokens_and_context(context, tmp_path):
    """The oracle is open_clip's encoder: the tokens of the text, with the start and the end."""
    texts = [
        "a cat",
        "一只棕色的小狗在公园的草地上奔跑旁边有一个红色的球",
        "word " * 62,
        "word " * 63,
        "!" * 90,
        "x " * 900,
    ]
    encoder = open_clip.SimpleTokenizer()
    lengths = [len(encoder.encode(text.strip())) + 2 for text in texts]
    cut = [length for length in lengths if length > context]
    for i, text in enumerate(texts):
        draw(tmp_path / f"{i}.png", noise(i))
        (tmp_path / f"{i}.txt").write_text(text)
    file = written(tmp_path, evaluation={"shop": {"source": "folder", "test": ".", "task": "retrieval"}})
    (line,) = lines(file, Reader(tokenizer=open_clip.SimpleTokenizer(context_length=context)))
    longest = min(max(cut), 16 * context - 1 if max(cut) > 16 * context else max(cut))
    share = f"{len(cut)} of 6 captions ({len(cut) / 6:.1%})"
    assert line.startswith(
        f"evaluation.shop (test): {share} are longer than the {context} tokens that the model reads"
    )
    assert f"the longest has {longest};" in line


def test_texts_of_several_pictures(tmp_path):
    rows = [
        [f"{i}.png", text]
        for i, text in enumerate(["a red shoe", "a red shoe", "a hat", "a red shoe", "a bag"])
    ]
    for i in range(5):
        draw(tmp_path / f"{i}.png", noise(i))
    table(tmp_path / "shop.csv", [["filepath", "title"], *rows])
    (line,) = lines(written(tmp_path, pretraining=[{"source": "csv", "path": "shop.csv"}]))
    assert line.startswith("pretraining[0] (train): 3 of 5 captions belong to several pictures")
    assert "'a red shoe'" in line


def test_what_the_model_makes_of_the_data(tmp_path):
    draw(tmp_path / "a" / "cat" / "1.png")
    file = written(tmp_path, image_size=64, evaluation={})
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (side,) = lines(file, Reader(config))
    assert (
        f"{file}: image_size: 64 is the side of cached pictures, the model still sees 32 and not more" in side
    )
    coca, _ = lines(file, Reader({**config, "multimodal_cfg": {}}))[::-1]
    assert "is a CoCa" in coca and "captioner" in coca
    assert (
        "t5-none cannot be had"
        in lines(file, Reader({**config, "text_cfg": {"hf_tokenizer_name": "t5-none"}}, None))[1]
    )


def test_a_dry_run_and_an_update_say_it_by_the_models_own_context(small_scale, tmp_path, monkeypatch, capsys):
    clip = new({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, seed=0)
    save(clip, tmp_path / "m32")
    for i in range(6):
        draw(tmp_path / "photos" / f"{i}.png", noise(i) if i else noise(i).convert("RGBA"))
        (tmp_path / "photos" / f"{i}.txt").write_text(f"{i} " + "word " * (40 if i % 2 else 3))
    glass = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
    glass.save(tmp_path / "photos" / "0.png")
    shop = {"source": "folder", "train": "photos", "task": "retrieval", "holdout": 0.3}
    file = written(tmp_path, adaptation={"shop": shop})
    model = Model(pretrained=str(tmp_path / "m32"))
    assert reader_of(model).tokenizer.context_length == 32
    recipe = load(
        None,
        scale=str(small_scale),
        data=str(file),
        model=str(tmp_path / "m32"),
        overrides=["stream.updates=1"],
    )
    said = [f"warning: {line}" for line in glance(read(file), reader_of(model), open_all(read(file)))]
    assert any("longer than the 32 tokens" in line for line in said) and any(
        "transparent" in line for line in said
    )
    text = dry_run(recipe, "cpu")
    assert all(line in text.splitlines() for line in said)
    from fomo.update import run_recipe

    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    error = capsys.readouterr().err
    assert all(error.count(line) == 1 for line in said)
    assert torch.is_tensor(clip.model.logit_scale)


def test_a_batch_that_is_larger_than_what_there_is_to_learn(small_scale, tmp_path, capsys):
    """Of three pools with a share each, and of a run in which all of a batch is the update's."""
    draws = [("pretraining", 169, 5000), ("update", 174, 12), ("buffer", 169, 100), ("update", 174, 87)]
    update, buffer = of_batches(512, draws)
    assert update.startswith(
        "a batch of 512 holds 174 pairs of the update's 12 pictures: each about 14 times; "
    )
    assert buffer.startswith(
        "a batch of 512 holds 169 pairs of the buffer's 100 pictures: each about 1.7 times"
    )
    assert of_batches(512, [("update", 174, 174), ("buffer", 0, 0)]) == []
    for i in range(20):
        draw(tmp_path / "photos" / "ab"[i % 2] / f"{i}.png", noise(i))
    file = written(tmp_path, adaptation={"pets": {"source": "folder", "train": "photos", "holdout": 0.3}})
    settings = ["stream.updates=1", "optimizer.batch_size=64", "budget.steps=1"]
    recipe = load(None, scale=str(small_scale), data=str(file), overrides=settings)
    train = len(read(file).adaptation["pets"].open("train"))
    line = f"warning: a batch of 64 holds 64 pairs of the update's {train} pictures: each about "
    line += f"{64 / train:.1f} times"
    assert sum(said.startswith(line) for said in dry_run(recipe, "cpu").splitlines()) == 1
    from fomo.update import run_recipe

    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    assert capsys.readouterr().err.count(line) == 1
