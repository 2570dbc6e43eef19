"""Where files are: here, in a brace range, or on the Hugging Face hub (`hf://datasets/ORG/REPO[@REVISION]/FILE`)."""

import itertools
import re
from pathlib import Path
from urllib.parse import unquote

from fomo.errors import UserError

HUB = re.compile(r"hf://datasets/([^/]+/[^/@]+)(?:@([^/]+))?/(.+)")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class Absent(UserError):
    """A file that its repository does not have."""


def expand(path: str) -> list[str]:
    """`a{00..12}.tar` -> 13 paths, `{a,b}` -> two; zeros of the first number are kept."""
    parts, position = [], 0
    for found in BRACES.finditer(path):
        first, last, choices = found.groups()
        parts.append([path[position : found.start()]])
        if choices is not None:
            parts.append(choices.split(","))
        else:
            numbers = range(int(first), int(last) + 1)
            if not numbers:
                raise UserError(f"{path}: the range {found.group()} is empty")
            parts.append([f"{n:0{len(first)}d}" for n in numbers])
        position = found.end()
    parts.append([path[position:]])
    return ["".join(choice) for choice in itertools.product(*parts)]


def fetch(path: str) -> Path:
    """A file on this machine; one on the hub is downloaded into the hub's own cache, once."""
    if not path.startswith("hf://"):
        return Path(path)
    match = HUB.fullmatch(path)
    if not match:
        raise UserError(f"{path}: expected hf://datasets/ORG/REPO[@REVISION]/FILE")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, revision, file = match.groups()
    try:
        found = hf_hub_download(repo, file, repo_type="dataset", revision=revision and unquote(revision))
    except Exception as error:  # the hub's own errors, its HTTP client's and the system's share no base
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise Absent(f"{path}: no such file in the repository") from None
        reason = " ".join(str(error).split())[:200]
        remedy = f"`hf download {repo} {file} --repo-type dataset`"
        raise UserError(
            f"{path}: cannot be fetched; where there is a network: {remedy}, or give a local path ({reason})"
        ) from None
    return Path(found)


def fetch_text(path: str) -> str | None:
    """The content of a small file; None where there is none beside its neighbours."""
    try:
        return fetch(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, Absent):
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
