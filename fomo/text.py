"""Small things that commands read and print."""

from fomo.errors import UserError


def aligned(rows: list[list[str]], left: int = 1) -> str:
    """Rows of cells as lines with aligned columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        [
            cell.ljust(w) if i < left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)


def whole_numbers(option: str, text: str, least: int = 0) -> list[int]:
    """ "20,50" -> [20, 50]: what a command's option names, each once; not below `least`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option} {text}: expected whole numbers from {least} with commas between them")
    return list(dict.fromkeys(int(part) for part in parts))
