"""Texts for a terminal."""


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


def many(count: int, noun: str) -> str:
    """1 picture, 2,000 pictures, 2 classes."""
    plural = noun if count == 1 else noun + ("es" if noun.endswith(("s", "ch", "x")) else "s")
    return f"{count:,} {plural}"


def shortened(names: list[str]) -> str:
    """The first three of a list."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
