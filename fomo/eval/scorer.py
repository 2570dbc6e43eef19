"""What the weights of a life are worth: the scores of a line in metrics.jsonl."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fomo.clip import Clip
from fomo.datasets.features import image_features
from fomo.datasets.pools import Material
from fomo.datasets.samples import Samples
from fomo.distributed import ALONE, Ranks
from fomo.eval.ridge_baseline import trajectory
from fomo.eval.transfer import Row, row_of, transfer
from fomo.eval.zero_shot import drift, drift_features, drift_sample, evaluate
from fomo.report.run_records import read_lines
from fomo.weights import Interpolate, merge


@dataclass
class Scorer:
    clip: Clip
    material: Material
    device: torch.device
    seed: int
    check: Callable[[], None]  # raises where a signal asks to stop
    ranks: Ranks = ALONE  # that share the encoding
    original: Tensor | None = None  # features (N, D) of the untouched model, for the drift
    rows: list[Row] = field(default_factory=list)  # of all evaluations so far, for the transfer

    def score(self, full: bool = False) -> tuple[dict, dict | None]:
        """The scores on the subsets and, if asked for and different, on the whole test sets."""
        material = self.material
        pictures = sum(len(test.usable if full else material.subsets[test.name]) for test in material.tests)
        with tqdm(total=pictures, desc="evaluating", unit="img", leave=False) as progress:

            def tick(n: int) -> None:
                progress.update(n)
                self.check()

            how = {"full": full, "tick": tick, "ranks": self.ranks}
            return evaluate(self.clip, material.tests, material.subsets, self.device, **how)

    def drift(self) -> float | None:
        """How far the image features of the pretraining pool have turned; the first call sets what from."""
        pool = self.material.pretraining
        sample = drift_sample(pool, self.seed)
        if not len(sample):
            return None
        features = drift_features(self.clip, pool, sample, self.device, self.ranks)
        if self.original is None:
            self.original = features
        return drift(self.original, features)

    def transfer(self, newest: dict, log: Path) -> dict[str, float | None]:
        """After the line `newest` of concepts.jsonl. `log`: what earlier processes wrote there is read once."""
        stream = [[(concept.dataset, concept.label) for concept in update] for update in self.material.stream]
        if not self.rows and log.exists():
            self.rows = [row_of(line, stream) for line in read_lines(log)]
        self.rows.append(row_of(newest, stream))
        return transfer(self.rows)

    def keep_curve(
        self, old: Mapping[str, Tensor], tuned: Mapping[str, Tensor], keeps: list[float]
    ) -> list[dict]:
        """Was it worth it? Scores of the interpolations between old weights (keep 1) and tuned ones (keep 0)."""
        model = self.clip.model
        deployed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        old = {name: old[name].to(self.device) for name in old}
        rows = []
        try:
            for keep in keeps:
                model.load_state_dict(dict(merge(Interpolate(keep=keep), [old, tuned])))
                scores, _ = self.score()
                rows.append({"keep": keep, **{key: scores[key] for key in ("ka", "zs", "gm")}})
        finally:  # an interruption saves the model
            model.load_state_dict(deployed)
        return rows

    def frozen_baseline(self) -> list[float]:
        """KA of the frozen baseline over the whole stream, of the model as it is now."""
        material = self.material
        tests = [t for t in material.tests if t.role == "adaptation" and t.task == "classification"]
        taught = (material.numbers([concepts]) for concepts in material.stream)
        with tqdm(desc="frozen baseline", unit="img", leave=False) as progress:

            def features(samples: Samples, numbers: np.ndarray) -> Tensor:
                return image_features(self.clip, samples, numbers, self.device, progress.update, self.ranks)

            return trajectory(map(material.by_dataset, taught), tests, features) if tests else []
