"""A recipe, one complete experiment, as frozen dataclasses.

Their types say what is accepted; fomo/schema.py checks it when fomo/load_recipe.py builds a recipe from YAML. What
fields say of each other is checked here. Written out by `dump`, a recipe repeats its run.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

import yaml

from fomo.datasets.dates import PERIODS
from fomo.errors import FieldError
from fomo.schedules import Schedule
from fomo.schema import Count, Natural, NotNegative, Positive, Range, Share
from fomo.text import plural


@dataclass(frozen=True)
class Pretraining:
    """How the base model of a scale is made (`python fomo.py pretrain`)."""

    data: str  # data file whose `pretraining` pool it learns
    samples: int
    batch_size: int
    lr: float
    warmup: float = 0.02  # share of the steps
    floor: float = 0.1  # end well above zero: restarting a fully annealed model costs retention by itself
    weight_decay: float = 0.1
    seed: int = 0
    stored: str | None = None  # the finished model, which stands for these settings (pretrain.py)


@dataclass(frozen=True)
class Model:
    """Either `name` and/or `pretrained` (see clip.load), or `config` and `pretraining` for a model of our own."""

    name: str | None = None  # open_clip's name, "hf-hub:...", "local-dir:..."
    pretrained: str | None = (
        None  # open_clip's tag, a checkpoint file, or a local directory (transformers', too)
    )
    config: dict | None = None  # open_clip's model_cfg
    pretraining: Pretraining | None = None
    image_size: Count | None = None  # side of the pictures that a ViT sees, if another than its own

    def __post_init__(self):
        named = self.name is not None or self.pretrained is not None
        if not named and (self.config is None or self.pretraining is None):
            raise FieldError("model", "say name and/or pretrained, or both config and pretraining")


@dataclass(frozen=True)
class Stream:
    """All concepts in order, cut into T updates (datasets/orders.py)."""

    order: Literal["random", "frequency", "performance", "similarity", "time", "dataset"] = "random"
    updates: Count = 20  # T; with `every`, what that makes
    reverse: bool = False
    seed: int | None = None  # the recipe's
    file: str | None = None  # a stream in the official format, in place of an order
    partial: bool = False  # of `file`, what the data has; false: anything missing is an error
    counts: str | None = None  # frequency: a file of class names and counts; null: in the pool's captions
    whole: bool = False  # time: datasets of one year one after the other, not shuffled together
    per_dataset: bool = False  # every dataset is an update, instead of T equal chunks
    # time: each month, quarter or year of dated pictures is an update, or each of so many parts of about equal
    # size; all are scored after each (datasets/periods.py)
    every: str | Count | None = None

    def __post_init__(self):
        if self.every is None:
            return
        if isinstance(self.every, str) and self.every not in PERIODS:
            accepted = f"accepted: {', '.join(PERIODS)}, or a number of equal parts"
            raise FieldError("stream.every", f"got {self.every!r}, {accepted}")
        if self.order != "time":
            raise FieldError(
                "stream.every", f"makes updates in time order, say `order: time`, got {self.order}"
            )
        for name in ("file", "whole", "per_dataset"):
            if getattr(self, name):
                raise FieldError(f"stream.{name}", "does not go together with stream.every")


@dataclass(frozen=True)
class Mixture:
    """Shares of a batch that come from the three pools (lambda_P, lambda_D, lambda_B; paper, section 3.2)."""

    pretraining: Share = 0.33
    update: Share = 0.34
    buffer: Share = 0.33
    # first update: buffer's share half to each of the others; or all to `update`
    empty_buffer: Literal["split", "update"] = "split"
    limit: Count | None = None  # samples that the buffer keeps of all it has seen, uniformly; null: all

    def __post_init__(self):
        total = self.pretraining + self.update + self.buffer
        if abs(total - 1) > 1e-6:
            found = f"{self.pretraining:g} + {self.update:g} + {self.buffer:g} = {total:g}"
            raise FieldError("mixture", f"got {found}, accepted: shares that sum to 1")


BUDGETS = ("gflops", "samples", "steps", "hours")


@dataclass(frozen=True)
class Budget:
    """What a run may cost; exactly one of the first four. `budget: auto` is `auto: true` with a scale's amount."""

    gflops: Positive | None = None  # memory-adjusted (paper, section 3.2), in total over all updates
    samples: Count | None = None  # per update
    steps: Count | None = None  # per update
    hours: Positive | None = None  # per update, of wall clock, its evaluation included
    auto: bool = False  # an update may end earlier, where validation is best (choice.py)
    fisher: Literal["once", "per_step"] = "once"  # EWC's Fisher pass: per update, or as the paper's Table 4

    def __post_init__(self):
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise FieldError("budget", f"say exactly one of {', '.join(BUDGETS)}, got {found}")


@dataclass(frozen=True)
class Optimizer:
    lr: Positive | None = None  # peak; from the scale's defaults for the method
    batch_size: Annotated[int, Range(2)] = 512  # pairs per step, all three pools together
    weight_decay: NotNegative = 0.2  # on all parameters, as the paper
    betas: list[Annotated[float, Range(0, 1, below=True)]] = field(default_factory=lambda: [0.9, 0.999])
    eps: Positive = 1e-8
    clip_norm: NotNegative = 1.0  # global gradient norm; 0 switches clipping off
    lr_text: Positive | None = None  # peak of the text tower; null: that of the others
    layer_decay: Annotated[float, Range(0, 1, above=True)] = (
        1.0  # by which the peak falls from block to block
    )
    accumulate: Count = 1  # parts that a batch goes through the model in; its loss stays that of the whole

    def __post_init__(self):
        if self.accumulate > self.batch_size:
            found = f"{self.accumulate} parts of {plural(self.batch_size, 'pair')}"
            raise FieldError("optimizer.accumulate", f"got {found}, accepted: at most a part per pair")
        if len(self.betas) != 2:
            raise FieldError("optimizer.betas", f"got {self.betas}, accepted: two numbers")


@dataclass(frozen=True)
class Loss:
    # of a batch, for each other's pictures. null: positives for a sigmoid loss, which else learns that a class is
    # not itself; negatives, as the paper, for the softmax, to which it makes no difference (clip.contrastive_loss)
    equal_captions: Literal["positives", "negatives"] | None = None


@dataclass(frozen=True)
class Temperature:
    init: Positive | None = None  # tau = 1 / exp(logit_scale); the checkpoint's
    learn: bool | None = None  # by method: adapters and locked towers leave it alone
    # bound of exp(logit_scale) where it is trained, or its start if that is higher; null: none, as released
    max: Positive | None = 100.0


@dataclass(frozen=True)
class Evaluation:
    # subset: share of each test set scored during the run, at least 300 and 2 per class; 1: all
    subset: Annotated[float, Range(0, 1, above=True)] = 0.1
    # so many evaluations of the weights in training within each update, evenly spaced
    within: Natural = 0
    every: Count = 1  # evaluate after every n-th update (and always after the first and the last)
    keep_weights: Count | None = 3  # how many of the latest deployed weights to keep; null: all
    frozen: bool = False  # also score ridge regression on the untouched model's features
    keeps: list[Share] = field(default_factory=list)  # last update: score these shares of the old model, too


@dataclass(frozen=True)
class Recipe:
    model: Model
    data: str  # path of the data file
    scale: str = "tiny"
    seed: Natural = 0
    # auto: bf16 (or fp16) autocast on CUDA, bf16 on a CPU where it is faster, float32 elsewhere
    precision: Literal["auto", "float32", "bf16", "fp16"] = "auto"
    threads: Count | None = None  # of torch on the CPU; torch's default
    compile: bool = False  # torch.compile, for a few lengths of captions
    checkpointing: bool = False  # compute each block again in the backward pass: less memory, more time
    stream: Stream = field(default_factory=Stream)
    mixture: Mixture = field(default_factory=Mixture)
    budget: Budget = field(default_factory=Budget)
    method: dict = field(default_factory=lambda: {"name": "finetune"})
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loss: Loss = field(default_factory=Loss)
    temperature: Temperature = field(default_factory=Temperature)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        if self.optimizer.lr is None:
            raise FieldError(
                "optimizer.lr", f"not given, and scale {self.scale} has no default for this method"
            )
        if self.budget.auto and self.schedule.meta == "infinite":
            raise FieldError("budget.auto", "ends an update early, which schedule.meta infinite does itself")
        if self.steps == 0:
            size = self.optimizer.batch_size
            raise FieldError("budget.samples", f"{self.budget.samples} is less than one batch of {size}")

    @property
    def chooses(self) -> bool:
        """Whether something is chosen on validation pictures."""
        return self.budget.auto or self.chooses_keep

    @property
    def chooses_keep(self) -> bool:
        return self.method.get("keep") == "auto"

    @property
    def evaluated_every(self) -> int:
        """Evaluate after every n-th update; of periods after each, for the matrix of all by all."""
        return 1 if self.stream.every else self.evaluation.every

    @property
    def steps(self) -> int | None:
        """Optimizer steps per update (N); None where they are counted (gflops) or timed (hours)."""
        if self.budget.samples is not None:
            return self.budget.samples // self.optimizer.batch_size
        return self.budget.steps


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
