"""The run folder: everything one `update` read, did and made.

A checkpoint is complete or absent: it is written aside, flushed, hashed, and renamed to a name that carries the
hash, so a truncated or altered file is recognised by its name and the one before it is used.
"""

import hashlib
import json
import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from fomo.clip import Clip, save
from fomo.errors import Interrupted, UserError
from fomo.files import settle, write_atomically, write_tensors
from fomo.recipe import Recipe, dump

KEPT_CHECKPOINTS = 2
LOGS = ("metrics.jsonl", "train.jsonl")


@dataclass
class Position:
    """How far a run is."""

    updates: int = 0  # T, once the stream is known
    update: int = 0  # updates finished
    step: int = 0  # steps done in the next one
    evaluated: bool = False  # whether the weights after `update` have been scored
    samples: int = 0
    seconds: float = 0.0

    @property
    def finished(self) -> bool:
        return self.evaluated and 0 < self.updates == self.update


@dataclass
class Run:
    folder: Path
    position: Position = field(default_factory=Position)
    signum: int = 0

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, resume: bool) -> tuple["Run", dict | None]:
        """-> the run and the checkpoint to go on from. Refuses to write over a run; writes nothing yet."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
        if any(folder.iterdir()) and not resume:
            raise UserError(
                f"{folder}: this run exists; go on with --resume, or choose another folder with --out"
            )
        run = cls(folder)
        if (folder / "recipe.yaml").exists():
            same_recipe(folder / "recipe.yaml", recipe)
        checkpoint = run.latest_checkpoint()
        if checkpoint:
            run.position = Position(**checkpoint["position"])
        return run, checkpoint

    def begin(self, recipe: Recipe, checkpoint: dict | None) -> None:
        """Make the folder what the checkpoint says, or a new run."""
        for name in ("state", "weights"):
            (self.folder / name).mkdir(exist_ok=True)
        write_atomically(self.folder / "recipe.yaml", dump(recipe).encode())
        lengths = checkpoint["logs"] if checkpoint else {}
        for log in LOGS:
            cut_back(self.folder / log, lengths.get(log, 0))
        for signum in (signal.SIGTERM, signal.SIGINT):  # noted, and acted on at the next `check`
            signal.signal(signum, lambda number, frame: setattr(self, "signum", number))

    def save_checkpoint(self, **content) -> None:
        """content: nested dicts of tensors and plain numbers."""
        logs = {log: size_of(self.folder / log) for log in LOGS}
        state = self.folder / "state"
        staging = state / "writing.pt"
        torch.save({"position": vars(self.position), "logs": logs, **content}, staging)
        digest = file_hash(staging)
        numbers = [int(p.name.split("-")[0]) for p in state.glob("*-*.pt")]
        settle(staging, state / f"{max(numbers, default=0) + 1:06d}-{digest}.pt")
        for old in sorted(state.glob("*-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def latest_checkpoint(self) -> dict | None:
        """The newest checkpoint whose bytes are those that were written."""
        for path in sorted((self.folder / "state").glob("*-*.pt"), reverse=True):
            if file_hash(path) == path.stem.split("-")[1]:
                return torch.load(path, map_location="cpu", weights_only=True)
        return None

    def log(self, name: str, line: dict) -> None:
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def save_weights(self, clip: Clip, keep: int | None) -> None:
        """The deployed weights of this update, and as the model that open_clip opens."""
        target = self.folder / "weights" / f"update_{self.position.update:03d}.safetensors"
        write_tensors(clip.model.state_dict(), target)
        if keep is not None:
            for old in sorted(target.parent.glob("update_*.safetensors"))[1:-keep]:  # the original stays
                old.unlink()
        self.save_model(clip)

    def save_model(self, clip: Clip) -> None:
        fresh, place, old = (self.folder / name for name in ("model.part", "model", "model.old"))
        shutil.rmtree(fresh, ignore_errors=True)
        save(clip, fresh)
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        fresh.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def check(self) -> None:
        if self.signum:
            raise Interrupted(self.signum)


def same_recipe(path: Path, recipe: Recipe) -> None:
    """A run goes on with the recipe it began with."""
    before, now = yaml.safe_load(path.read_text(encoding="utf-8")), yaml.safe_load(dump(recipe))
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        raise UserError(f"{path}: the run began with another recipe, differing: {', '.join(differing)}")


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
    if size_of(path) > length:
        os.truncate(path, length)
