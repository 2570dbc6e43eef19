"""Scoring during a run: what stands in a line of metrics.jsonl beside the costs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from fomo.clip import Clip
from fomo.datasets.features import image_features
from fomo.datasets.pools import Pools
from fomo.datasets.samples import Samples
from fomo.datasets.stream import composition
from fomo.distributed import ALONE, Ranks
from fomo.eval.ridge_baseline import trajectory
from fomo.eval.transfer import Row, mtil, row_of, row_of_sets, tic, transfer
from fomo.eval.zero_shot import Scores, drift, drift_features, drift_sample, evaluate
from fomo.progress import Progress
from fomo.weights import Interpolate, Weights, merge


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Other weights may be loaded; in the end, and if an interruption saves the model, it has its own again."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(own)


@dataclass
class Scorer:
    clip: Clip
    pools: Pools
    device: torch.device
    seed: int
    check: Callable[[], None]  # raises where a signal asks to stop
    ranks: Ranks = ALONE  # that share the encoding
    original: Tensor | None = None  # features (N, D) of the untouched model, for the drift
    rows: list[Row] = field(default_factory=list)  # of all evaluations so far, for the transfer

    def score(self, full: bool = False) -> tuple[Scores, Scores | None]:
        """The scores on the subsets and, if asked for and different, on the whole test sets."""
        tests, subsets = self.pools.tests, self.pools.subsets
        pictures = sum(len(test.usable if full else subsets[test.name]) for test in tests)
        with Progress(total=pictures, desc="evaluating", unit="img", leave=False) as progress:

            def tick(n: int) -> None:
                progress.update(n)
                self.check()

            return evaluate(self.clip, tests, subsets, self.device, full=full, tick=tick, ranks=self.ranks)

    def drift(self) -> float | None:
        """How far the image features of the pretraining pool have turned; the first call sets what from."""
        pool = self.pools.pretraining
        sample = drift_sample(pool, self.seed)
        if not len(sample):
            return None
        features = drift_features(self.clip, pool, sample, self.device, self.ranks)
        if self.original is None:
            self.original = features
        return drift(self.original, features)

    def of_stream(
        self, line: dict, by_class: dict, lines: Callable[[str], list[dict]], periods: bool
    ) -> dict[str, dict]:
        """What updates did to each other; and at the end MTIL's numbers, and TiC-CLIP's of a stream of periods.

        line, by_class: the newest of metrics.jsonl and concepts.jsonl; `lines` reads those before from a log.
        """
        stream = [[(concept.dataset, concept.label) for concept in update] for update in self.pools.stream]
        if not self.rows:
            self.rows = [row_of(earlier, stream) for earlier in lines("concepts.jsonl")]
        self.rows.append(row_of(by_class, stream))
        found = {"transfer": transfer(self.rows), "mtil": mtil(self.rows)}
        if periods:
            earlier = [scored for scored in lines("metrics.jsonl") if "step" not in scored]
            sets = composition(self.pools.stream)
            found["tic"] = tic([row_of_sets(scored, sets) for scored in [*earlier, line]])
        return {name: numbers for name, numbers in found.items() if numbers}

    def predictions(self, scores: Scores) -> dict[str, dict[str, list]]:
        """By dataset what each picture is called, its class and that which it is taken for, by number."""
        found = {}
        for test in self.pools.tests:
            if test.source is not None:
                numbers = self.pools.subsets[test.name]
                pictures = [test.source.id_of(number) for number in numbers.tolist()]
                labels, predicted = (
                    test.samples.labels[numbers].tolist(),
                    scores.datasets[test.name].predicted,
                )
                found[test.name] = {"pictures": pictures, "labels": labels, "predicted": predicted}
        return found

    def keep_curve(
        self, old: Mapping[str, Tensor], tuned: Mapping[str, Tensor], keeps: list[float]
    ) -> list[dict]:
        """Was it worth it? Scores of the interpolations between old weights (keep 1) and tuned ones (keep 0)."""
        old = {name: old[name].to(self.device) for name in old}
        rows = []
        with restored(self.clip.model):
            for keep in keeps:
                self.clip.model.load_state_dict(dict(merge(Interpolate(keep=keep), [old, tuned])))
                scores, _ = self.score()
                rows.append({"keep": keep, **scores.means})
        return rows

    def validate(self, options: Iterable[tuple[float | None, Weights]]) -> dict[float | None, Scores]:
        """The scores on the validation pictures of each of several weights."""
        tests, scores = self.pools.validation, {}
        numbers = {test.name: test.usable for test in tests}
        with Progress(desc="choosing", unit="img", leave=False) as progress:

            def tick(n: int) -> None:
                progress.update(n)
                self.check()

            model, place = self.clip.model, self.device
            with restored(model):
                for keep, weights in options:
                    model.load_state_dict(weights)
                    scores[keep], _ = evaluate(self.clip, tests, numbers, place, tick=tick, ranks=self.ranks)
        return scores

    def ridge_baseline(self) -> list[float]:
        """KA of ridge regression on frozen features over the whole stream, of the model as it is now."""
        pools = self.pools
        tests = [t for t in pools.tests if t.role == "adaptation" and t.task == "classification"]
        updates = (pools.by_dataset(pools.numbers([concepts])) for concepts in pools.stream)
        with Progress(desc="frozen baseline", unit="img", leave=False) as progress:

            def features(samples: Samples, numbers: np.ndarray) -> Tensor:
                return image_features(self.clip, samples, numbers, self.device, progress.update, self.ranks)

            return trajectory(updates, tests, features) if tests else []
