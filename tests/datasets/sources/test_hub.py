"""Brace ranges, and files of the Hugging Face hub through its own client."""

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from fomo.datasets.sources.hub import expand, fetch, fetch_text
from fomo.errors import UserError


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("x/{0008..0010}.tar", ["x/0008.tar", "x/0009.tar", "x/0010.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("hf://datasets/o/r/{00..01}.tar", ["hf://datasets/o/r/00.tar", "hf://datasets/o/r/01.tar"]),
    ],
)
def test_braces_stand_for_ranges_and_choices(path, expected):
    assert expand(path) == expected


def test_an_empty_range_is_a_mistake():
    with pytest.raises(UserError, match=r"\{5\.\.4\} is empty"):
        expand("{5..4}.tar")


def test_a_file_of_the_hub_is_asked_for_by_repository_revision_and_name(monkeypatch, tmp_path):
    asked = []

    def download(repo, file, *, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(tmp_path / "got")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch("hf://datasets/org/repo/train/0.tar") == tmp_path / "got"
    fetch("hf://datasets/org/repo@refs%2Fpr%2F1/0.tar")
    assert asked == [
        ("org/repo", "train/0.tar", "dataset", None),
        ("org/repo", "0.tar", "dataset", "refs/pr/1"),
    ]


def test_a_failure_to_fetch_is_one_line_with_the_file_and_the_remedy(monkeypatch):
    def fail(error):
        def download(*arguments, **options):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)

    path = "hf://datasets/org/repo/train/0.tar"
    for error in (ConnectionError("no\nroute"), LocalEntryNotFoundError("offline")):
        fail(error)
        for call in (fetch, fetch_text):
            with pytest.raises(UserError) as caught:
                call(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: cannot be fetched") and "\n" not in message
            assert "hf download org/repo train/0.tar --repo-type dataset" in message
    fail(EntryNotFoundError("404"))
    assert fetch_text(path) is None
    with pytest.raises(UserError, match="no such file in the repository"):
        fetch(path)
    with pytest.raises(UserError, match="expected hf://datasets/ORG/REPO"):
        fetch("hf://models/x")
