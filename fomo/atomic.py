"""Files that are complete or absent, whenever the process dies."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from fomo.errors import UserError


@contextmanager
def staged(path: Path, give_name: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """A file beside `path` to write into; at the end it is flushed and gets its name, by `give_name` if given."""
    staging = path.with_name(path.name + ".part")
    try:
        with naming(path):
            yield staging
            give_name(staging) if give_name else rename(staging, path)
    finally:
        staging.unlink(missing_ok=True)  # there only if this failed, and a full disk needs the room


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill; at the end it takes the place of what is there."""
    staging, old = path.with_name(path.name + ".part"), path.with_name(path.name + ".old")
    recovered(path)
    for scrap in (staging, old):
        shutil.rmtree(scrap, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if path.exists():
            path.rename(old)
        rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recovered(path: Path) -> Path:
    """The place of a staged folder; a process that died between the two renames left its content aside."""
    aside = path.with_name(path.name + ".old")
    if aside.exists() and not path.exists():
        aside.rename(path)
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the system refuses in writing a file is an OSError that names it."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = refused(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def refused(error: Exception) -> int | None:
    """The system's error number, also where torch or safetensors raise an error of their own."""
    cause = error.__context__ if isinstance(error, RuntimeError) else error
    if isinstance(cause, OSError):
        return cause.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def write_atomically(path: Path, content: bytes) -> None:
    with staged(path) as staging:
        staging.write_bytes(content)


def rename(staging: Path, path: Path) -> None:
    """Flush `staging`, a file or a folder of files, to the disk and give it its name."""
    for written in (*(staging.rglob("*") if staging.is_dir() else ()), staging):
        sync(written)
    os.replace(staging, path)
    sync(path.parent)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- tensors ---


def write_tensors(tensors: Mapping, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Named tensors as a safetensors file. metadata: one text, as safetensors writes several in any order."""
    from safetensors.torch import save_file  # brings torch, which writing a report does not need

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with staged(path) as staging:
        staging.touch()
        mode = staging.stat().st_mode  # as the umask has it; save_file's is 0600
        save_file(plain, staging, metadata=metadata or {"format": "pt"})
        staging.chmod(mode)


class OnDisk(Mapping):
    """Named tensors of a safetensors file, one read at a time: a file kept open would count as resident memory."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.names = list(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}

    def __getitem__(self, name: str):
        if name not in self.names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def cache_root() -> Path:
    """Where all that can be made again is kept: $FOMO_CACHE, else $XDG_CACHE_HOME/fomo, else ~/.cache/fomo."""
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not shared.is_absolute():  # the specification: such a value is to be ignored
        shared = Path("~/.cache")
    return Path(os.environ.get("FOMO_CACHE") or shared / "fomo").expanduser()


def make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder of the cache; it is complete or absent.

    One process makes, others that want the same wait for it. What a killed one left (NAME.part) is removed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_of(folder):
            if folder.exists():
                return
            remove_stale(folder.parent)
            with staged_folder(folder) as staging:
                fill(staging)
    except OSError as error:
        if cache_root() not in folder.parents:
            raise
        problem = f"the cache cannot be written: {error.strerror or error}"
        raise UserError(f"{cache_root()}: {problem}; set FOMO_CACHE to a folder with room") from None


def lock_of(folder: Path) -> FileLock:
    """Held by whoever makes a folder of the cache; it ends with the process."""
    locks = cache_root() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / folder.name)


def remove_stale(parent: Path) -> None:
    """Unfinished folders of the cache that no living process is working on."""
    if cache_root() not in parent.parents:
        return  # a folder of the user's, in which others may have such names
    for part in parent.glob("*.part"):
        with suppress(Timeout), lock_of(part.with_suffix("")).acquire(timeout=0):
            shutil.rmtree(part, ignore_errors=True)
