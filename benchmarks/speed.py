"""Training speed beside open_clip's own loop: same model, pictures, captions, batch, precision and threads.

Both read the same JPEG files and one table of captions. The peer is open_clip_train's `train_one_epoch` with its
usual pipeline: decoding, training transforms, tokenizer, the full context of every caption, AdamW as its main.py
makes it. Ours is `train` over Batches. The second row takes away what the peer does not have: no pixel cache, no
trimming.

Each side lives in a process of its own, so that its memory is its own, and sleeps while the others work. They take
turns: what else the machine does meets all alike.
"""

import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import click
import numpy as np
import open_clip
import torch
from open_clip.transform import AugmentationCfg, image_transform
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fomo.clip import Clip, contrastive_loss, encode, new  # noqa: E402
from fomo.datasets import datafile  # noqa: E402
from fomo.datasets.mixture import Batches, Pool, pool_of  # noqa: E402
from fomo.datasets.samples import Collection, Samples  # noqa: E402
from fomo.datasets.sources.base import Source  # noqa: E402
from fomo.datasets.sources.tables import Table  # noqa: E402
from fomo.datasets.sources.world import World  # noqa: E402
from fomo.devices import peak_memory, pick_device  # noqa: E402
from fomo.distributed import ALONE, Ranks  # noqa: E402
from fomo.errors import Failure, UserError  # noqa: E402
from fomo.load_recipe import load  # noqa: E402
from fomo.methods import Method  # noqa: E402
from fomo.methods.base import Inputs  # noqa: E402
from fomo.progress import Progress  # noqa: E402
from fomo.recipe import Optimizer  # noqa: E402
from fomo.runs.step_log import Timed  # noqa: E402
from fomo.train import compiled, on_device, train  # noqa: E402

MODELS = ("tiny", "ViT-B-32")
WARM = 1  # steps of a turn before the clock starts
SETTINGS = Optimizer(lr=1e-4)
TABLE = "captions.tsv"


@dataclass(frozen=True)
class Case:
    """What all sides do alike."""

    model: str  # "tiny", or open_clip's name
    config: dict  # open_clip's model_cfg
    batch_size: int
    steps: int  # that a turn measures
    device: str
    threads: int | None  # of torch, on the CPU; null: its default
    workers: int  # processes that make batches
    compile: bool = False  # our side
    accumulate: int = 1  # parts of a batch, our side
    precision: str = "auto"

    def clip(self) -> Clip:
        """The model, with random weights."""
        return replace(new(self.config, seed=0), precision=self.precision)

    @property
    def pictures(self) -> int:
        return self.batch_size * (WARM + self.steps)

    @property
    def image_size(self) -> int:
        return self.config["vision_cfg"]["image_size"]


class Turn(NamedTuple):
    """What one side did in one turn."""

    rate: float  # samples/s
    waited: float  # share of the time that it waited for data
    memory: int  # bytes, the peak of its process; on CUDA of the device


def compare_models(
    models: tuple[str, ...] = MODELS,
    *,
    data: str | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    turns: int = 5,
    device: str = "auto",
    workers: int = 0,
    precision: str = "auto",
) -> dict:
    """-> {"rows": [...]}. Pictures are rendered, or those of the pretraining pool of the file `data`."""
    rows = []
    for model in models:
        case = case_of(model, batch_size, threads, pick_device(device).type, workers)
        case = replace(case, precision=precision)
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(case, data, Path(folder))
            rows += compare(case, Path(folder), turns)
    return {"rows": rows}


def case_of(model: str, batch_size: int | None, threads: int | None, device: str, workers: int) -> Case:
    """With the sizes that suit the model where none are given."""
    if model == "tiny":
        scale = load(None, scale="tiny")
        config, size, steps = scale.model.config, scale.optimizer.batch_size, 25
        threads = threads or scale.threads
    else:
        config = open_clip.get_model_config(model)
        if config is None or config.keys() != {"embed_dim", "vision_cfg", "text_cfg"}:
            raise UserError(f"--model {model}: neither tiny nor a plain CLIP that open_clip knows by name")
        size, steps = (256, 20) if device == "cuda" else (32, 2)
    return Case(model, config, batch_size or size, steps, device, threads, workers)


def write_pictures(case: Case, data: str | None, folder: Path) -> None:
    """As many pictures as a turn takes, as JPEG files and a table of their captions."""
    rendered = World("base", per_concept=300, style="mixed", size=case.image_size)
    sources = [rendered] if data is None else datafile.read(data).pool()
    if not sources:
        raise UserError(f"{data}: pretraining: no pool to take pictures from")
    choice, captions = np.random.default_rng(0), []
    for number in range(case.pictures):
        source = sources[number % len(sources)]
        index = int(choice.integers(len(source)))
        captions.append(" ".join(Samples.describe(source, index)[0].split()))
        source.image(index).convert("RGB").save(folder / f"{number}.jpg", quality=95)
    write_table(folder / TABLE, captions)


def write_table(path: Path, captions: list[str]) -> None:
    """Of the pictures 0.jpg, 1.jpg, ... beside it."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["filepath", "title"])
        table.writerows([f"{number}.jpg", caption] for number, caption in enumerate(captions))


def compare(case: Case, folder: Path, turns: int) -> list[dict]:
    done: dict[str, list[Turn]] = {name: [] for name in SIDES}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(contender(name, case, folder)) for name in SIDES}
        for _ in Progress(range(turns), desc=f"training {case.model}", unit="turn", leave=False):
            for name, take_turn in sides.items():
                done[name].append(take_turn())
    return [
        row("train", case, done["ours"], done["peer"]),
        row("train, no cache, no trimming", case, done["plain"], done["peer"]),
    ]


def row(what: str, case: Case, ours: list[Turn], peer: list[Turn]) -> dict:
    """Medians over turns; the ratio is taken turn by turn, `ratios` are the lowest and the highest."""
    own, other = (statistics.median(turn.rate for turn in turns) for turns in (ours, peer))
    ratios = sorted(a.rate / b.rate for a, b in zip(ours, peer, strict=True))
    said = {key: value for key, value in asdict(case).items() if key not in ("model", "config")}
    return {
        "what": what,
        "model": case.model,
        "ours": own,
        "peer": other,
        "ratio": statistics.median(ratios),
        "unit": "samples/s",
        "ratios": [ratios[0], ratios[-1]],
        "turns": len(ours),
        "data_wait": [statistics.median(turn.waited for turn in turns) for turns in (ours, peer)],
        "peak_memory": [max(turn.memory for turn in turns) for turns in (ours, peer)],
        **said,
    }


def text(found: dict) -> str:
    """The rows as a table; of pairs the first is ours."""
    rows = [
        ("samples/s", "model", "ours", "peer", "ratio", "lowest", "highest", "waits for data", "peak GiB")
    ]
    for r in found["rows"]:
        rates = [f"{r[key]:.1f}" for key in ("ours", "peer")]
        ratios = [f"{ratio:.2f}" for ratio in (r["ratio"], *r["ratios"])]
        waits = " ".join(f"{share:.0%}" for share in r["data_wait"])
        peaks = " ".join(f"{size / 2**30:.2f}" for size in r["peak_memory"])
        rows.append((r["what"], r["model"], *rates, *ratios, waits, peaks))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    )


@contextmanager
def contender(side: str, case: Case, folder: Path) -> Iterator[Callable[[], Turn]]:
    """A process in which one side waits for its turns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, side, case, folder))
    process.start()
    there.close()

    def take_turn() -> Turn:
        here.send(None)
        try:
            return here.recv()
        except EOFError:
            raise Failure(f"bench: the process of {side} ended before its turn did") from None

    try:
        yield take_turn
    finally:
        here.close()  # which ends it
        process.join()


def serve(connection: Connection, side: str, case: Case, folder: Path) -> None:
    os.environ["FOMO_CACHE"] = str(folder / "cache")
    turns = SIDES[side](case, folder, pick_device(case.device, case.threads))
    with suppress(EOFError):
        while True:
            connection.recv()
            connection.send(next(turns))


def ours(case: Case, folder: Path, device: torch.device) -> Iterator[Turn]:
    return turns_of(case, case.clip(), pictures_of(folder), device)


def plain(case: Case, folder: Path, device: torch.device) -> Iterator[Turn]:
    source = pictures_of(folder)
    source.cache = "never"
    return turns_of(case, Untrimmed(**vars(case.clip())), source, device)


class Untrimmed(Clip):
    """Gives every caption the whole context."""

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return list(self.tokenizer(texts).to(torch.int32).numpy())


def pictures_of(folder: Path, table: str = TABLE) -> Source:
    return Table(str(folder / table), separator="\t")


def turns_of(
    case: Case, clip: Clip, source: Source, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[Turn]:
    """Turns of our training; with several ranks each takes its rows of the same batches."""
    side, pool = OurSide(clip, device, ranks), pool_from(source, clip)
    for number in count():
        yield side.loop(case, pool, number)


def pool_from(source: Source, clip: Clip) -> Pool:
    """All its pictures, from the pixel cache."""
    return pool_of(Collection([Samples(source, clip, clip.image_size, "pictures")]), (0,))


class OurSide:
    """A model and its optimizer: through our loop, or only the arithmetic of its steps."""

    def __init__(self, clip: Clip, device: torch.device, ranks: Ranks = ALONE):
        self.clip, self.device, self.ranks = clip, device, ranks
        self.optimizer = Method().optimizer(list(clip.model.to(device).parameters()), SETTINGS)
        self.precision = clip.precision_on(device)

    def loop(self, case: Case, pool: Pool, number: int = 0) -> Turn:
        """`train` over the batches of an update, of which one is left: at the last, worker processes are ended."""
        last = WARM + case.steps
        batches = Batches([("pretraining", pool, case.batch_size)], 0, number, last + 1)
        rows = batches.rows(self.ranks.rank, self.ranks.world_size)
        loader = Timed(rows.loader(workers=case.workers, pin=self.device.type == "cuda"))
        steps = train(
            self.clip,
            Method(),
            self.optimizer,
            loader,
            lambda step: SETTINGS.lr,
            device=self.device,
            precision=self.precision,
            clip_norm=SETTINGS.clip_norm,
            max_scale=100.0,
            accumulate=case.accumulate,
            compile=case.compile,
            ranks=self.ranks,
        )
        for step in steps:
            if step.number + 1 == WARM:
                lap(loader, self.device)
            if step.number + 1 == last:
                break
        return turn(case, loader, self.device)

    def resident(self, case: Case, pool: Pool, count: int) -> list[Inputs]:
        """So many batches, on the device and cropped."""
        batches = Batches([("pretraining", pool, case.batch_size)], 0, 0, count)
        return list(on_device(batches.loader(), self.clip, self.device))

    def bare(self, case: Case, resident: Sequence[Inputs]) -> Turn:
        """Forward, backward, clipping and AdamW on batches that are there already, in turn."""
        clock, model = Timed([]), self.clip.model.train()
        encoder = compiled() if case.compile else encode
        for number in range(WARM + case.steps):
            inputs = resident[number % len(resident)]
            if number == WARM:
                lap(clock, self.device)
            with self.precision.autocast():
                features = encoder(model, inputs.images, inputs.tokens)
            contrastive_loss(features).backward()
            nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return turn(case, clock, self.device)


def peer(case: Case, folder: Path, device: torch.device) -> Iterator[Turn]:
    clip = case.clip()
    model = clip.model.to(device)
    model.output_dict = True
    pairs = Pairs(pictures_of(folder), clip)
    precision = clip.precision_on(device)
    args = SimpleNamespace(
        device=device.type,
        precision={None: "fp32", torch.bfloat16: "amp_bf16", torch.float16: "amp"}[precision.dtype],
        grad_clip_norm=SETTINGS.clip_norm,
        accum_freq=1,
        batch_size=case.batch_size,
        log_every_n_steps=100,
        skip_scheduler=True,
        distill=False,
        horovod=False,
        wandb=False,
        rank=0,
        local_rank=0,
        world_size=1,
    )
    optimizer = peers_optimizer(model)
    scaler = precision.scaler if precision.scaler.is_enabled() else None
    loss = open_clip.ClipLoss(cache_labels=True)
    for number in count():
        batches = DataLoader(
            pairs,
            case.batch_size,
            sampler=RandomSampler(pairs, num_samples=case.pictures),
            drop_last=True,
            num_workers=case.workers,
            pin_memory=device.type == "cuda",
        )
        loader = PeersLoader(Timed(batches), case, device)
        data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        train_one_epoch(model, data, loss, number, optimizer, scaler, None, None, args)
        yield loader.turn


class Pairs(Dataset):
    """open_clip_train's CsvDataset, which needs pandas, with the crops that open_clip trains with."""

    def __init__(self, source: Source, clip: Clip):
        self.source, self.tokenizer = source, clip.tokenizer
        self.transform = image_transform(
            clip.image_size, is_train=True, mean=clip.mean, std=clip.std, aug_cfg=AugmentationCfg()
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.source.image(index)), self.tokenizer(self.source.captions(index))[0]


class PeersLoader:
    """What train_one_epoch expects of a loader. Starts the clock before batch WARM is asked for, and stops it when
    one is asked for after the last, before worker processes are ended."""

    turn: Turn

    def __init__(self, timed: Timed, case: Case, device: torch.device):
        self.timed, self.case, self.device = timed, case, device
        self.num_batches, self.num_samples = WARM + case.steps, case.pictures

    def __iter__(self) -> Iterator[list[Tensor]]:
        for number, batch in enumerate(self.timed, 1):
            yield batch
            if number == WARM:
                lap(self.timed, self.device)
            if number == self.num_batches:
                self.turn = turn(self.case, self.timed, self.device)


def peers_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As open_clip_train's main.py: no decay of gains and biases, torch's own choice of implementation."""
    named = list(model.named_parameters())
    plain = [
        p for n, p in named if p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias", "logit_scale"))
    ]
    kept = {id(p) for p in plain}
    rest = [p for _, p in named if id(p) not in kept]
    groups = [
        {"params": plain, "weight_decay": 0.0},
        {"params": rest, "weight_decay": SETTINGS.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=tuple(SETTINGS.betas), eps=SETTINGS.eps)


def lap(loader: Timed, device: torch.device) -> tuple[float, float]:
    """-> seconds since the last lap, those waited for data."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return loader.lap()


def turn(case: Case, loader: Timed, device: torch.device) -> Turn:
    seconds, waited = lap(loader, device)
    return Turn(case.steps * case.batch_size / seconds, waited / seconds, peak_memory(device))


SIDES = {"ours": ours, "peer": peer, "plain": plain}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="tiny or open_clip's name; by default both of MODELS.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=2), help="By default what suits the model and the device."
)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True, help="Of each side.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of torch on the CPU; by default the scale's or all."
)
@click.option("--data", metavar="FILE", help="Take pictures from this data file's pretraining pool.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto")
@click.option("--precision", type=click.Choice(["auto", "float32", "bf16", "fp16"]), default="auto")
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Processes that make batches.")
def main(as_json, models, **how):
    """Training speed beside open_clip's own loop, side by side on this machine: minutes."""
    try:
        found = compare_models(models or MODELS, **how)
    except (UserError, Failure) as error:
        raise click.ClickException(str(error)) from None
    print(json.dumps(found, indent=2) if as_json else text(found))


if __name__ == "__main__":
    main()
