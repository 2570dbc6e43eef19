"""Types as the schema of YAML: unions, bounds, lists, dataclasses."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from fomo.errors import FieldError, UserError
from fomo.load_recipe import load
from fomo.schema import Count, NotNegative, Positive, Range, Share, build, convert, read_yaml


@dataclass(frozen=True)
class Inner:
    share: Share = 0.5


Open = Annotated[float, Range(0, 1, above=True, below=True)]


@pytest.mark.parametrize(
    ("want", "value", "expected"),
    [
        (Count | None, None, None),
        (Count | None, 3, 3),
        (Count | None, "3", 3),
        (Share | None, 1, 1.0),
        (NotNegative, 0, 0.0),
        (Positive, "1e-5", 1e-5),
        (Literal["a", "b"] | None, "b", "b"),
        (Literal["a", "b"] | None, None, None),
        (list[Share], [0, "1e-1"], [0.0, 0.1]),
        (list[Share] | None, None, None),
        (list[str] | int | None, 4, 4),
        (list[str] | int | None, ["x"], ["x"]),
        (Literal["all"] | Count, 2, 2),
        (Literal["all"] | Count, "all", "all"),
        (Inner | None, {"share": 1}, Inner(1.0)),
        (Inner | None, None, None),
        (bool, False, False),
        (int, 10**30, 10**30),
    ],
)
def test_a_value_is_converted_to_the_option_that_it_fits(want, value, expected):
    found = convert(value, want, "x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("want", "value", "field"),
    [
        (Count | None, 0, "x"),
        (Count | None, True, "x"),
        (Count | None, 1.5, "x"),
        (Count, None, "x"),
        (Share, 1.0001, "x"),
        (Positive | None, 0, "x"),
        (Open, 0, "x"),
        (Open, 1, "x"),
        (float, 10**400, "x"),
        (float, b"1", "x"),
        (float, "nan", "x"),
        (Literal["a", "b"] | None, "c", "x"),
        (Literal["a", "b"], ["a"], "x"),
        (list[Share], [0, 2], "x[1]"),
        (list[Share], 1, "x"),
        (bool, 1, "x"),
        (str, True, "x"),
        (Inner | None, {"share": 2}, "x.share"),
        (Inner | None, {"sharing": 1}, "x.sharing"),
        (Inner | None, 5, "x"),
    ],
)
def test_what_fits_no_option_is_refused_by_its_path(want, value, field):
    with pytest.raises(FieldError) as caught:
        convert(value, want, "x")
    assert caught.value.field == field


@pytest.mark.parametrize(
    "bounds", [Range(0, 1), Range(0, above=True), Range(1), Range(0, 1, above=True, below=True)]
)
def test_a_range_names_its_ends(bounds):
    assert f"{bounds.least:g}" in str(bounds)
    assert (bounds.least in bounds) != bounds.above and (bounds.most in bounds) != bounds.below


def test_a_field_without_a_default_must_be_given():
    @dataclass
    class Needs:
        path: str

    with pytest.raises(FieldError, match="missing") as caught:
        build(Needs, {}, "data.x")
    assert caught.value.field == "data.x.path"


TWICE = [
    ("seed: 1\nmethod: {name: lora}\nseed: 2\n", "seed", 1, 3),
    ("evaluation:\n  pets: {source: csv}\n  'pets': {source: tsv}\n", "pets", 2, 3),
    ("adaptation:\n  12: {}\n\n  '12': {}\n", "12", 2, 4),  # numbers are names, too
    ("adaptation:\n  yes: {}\n  True: {}\n", "True", 2, 3),  # and what YAML reads as one value
    ("optimizer: {lr: 1e-3, betas: [0.9, 0.99],\n  lr: 1e-4}\n", "lr", 1, 2),
    ("pretraining:\n  - {path: a,\n     source: csv, path: b}\n", "path", 2, 3),
]


@pytest.mark.parametrize(("text", "name", "first", "second"), TWICE)
def test_a_field_that_stands_twice_is_refused_with_both_lines(tmp_path, text, name, first, second):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "a.yaml")
    twice = f"the field {name} stands there twice, in lines {first} and {second}"
    assert str(caught.value).startswith(f"{tmp_path}/a.yaml: ") and twice in str(caught.value)


def test_fields_of_an_alias_may_be_replaced_by_a_files_own(tmp_path):
    """YAML's merge key: what stands in the mapping itself goes first."""
    text = "base: &b {a: 1, b: 2}\nnext: {<<: *b, a: 3}\n"
    (tmp_path / "a.yaml").write_text(text)
    found = read_yaml(tmp_path / "a.yaml")
    assert found["next"] == {"a": 3, "b": 2}


def test_the_command_line_is_read_by_the_same_rules(small_scale):
    with pytest.raises(UserError, match=r"method=.* is not a YAML value"):
        load(None, scale=str(small_scale), overrides=["method={name: ewc, name: lora}"])
