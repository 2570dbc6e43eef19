"""Streams: T chunks as the released code cuts them, the official files, matching, the summary and the plot."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomo.datasets.datafile import DataFile, Entry
from fomo.datasets.stream import (
    Concept,
    concepts_of,
    cut,
    lines_of,
    match,
    read_stream,
    summary,
    write_stream,
)
from fomo.errors import UserError
from fomo.report.previews import plot_stream
from tests.datasets.inputs import one_line

STREAMS = Path(__file__).parents[3] / "shared" / "fomo_in_flux" / "streams"


def concepts(count: int) -> list[Concept]:
    return [Concept(f"set {i % 3}", i // 3, f"class {i}") for i in range(count)]


def data_of(**datasets: dict) -> DataFile:
    entries = {name: Entry(name, "adaptation", spec, Path("d.yaml")) for name, spec in datasets.items()}
    return DataFile(Path("d.yaml"), None, [], entries, {})


def test_the_papers_stream_of_18381_concepts_in_20_updates_is_920_and_then_919_each():
    assert [len(chunk) for chunk in cut(concepts(18_381), 20)] == [920] + [919] * 19


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_chunks_are_contiguous_complete_and_the_first_ones_are_one_longer(sizes):
    count, updates = sizes
    chunks = cut(concepts(count), updates)
    assert [concept for chunk in chunks for concept in chunk] == concepts(count)
    longer = count % updates
    assert [len(chunk) for chunk in chunks] == [count // updates + 1] * longer + [count // updates] * (
        updates - longer
    )


def test_more_updates_than_concepts_are_a_mistake_with_both_numbers():
    with pytest.raises(UserError, match=r"stream\.updates: 8 .* 7"):
        cut(concepts(7), 8)
    assert [len(chunk) for chunk in cut(concepts(7), 7)] == [1] * 7


def test_one_update_per_dataset_in_the_order_of_first_appearance():
    chunks = cut(concepts(8), 3, per_dataset=True)
    assert [{c.dataset for c in chunk} for chunk in chunks] == [{"set 0"}, {"set 1"}, {"set 2"}]
    assert [len(chunk) for chunk in chunks] == [3, 3, 2]
    with pytest.raises(UserError, match=r"stream\.updates: one update per dataset makes 3 updates, got 20"):
        cut(concepts(8), 20, per_dataset=True)


@pytest.mark.parametrize("name", ["random_sequence_1", "time_incremental_rsagg_1", "debug_seq_small"])
def test_official_streams_round_trip_byte_for_byte(name, tmp_path):
    file = STREAMS / f"{name}.json"
    if not file.exists():
        pytest.skip(f"{file} is not here")
    write_stream(tmp_path / "again.json", read_stream(file))
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_the_folder_is_the_official_one_where_the_data_file_says_dataset_else_the_files_own_name():
    data = data_of(pets={"source": "folder"}, textures={"source": "folder", "dataset": "dtd"})
    found = lines_of([Concept("textures", 0, "dotted"), Concept("pets", 0, "a+++b")], data)
    assert found == ["DTD+++dotted", "pets+++a+++b"]


HERE = [
    Concept("textures", 0, "dotted"),
    Concept("textures", 1, "striped"),
    Concept("cifar100", 0, "aquarium fish"),
    Concept("mine", 0, "twin"),
    Concept("mine", 1, "twin"),
]
DATA = data_of(textures={"dataset": "dtd"}, cifar100={}, mine={})


def written(tmp_path: Path, *lines: str) -> Path:
    write_stream(tmp_path / "s.json", list(lines))
    return tmp_path / "s.json"


def test_concepts_are_matched_by_folder_catalogue_name_or_the_files_own_and_by_plain_class_names(
    tmp_path, capsys
):
    lines = ["mine+++twin", "CIFAR100+++aquarium_fish", "DTD+++Striped", "mine+++twin", "textures+++dotted"]
    found = match(written(tmp_path, *lines), HERE, DATA)
    assert found == [HERE[3], HERE[2], HERE[1], HERE[4], HERE[0]]
    assert capsys.readouterr().err == ""


def test_what_is_missing_is_said_exactly_and_refused(tmp_path):
    file = written(tmp_path, "DTD+++dotted", "DTD+++gone", "CUB200+++owl", "mine+++twin")
    message = one_line(match, file, HERE, DATA)
    assert message.startswith(f"{file}: 2 concepts not in the data: DTD+++gone, CUB200+++owl; ")
    assert "stream.partial: true" in message


def test_a_name_that_the_file_has_once_too_often_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"1 concept not in the data: DTD\+\+\+dotted"):
        match(written(tmp_path, "DTD+++dotted", "DTD+++dotted"), HERE, DATA)


def test_partial_takes_the_rest_and_says_what_is_left_out_and_what_is_extra(tmp_path, capsys):
    file = written(tmp_path, "DTD+++gone", "DTD+++striped", "mine+++twin", "CIFAR100+++aquarium fish")
    assert match(file, HERE, DATA, partial=True) == [HERE[1], HERE[3], HERE[2]]
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("1 concept not in the data, left out: DTD+++gone")
    assert said[1].endswith(
        "2 concepts of the data not in the stream, never learned: DTD+++dotted, mine+++twin"
    )


def test_a_file_that_shares_nothing_with_the_data_is_refused_even_if_partial(tmp_path):
    with pytest.raises(UserError, match=r"1 concept not in the data: DTD\+\+\+gone$"):
        match(written(tmp_path, "DTD+++gone"), HERE, DATA, partial=True)


def test_many_missing_concepts_are_counted_by_folder(tmp_path):
    file = written(tmp_path, *(f"CUB200+++bird {i}" for i in range(200)), "DTD+++gone")
    with pytest.raises(
        UserError, match=r"201 concepts not in the data: 200 of CUB200, 1 of DTD \(first CUB200"
    ):
        match(file, HERE, DATA)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[", "not a JSON file"),
        ("{}", "expected a JSON list"),
        ("[]", "expected a JSON list"),
        ('["DTD+++dotted", "DTD dotted"]', r"entry 1: expected FOLDER\+\+\+class name, got 'DTD dotted'"),
        ('["+++dotted"]', "entry 0"),
        ('["DTD+++"]', "entry 0"),
        ("[7]", "entry 0: .* got 7"),
    ],
)
def test_a_file_that_is_no_stream_is_refused(content, expected, tmp_path):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=rf"s\.json: {expected}"):
        read_stream(tmp_path / "s.json")


def test_a_stream_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(UserError, match=r"gone\.json: cannot be read: No such file"):
        read_stream(tmp_path / "gone.json")
    (tmp_path / "s.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a JSON file"):
        read_stream(tmp_path / "s.json")


def test_concepts_are_listed_with_their_sizes_and_prompts_without_opening_a_picture(small_scale, monkeypatch):
    from fomo.datasets.datafile import read
    from fomo.datasets.sources.world import World

    monkeypatch.setattr(World, "image", lambda *_: pytest.fail("a picture was opened"))
    found, sizes = concepts_of(read(small_scale.parent / "data.yaml"))
    assert {c.dataset for c in found} == {"symbols", "flags"}
    assert sizes == [6] * 20
    assert found[0].prompt == "a picture of the {} symbol."


def test_the_summary_counts_concepts_samples_datasets_and_switches():
    stream = cut(concepts(7), 2)
    sizes = {(c.dataset, c.label): 10 * i for i, c in enumerate(concepts(7))}
    head, *rows = summary(stream, sizes).splitlines()
    assert head.split() == ["update", "concepts", "samples", "datasets", "switches", "largest"]
    assert [row.split()[:5] for row in rows] == [
        ["1", "4", "60", "3", "3"],
        ["2", "3", "150", "3", "2"],
        ["all", "7", "210", "3", "6"],
    ]
    assert rows[0].endswith("set 0 2, set 1 1, set 2 1")


def test_the_plot_is_the_same_for_the_same_stream_and_refuses_other_kinds(tmp_path):
    for name, signature in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        plot_stream(cut(concepts(20), 4), tmp_path / "new" / name)
        first = (tmp_path / "new" / name).read_bytes()
        plot_stream(cut(concepts(20), 4), tmp_path / "new" / name)
        assert first.startswith(signature) and first == (tmp_path / "new" / name).read_bytes()
    with pytest.raises(UserError, match=r"--plot .*\.pdf: expected a \.png or \.svg"):
        plot_stream(cut(concepts(20), 4), tmp_path / "c.pdf")
