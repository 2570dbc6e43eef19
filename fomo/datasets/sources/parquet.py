"""Parquet files as the `datasets` library writes them: pictures in the table itself, or named in a column."""

import io
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image

from fomo.datasets.sources.tables import Row, Rows
from fomo.datasets.sources.webdataset import stamp
from fomo.errors import UserError, one_line


class Parquet(Rows):
    """`path`: one file, or a list of which each holds a part of the split.

    A column of pictures holds paths; or bytes, alone or in the field `bytes` of `datasets.Image`. Numbers of a
    `ClassLabel` become its names.
    """

    def __init__(
        self,
        path: str | list[str],
        image: str = "image",
        caption: str | None = "text",
        concept: str | None = None,
        root: str | None = None,
        split_column: str | None = None,
        date: str | None = None,
        split: str = "train",
    ):
        self.parts = [path] if isinstance(path, str) else path
        if not self.parts:
            raise UserError("path: an empty list, expected Parquet files")
        self.embedded = image in embedded_in(opened(self.parts[0]))
        self.held: tuple[tuple[int, int], list] = ((-1, -1), [])  # part and row group, and its pictures
        super().__init__(self.parts[0], image, caption, concept, root, split_column, date, split)

    def records(self) -> Iterator[Row]:
        files = [opened(part) for part in self.parts]
        self.require(files[0].schema_arrow.names)
        return (row for number, file in enumerate(files) for row in self.rows_of(number, file))

    def rows_of(self, part: int, file) -> Iterator[Row]:
        """The rows of one file; for a picture in it stands PART:GROUP:ROW."""
        image, names = self.columns[0], class_names(file)
        columns = [name for name in (*self.columns, self.split_column) if name]
        columns = [name for name in dict.fromkeys(columns) if not (self.embedded and name == image)]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns)
            for place in range(file.metadata.row_group(group).num_rows):
                row = {name: rows.column(name)[place].as_py() for name in columns}
                for column in names.keys() & row.keys():
                    if row[column] is not None:
                        row[column] = names[column][row[column]] if row[column] >= 0 else None
                yield row | ({image: f"{part}:{group}:{place}"} if self.embedded else {})

    def place(self, file: str) -> str:
        return file if self.embedded else super().place(file)

    def byte_sizes(self) -> np.ndarray | None:
        return None if self.embedded else super().byte_sizes()

    def image(self, index: int) -> Image.Image:
        if not self.embedded:
            return super().image(index)
        part, group, place = map(int, self.files[index].split(":"))
        if self.held[0] != (part, group):  # pictures are asked for in order, but for `cache: never`
            column = self.columns[0]
            rows = opened(self.parts[part]).read_row_group(group, columns=[column])
            self.held = ((part, group), rows.column(column).to_pylist())
        value = self.held[1][place]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise OSError("no picture in the row")
        return Image.open(io.BytesIO(data))

    def __getstate__(self):
        return {**self.__dict__, "held": ((-1, -1), [])}

    def name_of(self, index: int) -> str:
        if not self.embedded:
            return super().name_of(index)
        part, group, place = self.files[index].split(":")
        return f"{self.parts[int(part)]}: row {place} of group {group}"

    def key(self) -> str:
        stamps = " ".join(map(stamp, self.parts)) if self.embedded else super().key()
        return f"Parquet {stamps} {self.split_column} {self.split}"


def opened(file: str):
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{file}: reading Parquet needs `python -m pip install pyarrow`") from None
    try:
        return ParquetFile(file)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ArrowException) as error:
        raise UserError(f"{file}: not a readable Parquet file: {one_line(error)}") from None


def embedded_in(file) -> list[str]:
    """The columns that hold pictures themselves."""
    from pyarrow import types

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    return [column.name for column in file.schema_arrow if holds_bytes(column.type)]


def class_names(file) -> dict[str, list[str]]:
    """The names of each column of `ClassLabel`, from what `datasets` writes into the schema."""
    stored = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(stored).get("info", {}).get("features", {})
    kinds = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {name: kind["names"] for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"}


def without_pictures(file: str) -> tuple[list[str], list[Row]]:
    """The names of the columns, and the rows without the pictures that are in them."""
    table = opened(file)
    inside, names = embedded_in(table), table.schema_arrow.names
    return names, table.read([name for name in names if name not in inside]).to_pylist()
