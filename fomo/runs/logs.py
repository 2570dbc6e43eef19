"""The logs of a run folder: files of JSON lines. Reading them needs no torch."""

import json
import os
from pathlib import Path

from fomo.atomic import naming
from fomo.errors import UserError


def refuse_missing(folder: Path) -> None:
    """One line for a folder that is not there, or is no run."""
    expected = "expected the folder of a run, as `update` or `continue` made it"
    if not folder.exists():
        raise UserError(f"{folder}: no such run; {expected}")
    if not any((folder / name).is_file() for name in ("recipe.yaml", "metrics.jsonl")):
        raise UserError(f"{folder}: is no run, neither recipe.yaml nor metrics.jsonl is in it; {expected}")


def scored_sets(constants: dict) -> dict[str, tuple]:
    """name -> (role, classes, hash of its content) of the test sets that run.json tells of; None where unsaid."""
    classes, contents = constants.get("classes", {}), constants.get("contents", {})
    return {name: (role, classes.get(name), contents.get(name)) for name, role in constants["roles"].items()}


def is_same_set(a: tuple | None, b: tuple | None) -> bool:
    """Whether scores of two sets of one name compare, as far as older runs say it."""
    return None not in (a, b) and all(x == y or None in (x, y) for x, y in zip(a, b, strict=True))


def evaluations(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl for the deployed weights: of update 0, 1, ...; none if the run has not begun.

    Lines of evaluations within an update, which say a `step`, are left out.
    """
    log = folder / "metrics.jsonl"
    return [line for line in read_lines(log) if "step" not in line] if log.exists() else []


def append_line(path: Path, line: dict) -> None:
    with naming(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """Parse a file of JSON lines; a last line that is still being written is left out."""
    lines = read_text(path).splitlines()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON: {error}") from None
    return parsed


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected the folder of a run") from None
