"""Studies: YAML files that say what the guide claims, which runs test it, and which inequalities decide it.

    title: Merging over time
    claims:
      - id: "7"
        says: EMA-merge keeps more than finetuning does.
        place: section 5.2, Fig. 7
        paper: null                                # the paper's own number, where it gives one
        needs: ["zs(ema-merge) - zs(finetune) > 0.5"]      # all of them; see fomo/guide/inequalities.py
    variants:                                      # by name, each a recipe with changes
      finetune: {recipe: ../methods/finetune.yaml}
      ema-merge: {recipe: ../methods/ema-merge.yaml, set: {method.keep: 0.9}}
      finetune-hot: {recipe: ../methods/finetune.yaml, times: {optimizer.lr: 10}}
      ema-merge-5x: {recipe: ../methods/ema-merge.yaml, times: {stream.updates: 5}, powers: {method.keep: 0.2}}

One file serves every scale: `times` multiplies what the scale says, `powers` raises it to a power (`keep` to
the power of 0.2 keeps in five updates what it kept in one), and all updates of a variant together cost the
scale's budget however many there are, unless `times: {budget: 2}` says otherwise. What has to be named scale by
scale, other models and pretraining pools, is in `scales` and `pools`, and a variant says which (`scale: large`,
`pool: narrow`); where the scale names none, the variant is left out.

A seed varies the stream, its batches, and the rendered pictures that are learnt and scored, for which a copy of
the data file is made. The base model and the pool that updates replay are one, as in the paper, unless several
bases are asked for. Seeds from 100 on are for tuning: what is scored are training pictures, so that no test
picture has a part in choosing a setting.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import yaml

from fomo.datasets.datafile import PATHS, SOURCES
from fomo.datasets.sources.catalogue import find, with_catalogue
from fomo.errors import FieldError, UserError
from fomo.guide.inequalities import Comparison, parse
from fomo.load_recipe import ROOT, load
from fomo.recipe import Recipe
from fomo.schema import Natural, Positive, build, convert, one_of, read_yaml

FOLDER = ROOT / "studies"
APART = ("tune",)  # not one of "all": it chooses the defaults that the others use
PER_UPDATE = ("samples", "steps", "hours")  # budgets of one update; gflops is that of all
TUNING = 100  # seeds from here on are scored on training pictures
HELD_OUT = 0.1  # of every class that is learnt, for their scores


@dataclass(frozen=True)
class Claim:
    id: str  # its number in the guide: "1".."24", "T1".."T5", "trap"
    says: str
    place: str  # in the paper
    needs: list[str]  # inequalities, written down before any run
    paper: str | None = None

    def comparisons(self) -> list[Comparison]:
        return [parse(text) for text in self.needs]


@dataclass(frozen=True)
class Variant:
    recipe: str
    set: dict = field(default_factory=dict)  # {"method.keep": 0.9}
    times: dict = field(default_factory=dict)  # {"optimizer.lr": 10}; "budget": of all updates
    powers: dict = field(default_factory=dict)  # {"method.keep": 0.2}
    scale: str | None = None  # a name in the study's `scales`
    pool: str | None = None  # a name in the study's `pools`: what updates replay, on the same base model


@dataclass(frozen=True)
class Study:
    path: Path
    title: str
    variants: dict[str, Variant]
    claims: list[Claim] = field(default_factory=list)
    seeds: list[Natural] = field(default_factory=lambda: [0, 1, 2])
    scales: dict = field(default_factory=dict)  # scale -> name -> scale file
    pools: dict = field(
        default_factory=dict
    )  # scale -> name -> the `pretraining` of a data file, null: as it is
    grid: dict = field(default_factory=dict)  # row -> column -> variant: a table of GM in the report
    peaks: dict = field(default_factory=dict)  # variant -> factors of its peak, each a variant of its own

    @property
    def name(self) -> str:
        return self.path.stem

    def variants_at(self, scale: str) -> list[str]:
        """The variants for which the scale has all files."""
        scales, pools = {None, *self.scales.get(scale, {})}, {None, *self.pools.get(scale, {})}
        return [name for name, v in self.variants.items() if v.scale in scales and v.pool in pools]


def find_studies(names: tuple[str, ...] | list[str] = ()) -> list[Study]:
    """The named ones, by name or file; without names all but tune."""
    shipped = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    for name in names:
        if not name.endswith((".yaml", ".yml")):
            one_of("STUDY", name, tuple(shipped))
    chosen = names or [name for name in shipped if name not in APART]
    return [read_study(shipped.get(name) or Path(name)) for name in dict.fromkeys(chosen)]


def read_study(path: Path) -> Study:
    values = read_yaml(path)
    try:
        variants = convert(values.get("variants"), dict, "variants")
        values["variants"] = {
            str(name): build(Variant, value, f"variants.{name}") for name, value in variants.items()
        }
        study = with_peaks(build(Study, {**values, "path": path}))
        check(study)
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None
    return study


def with_peaks(study: Study) -> Study:
    """Each of a variant's peaks as a variant of its own: finetune@0.5, at half the scale's peak and with twice its
    weight decay, so that their product stays."""
    variants = dict(study.variants)
    for name, factors in study.peaks.items():
        one_of("peaks", name, tuple(study.variants))
        base = variants.pop(name)
        for factor in convert(factors, list[Positive], f"peaks.{name}"):
            times = {"optimizer.lr": factor, "optimizer.weight_decay": 1 / factor}
            variants[f"{name}@{factor:g}"] = replace(base, times={**base.times, **times})
    return replace(study, variants=variants)


def check(study: Study) -> None:
    """Everything that can be wrong with a study before its recipes are read."""
    scales, pools = (
        tuple(dict.fromkeys(name for files in by_scale.values() for name in files))
        for by_scale in (study.scales, study.pools)
    )
    for name, variant in study.variants.items():
        if variant.scale is not None:
            one_of(f"variants.{name}.scale", variant.scale, scales)
        if variant.pool is not None:
            one_of(f"variants.{name}.pool", variant.pool, pools)
    for claim in study.claims:
        for text in claim.needs:
            try:
                comparison = parse(text)
            except ValueError as error:
                raise FieldError(f"claim {claim.id}", f"{text!r}, {error}") from None
            for variant in comparison.mentioned:
                one_of(f"claim {claim.id}", variant, tuple(study.variants))


def resolve(
    study: Study, name: str, scale: str, seed: int, folder: Path, base: int = 0
) -> tuple[Recipe, dict[Path, str]]:
    """-> the complete recipe of a variant, and the data files to be written for its seed, in `folder`.

    `base`: the seed of a base model that the scale makes itself; 0 is the one that comes with it.
    """
    variant = study.variants[name]
    path = study.path.parent / variant.recipe
    size = scale if variant.scale is None else beside(study.path, study.scales[scale][variant.scale])
    pool = None if variant.pool is None else study.pools[scale][variant.pool]
    overrides = [f"{key}={json.dumps(value)}" for key, value in variant.set.items()]
    try:
        plain = load(path, scale=size)
        values = dataclasses.asdict(load(path, scale=size, seed=seed, overrides=overrides))
        change(values, plain, variant)
        values["evaluation"].update(frozen=False, keep_weights=1)
        if base and values["model"]["pretraining"]:
            values["model"]["pretraining"]["seed"] = base
        files = reseed(values, seed, pool, folder)
        return build(Recipe, values), files
    except FieldError as error:
        raise UserError(f"{study.path}: variants.{name}: {error}") from None


def beside(path: Path, scale: str) -> str:
    """A scale by its name, or by a file relative to that of the study."""
    return str(path.parent / scale) if scale.endswith((".yaml", ".yml")) else scale


def change(values: dict, plain: Recipe, variant: Variant) -> None:
    """Apply `times` and `powers`, and share the budget of all updates out among them; in place."""
    times = {key: convert(value, float, f"times.{key}") for key, value in variant.times.items()}
    of_budget = times.pop("budget", 1.0)
    for key, factor in times.items():
        section, last = number_of(values, f"times.{key}")
        section[last] = scaled(section[last], factor)
    for key, power in variant.powers.items():
        section, last = number_of(values, f"powers.{key}")
        section[last] = section[last] ** convert(power, float, f"powers.{key}")
    per_update = of_budget * plain.stream.updates / values["stream"]["updates"]
    for key, value in values["budget"].items():
        if type(value) in (int, float):
            values["budget"][key] = scaled(value, per_update if key in PER_UPDATE else of_budget)


def number_of(values: dict, where: str) -> tuple[dict, str]:
    """times.optimizer.lr -> the section that holds lr, "lr"."""
    _, *parents, last = where.split(".")
    section = values
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    if not isinstance(section, dict) or type(section.get(last)) not in (int, float):
        raise FieldError(where, "names no number of the recipe")
    return section, last


def scaled(value: float, factor: float) -> float:
    return max(1, round(value * factor)) if isinstance(value, int) else value * factor


def reseed(values: dict, seed: int, pool: list | None, folder: Path) -> dict[Path, str]:
    """Let the rendered pictures depend on the seed, and the pool replayed be `pool`. In place; -> the data file
    that this takes. Seed 0 is the file as it is.
    """
    path = Path(values["data"])
    text = data_text(path, seed, json.dumps(pool))
    if text is None:
        return {}
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    copy = folder / f"{path.stem}-seed{seed}-{digest}.yaml"
    values["data"] = str(copy)
    return {copy: text}


def validation_split(values: dict, path: Path) -> dict:
    """Both roles of a data file with scores on training pictures: a part held out of what is learnt, and the
    training split of what is not, where there is one. The rendered world draws other pictures by its seed."""
    adaptation, evaluation = {}, {}
    for name, entry in (values.get("adaptation") or {}).items():
        if "holdout" in entry:
            problem = "its training pictures are its test pictures, too; tuning needs a set with both splits"
            raise UserError(f"{path}: adaptation.{name}.holdout: {problem}")
        known = with_catalogue(entry, f"adaptation.{name}")
        learnt = {key: value for key, value in known.items() if key != "test"}
        adaptation[name] = entry if entry["source"] == "world" else {**learnt, "holdout": HELD_OUT}
    for name, entry in (values.get("evaluation") or {}).items():
        known = with_catalogue(entry, f"evaluation.{name}")
        by_name = SOURCES[entry["source"]].split_field == "split"  # of the split, not by a path
        train = known.get("train", "train" if by_name else None)
        if entry["source"] == "world":
            evaluation[name] = entry
        elif train and not ("dataset" in entry and find(entry["dataset"], name).train == 0):
            scored = {key: value for key, value in known.items() if key != "train"}
            evaluation[name] = {**scored, "test": train}
    if not evaluation:
        raise UserError(f"{path}: evaluation: no set has training pictures, which are what tuning scores")
    return {"adaptation": adaptation, "evaluation": evaluation}


@cache
def data_text(path: Path, seed: int, replayed: str) -> str | None:
    """A data file with another pretraining pool (JSON), and `seed` in every rendered set; None: as it is."""
    values, pool = read_yaml(path), json.loads(replayed)
    if pool is not None:
        values["pretraining"] = pool
    named = [values.get("adaptation") or {}, values.get("evaluation") or {}]
    entries = [*(values.get("pretraining") or []), *(entry for group in named for entry in group.values())]
    rendered = [e for group in named for e in group.values() if e.get("source") == "world"]
    if pool is None and not (rendered and seed) and seed < TUNING:
        return None
    if seed >= TUNING:
        values |= validation_split(values, path)
    for entry in entries:
        for key in PATHS:
            if key in entry and not str(entry[key]).startswith(("/", "~", "$", "hf://")):
                problem = f"{key} {entry[key]!r} is relative, and the study's copy of the file lies elsewhere"
                raise UserError(f"{path}: {problem}; start it with a variable such as ${{FOMO_DATA}}")
    if seed:
        for entry in rendered:
            entry["seed"] = seed
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
