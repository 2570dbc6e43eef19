"""The one interface of every strategy. `Method` itself is plain finetuning.

Two sentences carry the design: `before_update` leaves in the model the weights to train from, `after_update`
leaves in it the weights to deploy. The loop in update.py owns forward, backward, clipping and schedule.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fomo.clip import Features
from fomo.distributed import ALONE, Ranks
from fomo.recipe import Optimizer
from fomo.weights import Weights

Autocast = Callable[[], AbstractContextManager]  # devices.Precision.autocast


class Inputs(NamedTuple):
    """A batch of B pairs on the training device; of several ranks each has B of the batch's N B."""

    images: Tensor  # (B, 3, S, S) float32, normalised
    tokens: Tensor  # (B, L) int64
    pools: Tensor  # (B,) int64: 0 pretraining, 1 update, 2 buffer (datasets.mixture.POOLS)
    ranks: Ranks = ALONE  # that have a share of the batch: `ranks.gather` gives the rows of all
    text_ids: Tensor | None = None  # (B,), where equal captions are positives (clip.contrastive_loss)


@dataclass
class Method:
    """Finetune everything (the paper's full-ft). Hooks in call order, all with working defaults.

    A method's dataclass fields are what a recipe may say of it, checked by their types (schema.py).
    """

    chosen: float | None = field(default=None, init=False)  # of what is `deployable`, for `after_update`

    def keep_in(self, folder: Path) -> None:
        """Before `prepare`: the run folder, for a method whose state is too large for memory."""

    def prepare(self, model: nn.Module) -> list[nn.Parameter]:
        """Once per run: alter the model if needed; return what is trained."""
        return [p for p in model.parameters() if p.requires_grad]

    def before_update(self, model: nn.Module) -> None:
        """Leave in the model the weights to train from."""

    def named_parameters(self, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
        """What is trained has these names, by which a learning rate can differ (param_groups.py)."""
        return model.named_parameters()

    def optimizer(self, parameters: list, settings: Optimizer) -> torch.optim.Optimizer:
        """A fresh one for each update: empty moments, weight decay on all parameters (paper, section 4).

        parameters: those, or groups of them as any optimizer of torch takes.
        """
        flat = [p for group in parameters for p in (group["params"] if isinstance(group, dict) else [group])]
        fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in flat)
        return torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=tuple(settings.betas),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=fused,
        )

    def penalty(self, model: nn.Module, batch: Inputs, features: Features) -> Tensor | float:
        """Every step, under autocast: a scalar added to the contrastive loss; of several ranks, their mean."""
        return 0.0

    def after_step(self, model: nn.Module, lr: float) -> None:
        """Every step, after the optimizer moved; the clipped gradients are still there."""

    def deployable(self, model: nn.Module) -> Iterator[tuple[float | None, Weights]]:
        """What could be deployed if the update ended here, by the share of the old model (None: has none)."""
        yield None, self.export(model)

    def after_update(
        self, model: nn.Module, batches: Iterable[Inputs], autocast: Autocast = nullcontext
    ) -> None:
        """Leave in the model the weights to deploy.

        `batches`: this update's, made when iterated. `autocast()`: a context that computes in the run's precision.
        """

    def export(self, model: nn.Module) -> Weights:
        """Plain open_clip weights: what merges and checkpoints of users see. Copies."""
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def load(self, model: nn.Module, weights: Weights) -> None:
        """Plain open_clip weights in."""
        model.load_state_dict(weights)

    def state(self) -> dict:
        """What a checkpoint must hold besides the model: named tensors and plain numbers."""
        return {}

    def load_state(self, state: dict) -> None:
        """The inverse of `state`, after `prepare`."""

    def cost(self, step: float, batch: int) -> tuple[float, float]:
        """FLOPs on top of those of a training step, which are counted: (of each step, of each update).

        After `prepare`. A step of `batch` pairs has `step` FLOPs, with what `penalty` and `optimizer` multiply.
        """
        return 0.0, 0.0
