"""The run folder: everything one `update` read, did and made.

A checkpoint is complete or absent: it is written aside, flushed, hashed, and renamed to a name that carries the
hash, so a truncated or altered file is recognised by its name and the one before it is used. Those that end an
update are kept under a second name, for `continue` and for the case that the newest are all damaged.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
import yaml

from fomo.atomic import OnDisk, recovered, rename, staged, staged_folder, write_atomically
from fomo.checkpoint_files import read_torch_file, write_checkpoint
from fomo.clip import Clip, save
from fomo.distributed import ALONE, Ranks
from fomo.errors import Interrupted, UserError, one_line
from fomo.recipe import Recipe, dump
from fomo.runs.logs import append_line, read_lines
from fomo.schema import differences, read_yaml
from fomo.text import plural

FORMAT = 1  # of a run folder: raised when an older fomo could not go on with it
KEPT_CHECKPOINTS = 2
LOGS = ("metrics.jsonl", "concepts.jsonl", "predictions.jsonl", "train.jsonl")


@dataclass
class Position:
    """How far a run is."""

    updates: int = 0  # T, once the stream is known
    update: int = 0  # updates finished
    step: int = 0  # steps done in the next one
    evaluated: bool = False  # whether the weights after `update` have been scored
    within: int = 0  # evaluations within the next update that have been made
    samples: int = 0
    seconds: float = 0.0
    steps: int = 0  # of each update (N), once planned or timed
    began: float = 0.0  # `seconds` at the beginning of this update
    closing: float = 0.0  # of a budget in hours: seconds that are left for what follows the steps

    @property
    def finished(self) -> bool:
        return self.evaluated and 0 < self.updates == self.update


@dataclass
class Run:
    folder: Path
    position: Position = field(default_factory=Position)
    signum: int = 0  # of a signal that asks to stop
    lock: IO | None = None  # held as long as it is open
    handlers: dict = field(default_factory=dict)  # of signals, before this run took them over
    ranks: Ranks = ALONE  # that train together; the first alone holds the lock and writes
    # whether pictures that cannot be read are done without, however many; data.yaml keeps it
    skip_bad: bool = False
    # when `position.seconds` was last brought up to date
    clock: float = field(default_factory=lambda: time.monotonic())

    @classmethod
    def open(
        cls, folder: Path, recipe: Recipe, resume: bool, ranks: Ranks = ALONE
    ) -> tuple["Run", dict | None]:
        """-> the run and the checkpoint to go on from. Refuses to write over a run; writes nothing yet."""
        run = cls(folder, ranks=ranks)
        checkpoint = ranks.broadcast_object(lambda: run.lock_folder(recipe, resume))
        if checkpoint:
            run.position = Position(**checkpoint["position"])
        return run, checkpoint

    def lock_folder(self, recipe: Recipe, resume: bool) -> dict | None:
        """Lock the folder for this process; -> the checkpoint to go on from."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
        refuse_used(self.folder, resume)
        self.lock = lock(self.folder / "lock")
        try:
            if (self.folder / "recipe.yaml").exists():
                same_recipe(self.folder / "recipe.yaml", recipe)
            return self.latest_checkpoint()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes work on the folder; a run that was refused before it began leaves nothing."""
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)
        if not self.ranks.first:
            return
        if not (self.folder / "recipe.yaml").exists():
            (self.folder / "lock").unlink(missing_ok=True)
        self.lock.close()

    def stream(self) -> dict | None:
        """The stream of a run that has begun and what its sources held, see datasets.pools.Pools.record."""
        return read_json(self.folder / "stream.json")

    def skipped_bad(self) -> bool:
        """Whether the run has begun with `skip_bad`, as its data.yaml says."""
        file = self.folder / "data.yaml"
        return file.exists() and bool(read_yaml(file).get("skip_bad"))

    def begin(
        self, recipe: Recipe, data: dict, stream: dict, constants: dict, checkpoint: dict | None
    ) -> None:
        """Make the folder what the checkpoint says, or a new run. constants: the content of run.json."""
        for signum in (signal.SIGTERM, signal.SIGINT):  # noted, and acted on at the next `check`
            self.handlers[signum] = signal.signal(
                signum, lambda number, frame: setattr(self, "signum", number)
            )
        if not self.ranks.first:
            return
        for name in ("state", "weights"):
            (self.folder / name).mkdir(exist_ok=True)
        (self.folder / "state/head").unlink(missing_ok=True)  # a rollback ends where training goes on
        write_atomically(self.folder / "recipe.yaml", dump(recipe).encode())
        file = self.folder / "data.yaml"
        if Path(recipe.data) != file.resolve():
            text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
            write_atomically(file, text.encode())
        elif self.skip_bad and not self.skipped_bad():  # an inferred one, with its comments
            write_atomically(file, file.read_bytes() + b"skip_bad: true\n")
        for name, content in (("stream.json", stream), ("run.json", constants)):
            write_atomically(self.folder / name, json.dumps(content, ensure_ascii=False).encode())
        lengths = checkpoint["logs"] if checkpoint else {}
        for log in LOGS:
            cut_back(self.folder / log, lengths.get(log, 0))

    def add_seconds(self) -> None:
        """Bring the run's time up to date."""
        now = time.monotonic()
        self.position.seconds += now - self.clock
        self.clock = now

    def save_checkpoint(self, **content) -> None:
        """content: nested dicts of tensors and plain numbers."""
        if not self.ranks.first:
            return
        state = self.folder / "state"
        logs = {log: size_of(self.folder / log) for log in LOGS}
        head = {"format": FORMAT, "position": vars(self.position), "logs": logs}
        with (
            staged(state / "writing.pt", give_name=self.name_checkpoint) as staging,
            open(staging, "wb") as file,
        ):
            torch.save({**head, **content}, file)  # given a path, torch does not say why it failed
        for old in checkpoints(state)[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def name_checkpoint(self, staging: Path) -> None:
        """As the newest; at the end of an update also as that which `continue` may start from, and first so."""
        digest, state = file_hash(staging), staging.parent
        numbers = [int(p.name.split("-")[0]) for p in checkpoints(state)]
        newest = state / f"{max(numbers, default=0) + 1:06d}-{digest}.pt"
        if self.position.step or not self.position.evaluated:
            rename(staging, newest)
            return
        ended = state / f"update_{self.position.update:03d}-{digest}.pt"
        rename(staging, ended)
        link_or_copy(ended, newest)
        for other in state.glob(f"update_{self.position.update:03d}-*.pt"):  # of an attempt that was killed
            if other != ended:
                other.unlink()

    def latest_checkpoint(self) -> dict | None:
        """The newest checkpoint whose bytes are those that were written."""
        state = self.folder / "state"
        for path in reversed([*kept_updates(state), *checkpoints(state)]):
            if checkpoint := read_checkpoint(path):
                return checkpoint
            print(f"{path}: damaged, passed over", file=sys.stderr)
        if (self.folder / "parent.yaml").exists():  # it cannot begin by itself
            raise UserError(f"{state}: no checkpoint is whole; make this run again with `continue`")
        return None

    def log(self, name: str, line: dict) -> None:
        if self.ranks.first:
            append_line(self.folder / name, line)

    @property
    def scored(self) -> bool:
        """Whether it has a line in metrics.jsonl."""
        return size_of(self.folder / "metrics.jsonl") > 0

    def lines(self, name: str) -> list[dict]:
        """What a log holds so far."""
        path = self.folder / name
        return read_lines(path) if path.exists() else []

    @property
    def model(self) -> Path:
        """The deployed model."""
        return recovered(self.folder / "model")

    def weights_before(self) -> OnDisk:
        """The newest weights that are kept from before this update."""
        kept = kept_updates(self.folder / "weights")
        return OnDisk([path for path in kept if update_of(path) < self.position.update][-1])

    def save_weights(self, clip: Clip, keep: int | None) -> None:
        """The deployed weights of this update, and as the model that open_clip opens."""
        if not self.ranks.first:
            return
        target = self.folder / "weights" / f"update_{self.position.update:03d}.safetensors"
        write_checkpoint(clip.model.state_dict(), target, clip.config)
        if keep is not None:
            for kept in (target.parent, self.folder / "state"):
                for old in kept_updates(kept)[1:-keep]:  # the original stays
                    old.unlink()
        self.save_model(clip)

    def save_model(self, clip: Clip) -> None:
        with staged_folder(self.folder / "model") as staging:
            save(clip, staging)

    def signalled(self) -> int:
        """The signal to any of the ranks, else 0; all must ask."""
        return self.ranks.all_reduce_max(self.signum)

    def check(self) -> None:
        if signum := self.signalled():
            raise Interrupted(signum)


def refuse_used(folder: Path, resume: bool) -> None:
    """A new run begins in an empty folder, or in one that has nothing but an inferred data file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file, accepted: a new or an empty folder")
    if is_run(folder):
        if not resume:
            choice = "choose another folder with --out, or go on with"
            raise UserError(f"{folder}: this run exists; {choice}: {way_on(folder)}")
        return
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    inferred = "data.yaml" in names and (folder / "data.yaml").read_bytes().startswith(b"# Inferred from")
    ours = {"lock", *(["data.yaml"] if inferred else []), *(["state", "weights"] if resume else [])}
    if others := sorted(names - ours):
        found = f"this folder is no run and holds {plural(len(others), 'other thing')}, as {others[0]}"
        raise UserError(f"--out {folder}: {found}; accepted: a new or an empty folder, or that of a run")


def is_run(folder: Path) -> bool:
    """Whether a run has begun there; its files are there from then on."""
    return (folder / "recipe.yaml").exists() and any((folder / name).exists() for name in ("state", LOGS[0]))


def way_on(folder: Path) -> str:
    """The command that goes on with a run, for a shell that is where this process is."""
    program = sys.argv[0] if Path(sys.argv[0]).name == "fomo.py" else "fomo.py"
    words = ["update", "--recipe", str(folder / "recipe.yaml"), "--out", str(folder), "--resume"]
    return shlex.join(["python", program, *words])


def lock(path: Path) -> IO:
    """The lock of a run folder. It ends with the process that holds it, however that ends.

    Data workers do not inherit it, as they would flock's: those of a killed process live a few seconds longer.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closing it lets go
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # either, says POSIX
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{path.parent}: {holder} is working on this run") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def same_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on with the recipe it began with."""
    differing = differences(read_yaml(path), yaml.safe_load(dump(recipe)))
    if differing:
        differ = f"the run began with another recipe, differing: {', '.join(differing)}"
        raise UserError(f"{path}: {differ}; as it began go on with: {way_on(path.parent)}")


def checkpoints(state: Path) -> list[Path]:
    """Oldest first; those that only keep an update for `continue` are not among them."""
    return sorted(state.glob("[0-9]*-*.pt"))


def kept_updates(folder: Path) -> list[Path]:
    """What keeps an update in `weights` or `state`, oldest first: update_012.safetensors, update_012-HASH.pt."""
    found = [path for path in folder.glob("update_*") if path.suffix != ".part"]
    return sorted(found, key=lambda path: (update_of(path), path.name))  # 1000 comes after 999


def update_of(path: Path) -> int:
    return int(re.match(r"update_(\d+)", path.name)[1])


def read_checkpoint(path: Path) -> dict | None:
    """None if its bytes are not those that were written."""
    if file_hash(path) != path.stem.split("-")[1]:
        return None
    checkpoint = read_torch_file(path)
    if checkpoint["format"] > FORMAT:
        found = f"format {checkpoint['format']} of a newer fomo"
        raise UserError(f"{path}: {found}, accepted: up to {FORMAT}")
    return checkpoint


def link_or_copy(path: Path, other: Path) -> None:
    """A second name for a file, without a second copy where the file system can do that."""
    try:
        os.link(path, other)
    except OSError:
        with staged(other) as staging:
            shutil.copyfile(path, staging)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def cut_back(path: Path, length: int) -> None:
    """Drop lines written after the checkpoint: they will be written again."""
    size = size_of(path)
    if size < length:
        raise UserError(f"{path}: {size} bytes, and {length} when its checkpoint was written; restore it")
    if size > length:
        os.truncate(path, length)


def read_json(path: Path) -> dict | None:
    """None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path}: not a file of a run: {one_line(error)}") from None
