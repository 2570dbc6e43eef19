"""Parquet, written by pyarrow as the `datasets` library writes it."""

import json
import pickle
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fomo.datasets.sources.parquet import Parquet
from fomo.errors import UserError
from tests.datasets.inputs import draw, encoded, gray


def written(path, columns, names=None, group=3):
    table = pa.table(columns)
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def inside(numbers):
    return [{"bytes": encoded(gray(n)), "path": None} for n in numbers]


def test_pictures_in_several_files_and_row_groups_with_names_of_classes(tmp_path):
    files = [
        written(
            tmp_path / f"{k}.parquet", {"image": inside(r), "label": [n % 3 - 1 for n in r]}, ["ant", "bee"]
        )
        for k, r in enumerate((range(7), range(7, 10)))
    ]
    source = Parquet(files, caption=None, concept="label")
    assert source.classes == ["ant", "bee"]
    assert [source.classes[k] if k >= 0 else None for k in source.labels] == [
        [None, "ant", "bee"][n % 3] for n in range(10)
    ]
    order = np.random.default_rng(0).permutation(10).tolist()
    again = pickle.loads(pickle.dumps(source))  # as data workers have it
    assert [np.asarray(again.image(i)).max() for i in order] == order
    assert (
        source.name_of(8) == f"{files[1]}: row 1 of group 0"
        and source.key() != Parquet(files[0], caption=None).key()
    )


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_alone_and_captions(tmp_path, kind):
    columns = {"png": pa.array([encoded(gray(5)), None], kind), "text": ["five", "none"]}
    source = Parquet(written(tmp_path / "a.parquet", columns), image="png")
    assert source.captions(0) == ["five"] and np.asarray(source.image(0)).max() == 5
    with pytest.raises(OSError, match="no picture in the row"):
        source.image(1)


def test_named_pictures_are_those_of_any_table(tmp_path):
    draw(tmp_path / "pics/0.png", gray(9))
    source = Parquet(
        written(tmp_path / "a.parquet", {"file_name": ["0.png"], "text": ["nine"]}), image="file_name"
    )
    assert np.asarray(source.image(0)).max() == 9 and source.captions(0) == ["nine"]


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    for name, expected in (("bad.parquet", "not a readable Parquet file"), ("gone.parquet", "no such file")):
        with pytest.raises(UserError, match=expected):
            Parquet(str(tmp_path / name))
    path = written(tmp_path / "a.parquet", {"image": inside([1]), "text": ["x"]})
    with pytest.raises(UserError, match="no column 'caption', it has: image, text"):
        Parquet(path, caption="caption")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="needs `python -m pip install pyarrow`"):
        Parquet(path)
