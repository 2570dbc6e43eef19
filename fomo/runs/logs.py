"""The logs of a run folder: files of JSON lines. Reading them needs no torch."""

import json
import os
from pathlib import Path

from fomo.atomic import naming
from fomo.errors import UserError


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
