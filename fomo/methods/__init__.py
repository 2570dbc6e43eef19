"""Strategies by name. A new one is a file beside this one and a line in METHODS."""

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
from fomo.schema import one_of, refuse_unknown

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


def build_method(spec: dict, where: str = "method") -> Method:
    """{'name': 'merge', 'keep': 0.5} -> Merge(keep=0.5)."""
    method = method_class(spec, where)
    fields = {key: value for key, value in spec.items() if key != "name"}
    refuse_unknown(fields, sorted(method.accepted(fields)), where)
    try:
        return method.from_spec(fields, where)
    except FieldError as error:  # a method's own checks do not know that it stands under a merge
        name, _, problem = str(error).partition(": ")
        raise FieldError(
            name if name.startswith(where) else name.replace("method", where, 1), problem
        ) from None


def method_class(spec: dict, where: str = "method") -> type[Method]:
    if not isinstance(spec, dict) or "name" not in spec:
        raise FieldError(where, f"expected named fields with `name`, got {spec!r}")
    one_of(f"{where}.name", spec["name"], tuple(METHODS))
    return METHODS[spec["name"]]


def accepted_fields(spec: dict) -> set[str]:
    return method_class(spec).accepted(spec)


def innermost(spec: dict) -> dict:
    """The method that tunes; merges wrap one."""
    while method_class(spec) is Merge:
        spec = spec.get("tune", {"name": "finetune"})
    return spec
