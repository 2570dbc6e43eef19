"""Folders and files as people have them, and what is understood of each: the table of docs/data.md.

python -m tests.datasets.layouts        # print the table
"""

import io
import json
import sys
import tempfile
import zlib
from contextlib import redirect_stderr
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fomo.datasets.datafile import read
from fomo.datasets.infer import as_data_file
from fomo.datasets.understood import opened_and_said
from fomo.errors import UserError
from tests.datasets.inputs import encoded, noise, packed, samples, write

Files = dict[str, str | bytes]


def picture(name: str) -> bytes:
    """Of its own for each name."""
    return encoded(noise(zlib.crc32(name.encode()), 10, 8))


def pictures(*names: str) -> Files:
    return {name: picture(name) for name in names}


def folders(*names: str, count: int = 4, suffix: str = ".jpg") -> Files:
    return pictures(*(f"{name}/{i}{suffix}" for name in names for i in range(count)))


def flat(folder: str = "", count: int = 12, first: int = 0, suffix: str = ".jpg") -> Files:
    return pictures(*(f"{folder}{i:02d}{suffix}" for i in range(first, first + count)))


def rows(*columns: str, count: int = 12, separator: str = ",", first: int = 0) -> str:
    """columns: `{i}` stands for the number of a row, `{k}` for cat or dog."""
    numbers = range(first, first + count)
    return "".join(
        separator.join(column.format(i=i, k=("cat", "dog")[i % 2], n=i % 2) for column in columns) + "\n"
        for i in numbers
    )


def table(header: str, *columns: str, **how) -> str:
    return header.replace(",", how.get("separator", ",")) + "\n" + rows(*columns, **how)


def lines(**fields) -> str:
    """JSON lines of 12 rows."""
    texts = (
        {key: value.format(i=i, k=("cat", "dog")[i % 2]) for key, value in fields.items()} for i in range(12)
    )
    return "\n".join(map(json.dumps, texts))


def coco(first: int, count: int, **annotation) -> str:
    images = [{"id": i, "file_name": f"{i:02d}.jpg"} for i in range(first, first + count)]
    annotations = [{"id": i, "image_id": i, **annotation} for i in range(first, first + count)]
    for row in annotations:
        if "caption" in row:
            row["caption"] = f"{row['caption']} {row['image_id']}"
    return json.dumps({"images": images, "annotations": annotations, "categories": []})


def parquet(first: int, count: int, names: bool = True) -> bytes:
    numbers = range(first, first + count)
    inside = [{"bytes": picture(f"parquet {i}"), "path": f"{i}.png"} for i in numbers]
    columns = {"image": inside, "label": [i % 2 for i in numbers]}
    if not names:
        columns = {"image": inside, "text": [f"a red thing {i}" for i in numbers]}
    content = pa.table(columns)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    stored = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    out = io.BytesIO()
    pq.write_table(content.replace_schema_metadata(stored) if names else content, out)
    return out.getvalue()


def shard(first: int, count: int, **texts) -> bytes:
    return packed(samples(range(first, first + count), **texts))


def word(i: int) -> str:
    return f"a red thing {i}"


def number(i: int) -> str:
    return str(i % 2)


TEXTS = {f"{i:02d}.txt": f"a red thing {i}" for i in range(12)}
TEXTS_OF = [{f"{i:02d}.txt": f"a red thing {i}" for i in range(20 * k, 20 * k + 9)} for k in range(3)]
BOX = "0 0.5 0.5 0.2 0.1\n"
XML = "<annotation><object><name>cat</name></object></annotation>"

# ruff: noqa: E501
# title -> the files, and what of them is given (else the folder of all)
LAYOUTS: dict[str, Files | tuple[Files, str]] = {
    # class folders
    "class folders": folders("cat", "dog"),
    "class folders below `train/` and `test/`": folders("train/cat", "train/dog") | folders("test/cat", "test/dog", count=2),
    "`train/`, `val/` and `test/`": folders(*(f"{s}/{c}" for s in ("train", "val", "test") for c in ("cat", "dog"))),
    "`Training/` and `Testing/`": folders("Training/cat", "Training/dog", "Testing/cat", "Testing/dog"),
    "`seg_train/` and `seg_test/`, each unpacked into itself": folders(
        *(f"seg_{s}/seg_{s}/{c}" for s in ("train", "test") for c in ("sea", "street"))
    ),
    "`seg_train/`, `seg_test/` and `seg_pred/` without classes": folders(
        *(f"seg_{s}/{c}" for s in ("train", "test") for c in ("sea", "street"))
    )
    | flat("seg_pred/"),
    "unpacked twice: `photos/photos/CLASS`": folders("photos/cat", "photos/dog") | {"__MACOSX/photos/._0.jpg": "x"},
    "two levels: `animals/CLASS`, `plants/CLASS`": folders("animals/cat", "animals/dog", "plants/rose"),
    "two levels with a class name in both": folders("real/cat", "real/dog", "sketch/cat"),
    "some pictures a level deeper": folders("cat", "dog") | folders("dog/more", count=1),
    "class folders and a few loose pictures": folders("cat", "dog") | pictures("stray.jpg"),
    "as many loose pictures as in class folders": folders("cat", "dog") | flat(),
    "class folders, some files HEIC or video": folders("cat", "dog") | {"cat/a.heic": "x", "dog/b.MOV": "x"},
    "a folder with HEIC files only beside others": folders("cat", "dog") | {"emu/a.heic": "x"},
    "one class folder": folders("cat"),
    "`images/` and `masks/`": folders("images", "masks"),
    "`train/` with classes, `test/` without": folders("train/cat", "train/dog") | flat("test/"),
    "only `test/`": folders("test/cat", "test/dog"),
    "`train/` and `test/` the same": folders("train/cat", "train/dog") | {
        name.replace("train", "test"): content for name, content in folders("train/cat", "train/dog").items()
    },
    "numbered classes and a list of their names": folders("1", "2", "3")
    | {"cat_to_name.json": json.dumps({"1": "rose", "2": "tulip", "3": "lily"})},
    "class folders and a table of something else": folders("cat", "dog") | {"prices.csv": "name,price\ncat,3\n"},
    "CUB-200: `images/CLASS` and lists": folders("images/001.Albatross", "images/002.Auklet")
    | {"images.txt": "1 001.Albatross/0.jpg\n", "classes.txt": "1 001.Albatross\n", "README": "x"},
    "flat files with the class in the name": pictures(*(f"{k}.{i}.jpg" for k in ("cat", "dog") for i in range(6))),
    "flat files of a phone, HEIC and JPEG": flat("IMG_") | {"IMG_0090.HEIC": "x", "IMG_0091.MOV": "x"},
    "pictures by date": folders("2023/05", "2023/06", "2024/05"),
    "a camera's folders": folders("DCIM/100APPLE", "DCIM/101APPLE"),
    # captions
    "flat pictures with `.txt` captions": flat() | TEXTS,
    "the same below `train/` and `val/`": {
        f"{split}/{name}": content
        for split, first in (("train", 0), ("val", 50))
        for name, content in (flat(first=first) | {f"{i + first:02d}.txt": f"thing {i + first}" for i in range(12)}).items()
    },
    "img2dataset's files: `.jpg .txt .json`": {f"00000/{n}": c for n, c in (flat() | TEXTS).items()}
    | {f"00000/{i:02d}.json": json.dumps({"caption": "x"}) for i in range(12)},
    "the same in several folders": {
        f"{k:05d}/{n}": c + str(k) if isinstance(c, str) else c for k in range(3) for n, c in (flat(first=20 * k, count=9) | TEXTS_OF[k]).items()
    },
    "YOLO: `images/` and `labels/`": flat("images/train/") | {f"labels/train/{i:02d}.txt": BOX for i in range(12)},
    "YOLO: boxes beside the pictures": flat() | {f"{i:02d}.txt": BOX for i in range(12)},
    "Pascal VOC": flat("JPEGImages/") | {f"Annotations/{i:02d}.xml": XML for i in range(12)},
    # tables
    "Flickr8k: `Images/` and `captions.txt`": flat("Images/")
    | {"captions.txt": "image,caption\n" + rows("{i:02d}.jpg", "a {k} {i}") + rows("{i:02d}.jpg", "some {k} {i}")},
    "a JSON object of names and classes": flat() | {"labels.json": json.dumps({f"{i:02d}.jpg": "cat" for i in range(12)})},
    "a table of the pictures in class folders": folders("a", "b") | {"metadata.csv": "file_name,label\na/0.jpg,cat\na/1.jpg,cat\nb/0.jpg,dog\nb/1.jpg,dog\n"},
    "open_clip's CSV, separated by tabs": flat("pics/")
    | {"train.csv": table("filepath,title", "pics/{i:02d}.jpg", "a red {k} {i}", separator="\t")},
    "a CSV with `;`": flat() | {"labels.csv": table("file;label", "{i:02d}.jpg", "{k}", separator=";")},
    "a table with bars": flat() | {"labels.csv": table("file|label", "{i:02d}.jpg", "{k}", separator="|")},
    "a table without a header": flat() | {"labels.csv": rows("{i:02d}.jpg", "{k}")},
    "a table with unknown names of columns": flat() | {"t.csv": table("bild,art", "{i:02d}.jpg", "{k}")},
    "Kaggle: `id` without suffix, `train/` and `test/`, given `train.csv`": (
        flat("train/") | flat("test/", first=20)
        | {"train.csv": table("id,breed", "{i:02d}", "{k}"), "sample_submission.csv": "id,cat,dog\n20,0.5,0.5\n"},
        "train.csv",
    ),
    "the same, given the folder": flat("train/") | flat("test/", first=20)
    | {"train.csv": table("id,breed", "{i:02d}", "{k}"), "sample_submission.csv": "id,cat,dog\n20,0.5,0.5\n"},
    "Kaggle: columns of 0 and 1": flat() | {"train.csv": table("image_id,healthy,rust", "{i:02d}", "{n}", "0")},
    "a table with a column of splits": flat()
    | {"all.csv": "filepath,label,split\n" + rows("{i:02d}.jpg", "{k},train", count=8) + rows("{i:02d}.jpg", "{k},test", first=8, count=4)},
    "`train.csv` and `val.csv`": flat()
    | {"train.csv": table("path,label", "{i:02d}.jpg", "{k}", count=8), "val.csv": table("path,label", "{i:02d}.jpg", "{k}", first=8, count=4)},
    "paths of Windows": flat("pics/") | {"a.csv": table("path,label", "C:\\Users\\me\\pics\\{i:02d}.jpg", "{k}")},
    "web addresses": {"a.tsv": table("url,caption", "https://x.org/{i}.jpg", "a {k}", separator="\t")},
    "a spreadsheet": flat() | {"labels.xlsx": b"PK"},
    "Hugging Face: `metadata.jsonl` with `text`": flat() | {"metadata.jsonl": lines(file_name="{i:02d}.jpg", text="a red {k} {i}")},
    "Hugging Face: `train/metadata.csv`, `test/metadata.csv`": flat("train/") | flat("test/", first=20)
    | {
        "train/metadata.csv": table("file_name,label", "{i:02d}.jpg", "{k}"),
        "test/metadata.csv": table("file_name,label", "{i:02d}.jpg", "{k}", first=20),
    },
    "Hugging Face: Parquet with pictures in it": {
        "data/train-00000-of-00002.parquet": parquet(0, 8),
        "data/train-00001-of-00002.parquet": parquet(8, 8),
        "data/test-00000-of-00001.parquet": parquet(16, 4),
        "README.md": "x",
    },
    "Parquet with captions": {"train.parquet": parquet(0, 20, names=False)},
    "`save_to_disk` of `datasets`": {"data-00000-of-00001.arrow": b"x", "dataset_info.json": "{}", "state.json": "{}"},
    "COCO captions, given their file": (
        flat("train2017/") | flat("val2017/", first=20)
        | {
            "annotations/captions_train2017.json": coco(0, 12, caption="a red thing"),
            "annotations/captions_val2017.json": coco(20, 12, caption="a blue thing"),
            "annotations/instances_train2017.json": coco(0, 12, bbox=[0, 0, 1, 1]),
        },
        "annotations/captions_train2017.json",
    ),
    "COCO boxes": flat("train/") | {"train/_annotations.coco.json": coco(0, 12, bbox=[0, 0, 1, 1], category_id=1)},
    # shards
    "shards with `.cls` and a `classes.txt`": {
        "train-000.tar": shard(0, 6, cls=number), "train-001.tar": shard(6, 6, cls=number),
        "test-000.tar": shard(12, 4, cls=number), "classes.txt": "cat\ndog\n",
    },
    "shards and a table of their sources": {
        "train.tar": shard(0, 6, cls=number), "test.tar": shard(12, 4, cls=number), "classes.txt": "cat\ndog\n",
        "sources.tsv": "picture\turl\n0.png\thttps://x.org/0\n",
    },
    "img2dataset's shards": {
        "00000.tar": shard(0, 12, txt=word, json=lambda i: json.dumps({"caption": word(i)})),
        "00000_stats.json": "{}", "00000.parquet": parquet(0, 1),
    },
    "CLIP_benchmark's export": {
        "train/0.tar": shard(0, 8, cls=number), "train/nshards.txt": "1",
        "test/0.tar": shard(8, 4, cls=number), "test/nshards.txt": "1",
        "classnames.txt": "cat\ndog\n", "zeroshot_classification_templates.txt": "a photo of {c}.\n",
    },
    "a folder packed with tar": {"photos.tar": packed(folders("cat", "dog"))},
    "`.tar.gz`": {"photos.tar.gz": b"\x1f\x8b"},
    "a zip file": {"photos.zip": b"PK"},
    "NumPy arrays": {"train.npz": b"x"},
    "an empty folder": {"cat/": b""},
}  # fmt: skip


def understood(title: str, folder: Path) -> str:
    """What `update --data` says of a layout: the paragraph, or the refusal, as one text."""
    files = LAYOUTS[title]
    return understood_files(*(files if isinstance(files, tuple) else (files,)), folder=folder)


def understood_files(files: Files, given: str = "", *, folder: Path) -> str:
    root = folder / "photos"
    for name in [name for name in files if name.endswith("/")]:
        (root / name).mkdir(parents=True)
    write(root, {name: content for name, content in files.items() if not name.endswith("/")})
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            opened_and_said(read(as_data_file(root / given, folder / "run")))
    except UserError as error:
        return "refused: " + str(error).replace(f"{root}/", "").replace(str(root), "photos")
    kept = [line for line in said.getvalue().splitlines() if not line.startswith("Inferred")]
    return "; ".join(kept).replace(f"{root}/", "").replace(str(root), "photos")


def as_table() -> str:
    found = ["| what lies in the folder | what is understood |", "|---|---|"]
    for title in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            text = understood(title, Path(folder).resolve()).replace("|", "\\|")
            found.append(f"| {title} | {text} |".replace(str(Path(folder).resolve()), ""))
    return "\n".join(found)


if __name__ == "__main__":
    sys.stdout.write(as_table() + "\n")
