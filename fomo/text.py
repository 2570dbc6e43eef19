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


def data_size(count: int) -> str:
    """Bytes for people."""
    unit, size = next(((u, s) for u, s in (("GB", 2**30), ("MB", 2**20)) if count >= s), ("kB", 2**10))
    return f"{count / size:.1f} {unit}"


def plural(number: int, one: str, several: str | None = None) -> str:
    """1 picture, 1,000 pictures; `several` where it is more than an s: plural(n, "class is", "classes are")."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def shortened(names: list[str]) -> str:
    """The first three of a list."""
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)
