"""Recipes: YAML -> frozen dataclasses.

A recipe is one complete experiment. It names a `scale` (model, data, budget and the defaults of that size);
precedence is scale < recipe < command line. What `load` returns is complete: written out by `dump`, it repeats
the run. Every mistake is one line that names the file and the field (fomo/fields.py).
"""

import dataclasses
from dataclasses import dataclass, field

import yaml

from fomo.errors import FieldError
from fomo.schedules import Schedule
from fomo.schema import at_least, one_of


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


@dataclass(frozen=True)
class Model:
    """Either `name` and/or `pretrained` (see clip.load), or `config` and `pretraining` for a model of our own."""

    name: str | None = None  # open_clip's name, "hf-hub:...", "local-dir:..."
    pretrained: str | None = None  # open_clip's tag, a checkpoint file, or a local model directory
    config: dict | None = None  # open_clip's model_cfg
    pretraining: Pretraining | None = None

    def __post_init__(self):
        if (
            self.name is None
            and self.pretrained is None
            and (self.config is None or self.pretraining is None)
        ):
            raise FieldError("model", "say name and/or pretrained, or both config and pretraining")


ORDERS = ("random", "frequency", "performance", "similarity", "time", "dataset")


@dataclass(frozen=True)
class Stream:
    """All concepts in order, cut into T updates (datasets/orders.py)."""

    order: str = "random"
    updates: int = 20  # T
    reverse: bool = False
    seed: int | None = None  # the recipe's
    file: str | None = None  # a stream in the official format, in place of an order
    partial: bool = False  # of `file`, what the data has; false: anything missing is an error
    counts: str | None = None  # frequency: a file of class names and counts; null: in the pool's captions
    whole: bool = False  # time: datasets of one year one after the other, not shuffled together
    per_dataset: bool = False  # every dataset is an update, instead of T equal chunks

    def __post_init__(self):
        one_of("stream.order", self.order, ORDERS)
        at_least("stream.updates", self.updates, 1)


@dataclass(frozen=True)
class Mixture:
    """Shares of a batch that come from the three pools (lambda_P, lambda_D, lambda_B; paper, section 3.2)."""

    pretraining: float = 0.33
    update: float = 0.34
    buffer: float = 0.33
    empty_buffer: str = "split"  # first update: buffer's share half to each of the others; or all to `update`
    limit: int | None = None  # samples that the buffer keeps of all it has seen, uniformly; null: all

    def __post_init__(self):
        shares = {"pretraining": self.pretraining, "update": self.update, "buffer": self.buffer}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise FieldError(f"mixture.{name}", f"got {share:g}, a share lies between 0 and 1")
        if abs(sum(shares.values()) - 1) > 1e-6:
            raise FieldError("mixture", f"shares must sum to 1, got {sum(shares.values()):g} from {shares}")
        one_of("mixture.empty_buffer", self.empty_buffer, ("split", "update"))
        if self.limit is not None:
            at_least("mixture.limit", self.limit, 1)


BUDGETS = ("gflops", "samples", "steps", "hours")


@dataclass(frozen=True)
class Budget:
    """What a life may cost; exactly one of the first four."""

    gflops: float | None = None  # memory-adjusted (paper, section 3.2), in total over all updates
    samples: int | None = None  # per update
    steps: int | None = None  # per update
    hours: float | None = None  # per update, of wall clock, its evaluation included
    fisher: str = "once"  # per update, or as the paper's Table 4 "per_step": how EWC's Fisher pass is charged

    def __post_init__(self):
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise FieldError("budget", f"say exactly one of {', '.join(BUDGETS)}, got {found}")
        for name in ("samples", "steps"):
            if getattr(self, name) is not None:
                at_least(f"budget.{name}", getattr(self, name), 1)
        for name in ("gflops", "hours"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FieldError(f"budget.{name}", f"must be positive, got {value:g}")
        one_of("budget.fisher", self.fisher, ("once", "per_step"))


@dataclass(frozen=True)
class Optimizer:
    lr: float | None = None  # peak; from the scale's defaults for the method
    batch_size: int = 512  # pairs per step, all three pools together
    weight_decay: float = 0.2  # on all parameters, as the paper
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    accumulate: int = 1  # parts that a batch goes through the model in; its loss stays that of the whole

    def __post_init__(self):
        at_least("optimizer.batch_size", self.batch_size, 2)
        at_least("optimizer.accumulate", self.accumulate, 1)
        if self.accumulate > self.batch_size:
            found = f"{self.accumulate} parts of {self.batch_size} pairs"
            raise FieldError("optimizer.accumulate", f"{found}, accepted: at most a part per pair")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FieldError(f"optimizer.{name}", f"must be positive, got {value:g}")
        for name in ("weight_decay", "clip_norm"):
            at_least(f"optimizer.{name}", getattr(self, name), 0)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise FieldError("optimizer.betas", f"two numbers in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class Temperature:
    init: float | None = None  # tau = 1 / exp(logit_scale); the checkpoint's
    learn: bool | None = None  # by method: adapters and locked towers leave it alone
    max: float | None = 100.0  # bound of exp(logit_scale), as open_clip; null: none, as the released code

    def __post_init__(self):
        for name in ("init", "max"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise FieldError(f"temperature.{name}", f"must be positive, got {value:g}")


@dataclass(frozen=True)
class Evaluation:
    subset: float = 0.1  # share of each test set scored during the run, at least 300 and 2 per class; 1: all
    within: int = 0  # so many evaluations of the weights in training within each update, evenly spaced
    every: int = 1  # evaluate after every n-th update (and always after the last)
    keep_weights: int | None = 3  # how many of the latest deployed weights to keep; null: all
    frozen: bool = False  # also score ridge regression on the untouched model's features
    keeps: list[float] = field(default_factory=list)  # last update: score these shares of the old model, too

    def __post_init__(self):
        if not 0 < self.subset <= 1:
            raise FieldError("evaluation.subset", f"a share in (0, 1], got {self.subset:g}")
        at_least("evaluation.within", self.within, 0)
        at_least("evaluation.every", self.every, 1)
        for i, keep in enumerate(self.keeps):
            if not 0 <= keep <= 1:
                raise FieldError(f"evaluation.keeps[{i}]", f"a share between 0 and 1, got {keep:g}")
        if self.keep_weights is not None:
            at_least("evaluation.keep_weights", self.keep_weights, 1)


@dataclass(frozen=True)
class Recipe:
    model: Model
    data: str  # path of the data file
    scale: str = "tiny"
    seed: int = 0
    precision: str = "auto"  # float32, bf16, fp16; auto: bf16 (or fp16) autocast on CUDA, float32 elsewhere
    threads: int | None = None  # of torch on the CPU; torch's default
    compile: bool = False  # torch.compile, for a few lengths of captions
    checkpointing: bool = False  # compute each block again in the backward pass: less memory, more time
    stream: Stream = field(default_factory=Stream)
    mixture: Mixture = field(default_factory=Mixture)
    budget: Budget = field(default_factory=Budget)
    method: dict = field(default_factory=lambda: {"name": "finetune"})
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    temperature: Temperature = field(default_factory=Temperature)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        at_least("seed", self.seed, 0)
        if self.threads is not None:
            at_least("threads", self.threads, 1)
        one_of("precision", self.precision, ("auto", "float32", "bf16", "fp16"))
        if self.optimizer.lr is None:
            raise FieldError(
                "optimizer.lr", f"not given, and scale {self.scale} has no default for this method"
            )
        if self.steps == 0:
            size = self.optimizer.batch_size
            raise FieldError("budget.samples", f"{self.budget.samples} is less than one batch of {size}")

    @property
    def steps(self) -> int | None:
        """Optimizer steps per update (N); None where they are counted (gflops) or timed (hours)."""
        if self.budget.samples is not None:
            return self.budget.samples // self.optimizer.batch_size
        return self.budget.steps


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
