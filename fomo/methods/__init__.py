"""Strategies by name. A new one is a file beside this one and a line in METHODS."""

from dataclasses import fields

from fomo import weights
from fomo.errors import FieldError
from fomo.methods.base import Method
from fomo.methods.distill import Distill
from fomo.methods.dora import Dora
from fomo.methods.ewc import Ewc
from fomo.methods.galore import GaLore
from fomo.methods.lora import Lora
from fomo.methods.merge import Merge
from fomo.methods.si import SynapticIntelligence
from fomo.methods.subsets import BitFit, LnFit, Locked
from fomo.methods.vera import Vera
from fomo.schema import build, one_of, refuse_unknown

METHODS: dict[str, type[Method]] = {
    "finetune": Method,
    "merge": Merge,
    "locked": Locked,
    "lnfit": LnFit,
    "bitfit": BitFit,
    "lora": Lora,
    "dora": Dora,
    "vera": Vera,
    "galore": GaLore,
    "ewc": Ewc,
    "si": SynapticIntelligence,
    "distill": Distill,
}
FINETUNE = {"name": "finetune"}  # what a merge tunes by, if it does not say


def build_method(spec: dict, where: str = "method") -> Method:
    """{'name': 'lora', 'rank': 4} -> Lora(rank=4); FieldErrors name the field, below `where`."""
    cls = method_class(spec, where)
    values = {key: value for key, value in spec.items() if key != "name"}
    refuse_unknown(values, sorted(accepted_fields(spec)), where)
    if cls is Merge:
        values = merge_fields(values, where)
    try:
        return build(cls, values, where)
    except FieldError as error:  # a method's own checks do not know that it stands under a merge
        name, _, problem = str(error).partition(": ")
        raise FieldError(
            name if name.startswith(where) else name.replace("method", where, 1), problem
        ) from None


def merge_fields(values: dict, where: str) -> dict:
    """A merge's fields with its method and its rule built. What is not a field of Merge is one of the rule's."""
    over_time = {key: value for key, value in values.items() if key in init_fields(Merge)}
    of_rule = {key: value for key, value in values.items() if key not in over_time}
    return {
        **over_time,
        "tune": build_method(values.get("tune", FINETUNE), f"{where}.tune"),
        "rule": weights.build_rule({"rule": values.get("rule", "interpolate"), **of_rule}, where),
    }


def method_class(spec: dict, where: str = "method") -> type[Method]:
    if not isinstance(spec, dict) or "name" not in spec:
        raise FieldError(where, f"expected named fields with `name`, got {spec!r}")
    one_of(f"{where}.name", spec["name"], tuple(METHODS))
    return METHODS[spec["name"]]


def accepted_fields(spec: dict) -> set[str]:
    """What a recipe may say beside the method's name; of a merge the rule's fields, too."""
    cls = method_class(spec)
    rule = weights.RULES.get(str(spec.get("rule", "interpolate")), weights.Rule)
    return init_fields(cls) | (init_fields(rule) if cls is Merge else set())


def init_fields(cls: type) -> set[str]:
    return {f.name for f in fields(cls) if f.init}


def innermost(spec: dict) -> dict:
    """The method that tunes; merges wrap one."""
    while method_class(spec) is Merge:
        spec = spec.get("tune", FINETUNE)
    return spec
