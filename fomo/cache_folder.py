"""The folder of everything that can be made again: what is in it, and emptying it.

Only what we name ourselves is counted and removed: KIND/HASH, below the kinds that are listed here.
"""

import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from filelock import Timeout

from fomo.atomic import cache_root, lock_of
from fomo.text import aligned, data_size

KINDS = {
    "pixels": "pictures, decoded and resized",
    "shapes": "sizes of pictures that are not kept decoded",
    "indexes": "where the pictures of tar shards are",
    "models": "base models, pretrained here",
    "budget": "FLOPs and memory, counted",
}
HELD: dict[Path, IO] = {}  # by cache folder: the lock that this process shares with other readers of pixels


def entries(kind: str) -> list[Path]:
    """Whole ones, and what killed processes left of some (NAME.part, NAME.old)."""
    folder = cache_root() / kind
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if re.fullmatch(r"[0-9a-f]{20}(\.part|\.old)?", path.name))


def size_of(folder: Path) -> int:
    """Bytes of its files; those that another process removes meanwhile count nothing."""
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(inner, name)).st_size
            except OSError:
                continue
    return total


def overview() -> str:
    """Where the cache is, and how large each kind of thing in it."""
    sizes = {kind: [size_of(entry) for entry in entries(kind)] for kind in KINDS}
    rows = [[kind, KINDS[kind], f"{len(s)}", data_size(sum(s))] for kind, s in sizes.items() if s]
    total = data_size(sum(map(sum, sizes.values())))
    lines = [f"{cache_root()}: {total}; `data cache --clear` empties it, FOMO_CACHE names another folder"]
    return "\n".join([*lines, *([aligned(rows, left=2)] if rows else [])])


def clear() -> str:
    """Remove what no other process is making or reading; -> what was freed, and what was left."""
    root, freed, left = cache_root(), dict.fromkeys(KINDS, 0), []
    with open(readers_of(root), "a+b") as readers:
        try:
            fcntl.lockf(readers, fcntl.LOCK_EX | fcntl.LOCK_NB)
            read = False
        except OSError:
            read = True
        for kind in KINDS:
            for entry in entries(kind):
                size = size_of(entry)
                if (read and kind == "pixels") or not remove(entry):
                    left.append(f"{kind}/{entry.name}")
                else:
                    freed[kind] += size
    if root in HELD:  # POSIX: a file that is closed takes the process's other locks on it along
        fcntl.lockf(HELD[root], fcntl.LOCK_SH)
    parts = ", ".join(f"{kind} {data_size(size)}" for kind, size in freed.items() if size)
    text = f"{root}: freed {data_size(sum(freed.values()))}{parts and f' ({parts})'}"
    return text + (f"; left, as other processes work with it: {', '.join(left)}" if left else "")


def remove(entry: Path) -> bool:
    """Whether nobody was making it. It loses its name first, so that nobody sees a part of it."""
    whole = entry.with_name(entry.name.split(".")[0])
    scrap = whole.with_name(whole.name + ".part")
    try:
        with lock_of(whole).acquire(timeout=0):
            if entry != scrap:
                shutil.rmtree(scrap, ignore_errors=True)
                entry.rename(scrap)
            shutil.rmtree(scrap, ignore_errors=True)
            return True
    except Timeout:
        return False


def hold_pixels() -> None:
    """Keep `clear`, in other processes, from the pictures, whose files are opened one by one in a run's time.

    Ends with the process. All else of the cache is read, or mapped into memory, at once.
    """
    root = cache_root()
    if root not in HELD:
        with suppress(OSError):  # of a cache that may only be read: nobody can empty it from here
            HELD[root] = open(readers_of(root), "a+b")  # noqa: SIM115
            fcntl.lockf(HELD[root], fcntl.LOCK_SH)


def readers_of(root: Path) -> Path:
    """The file that whoever reads pictures locks, with others."""
    (root / "locks").mkdir(parents=True, exist_ok=True)
    return root / "locks" / "readers"
