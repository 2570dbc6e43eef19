"""Recipes from YAML, in layers: scale < fitted to the data < recipe file < command line.

A mistake is one line that names the layer it is in and the field.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from fomo.errors import FieldError, UserError
from fomo.methods import accepted_fields, build_method, innermost
from fomo.recipe import BUDGETS, Optimizer, Recipe
from fomo.schema import (
    NOT_YAML,
    Count,
    NotNegative,
    Positive,
    build,
    convert,
    locate,
    one_of,
    parse_yaml,
    read_yaml,
)
from fomo.text import plural

ROOT = Path(__file__).resolve().parents[1] / "recipes"
RELEASED = ROOT / "scales" / "by_method" / "released.yaml"  # what suits released models, at batch 512


def load(
    path: str | Path | None = None,
    *,
    scale: str | None = None,
    model: str | None = None,
    image_size: int | None = None,
    data: str | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
    fitted: dict | None = None,
) -> Recipe:
    """Read a recipe with its scale and the command line's overrides ("key.path=value").

    fitted: fields that suit the data, with `defaults` as a scale has them (datasets/infer.py).
    """
    file = read_fields(Path(path)) if path else {}
    line = command_line(model, image_size, data, seed, overrides)
    chosen = merged(file, line)
    name = str(chosen.get("scale") or "tiny") if scale is None else scale
    scale_path = path_of(name)
    lowest = read_fields(scale_path)
    defaults = read_defaults(lowest, scale_path)
    if fitted:
        lowest, defaults = for_the_data(lowest, defaults, fitted)
    if is_another(chosen.get("model", {}), lowest.get("model", {})):
        lowest, defaults = for_another_model(lowest, defaults)
    layers = {str(scale_path): lowest, str(path): file, "command line": line}
    values = {**merged(lowest, chosen), "scale": name}
    try:
        recipe = build(Recipe, with_defaults(values, defaults))
        return of_periods(recipe, chosen.get("stream", {}).get("updates")) if recipe.stream.every else recipe
    except FieldError as error:
        origins = [origin for origin, fields in layers.items() if has(fields, error.field)]
        raise UserError(f"{[str(path or scale_path), *origins][-1]}: {error}") from None


def of_periods(recipe: Recipe, updates: int | None) -> Recipe:
    """With as many updates as the data has periods. updates: what the recipe says itself, not its scale."""
    from fomo.datasets.periods import count_updates, read_for

    found = count_updates(read_for(recipe))
    if updates not in (None, found):
        made = f"stream.every {recipe.stream.every} makes {plural(found, 'update')} of {recipe.data}"
        raise FieldError("stream.updates", f"{made}, got {updates}; leave it out")
    return dataclasses.replace(recipe, stream=dataclasses.replace(recipe.stream, updates=found))


def has(values: dict, dotted: str) -> bool:
    """Whether a field such as evaluation.keeps[0] is among nested values."""
    name, _, rest = dotted.partition(".")
    name = name.split("[")[0]
    return isinstance(values, dict) and name in values and (not rest or has(values[name], rest))


# --- the layers ---


def read_fields(path: Path) -> dict:
    """The fields that a file gives, with absolute paths."""
    values = checked_sections(read_yaml(path), path)
    for section, key in path_fields(values):
        section[key] = locate(section[key], path)
    return values


def path_fields(values: dict) -> list[tuple[dict, str]]:
    """The sections and keys of those given fields that are paths."""
    pretraining, stream = values.get("model", {}).get("pretraining"), values.get("stream")
    paths = [(values, "data"), *((pretraining, key) for key in ("data", "stored"))]
    paths += [(stream, key) for key in ("file", "counts")]
    return [(s, key) for s, key in paths if isinstance(s, dict) and isinstance(s.get(key), str)]


def checked_sections(values: dict, origin: str | Path) -> dict:
    """`values`, if every section of a recipe that they have holds named fields; a budget may be `auto`."""
    if values.get("budget") == "auto":
        values["budget"] = {"auto": True}
    for field in dataclasses.fields(Recipe):
        section = values.get(field.name, {})
        if dataclasses.is_dataclass(field.type) and not isinstance(section, dict):
            raise UserError(f"{origin}: {field.name}: expected named fields, got {section!r}")
    return values


def path_of(scale: str) -> Path:
    """NAME in recipes/scales/ or a file."""
    if scale.endswith((".yaml", ".yml")):
        return Path(scale)
    files = {path.stem: path for path in sorted((ROOT / "scales").glob("*.yaml"))}
    one_of("scale", scale, tuple(files))
    return files[scale]


def read_defaults(scale: dict, path: Path) -> dict:
    """What a scale has where a recipe leaves it open, taken out of it: `lr` and `weight_decay` by method, above
    those of the file that `from` names, and fields of methods."""
    try:
        defaults = convert(scale.pop("defaults", {}), dict, "defaults")
        file = convert(defaults.pop("from", None), str | None, "defaults.from")
        below = read_tables(Path(locate(file, path))) if file else {}
        return {**defaults, **merged(below, tables_of(defaults)), "tuned_at": None}
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None


def read_tables(path: Path) -> dict:
    values = read_yaml(path)
    try:
        return tables_of(values)
    except FieldError as error:
        raise UserError(f"{path}: {error}") from None


def tables_of(values: dict) -> dict:
    """Peak learning rates and weight decay, each by method."""
    tables = {}
    for name, kind in (("lr", Positive), ("weight_decay", NotNegative)):
        table = convert(values.get(name, {}), dict, f"defaults.{name}")
        tables[name] = {k: convert(value, kind, f"defaults.{name}.{k}") for k, value in table.items()}
    return tables


def for_the_data(scale: dict, defaults: dict, fitted: dict) -> tuple[dict, dict]:
    """A scale with what suits the data over it; its peaks are for the batch size that it had."""
    fields = {key: value for key, value in fitted.items() if key != "defaults"}
    tuned_at = scale.get("optimizer", {}).get("batch_size")
    return merged(scale, fields), {**defaults, **fitted.get("defaults", {}), "tuned_at": tuned_at}


def for_another_model(scale: dict, defaults: dict) -> tuple[dict, dict]:
    """A scale without the threads, peaks and weight decay that suit its own model alone."""
    fields = {key: value for key, value in scale.items() if key != "threads"}
    return fields, {**defaults, **read_tables(RELEASED), "tuned_at": Optimizer.batch_size}


def is_another(model: dict, of_scale: dict) -> bool:
    """Whether a model other than the scale's is named. A local directory may hold what the scale would make."""
    if not is_named("model", model) or not of_scale:
        return False
    file, config = Path(str(model.get("pretrained") or "")) / "open_clip_config.json", of_scale.get("config")
    found = read_yaml(file).get("model_cfg") if config and file.is_file() else None  # JSON is YAML
    return not isinstance(found, dict) or any(found.get(key) != value for key, value in config.items())


def command_line(
    model: str | None, image_size: int | None, data: str | None, seed: int | None, overrides: Sequence[str]
) -> dict:
    values: dict = {}
    for override in overrides:
        set_path(values, override)
    if seed is not None:
        values["seed"] = seed
    if data is not None:
        values["data"] = str(Path(data).resolve())
    checked_sections(values, "command line")
    for section, key in path_fields(values):
        section[key] = os.path.abspath(os.path.expanduser(section[key]))
    if model is not None:  # below --set model.name=NAME, which says what a file is
        values["model"] = {**split_model(model), **values.get("model", {})}
    if image_size is not None:
        values["model"] = {**values.get("model", {}), "image_size": image_size}
    return values


def split_model(text: str) -> dict:
    """--model NAME/TAG or a path -> the `model` section."""
    if Path(text).exists() or text.startswith((".", "/")):
        # A link stays one: what lies beside it says what the model is.
        return {"pretrained": os.path.abspath(text)}
    if text.startswith(("hf-hub:", "local-dir:")):
        return {"name": text}
    name, _, tag = text.partition("/")
    return {"name": name, "pretrained": tag} if tag else {"name": name}


def set_path(values: dict, override: str) -> None:
    """Put "a.b=value" into the nested dict `values`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"--set {override}: expected KEY=VALUE, as in --set optimizer.lr=3e-6")
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {parent} is a value already, it has no fields")
    try:
        values[last] = parse_yaml(text)
    except NOT_YAML:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from None


# --- one over the other ---


def merged(low: dict, high: dict) -> dict:
    """`high` over `low`, section by section; a named method or model, and a budget's amount, replace."""
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and not is_named(key, value):
            if key == "budget" and any(name in value for name in BUDGETS):
                below = {k: v for k, v in below.items() if k not in (*BUDGETS, "auto")}
            value = merged(below, value)
        elif key == "model" and isinstance(below, dict) and not is_named(key, below):
            value = {**{k: v for k, v in below.items() if k == "image_size"}, **value}  # said of any model
        out[key] = value
    return out


def is_named(section: str, values: dict) -> bool:
    names = {"method": ("name",), "model": ("name", "pretrained")}.get(section, ())
    return any(values.get(name) is not None for name in names)


def with_defaults(values: dict, defaults: dict) -> dict:
    """Fill in the `defaults` of a scale where the recipe leaves them open."""
    method = values.get("method", {"name": "finetune"})
    build_method(method)  # its own checks
    left_open = [key for key in defaults if key in accepted_fields(method) and key not in method]
    optimizer = {**values.get("optimizer", {})}
    if optimizer.get("lr") is None:
        size = convert(optimizer.get("batch_size", Optimizer.batch_size), Count, "optimizer.batch_size")
        optimizer["lr"] = scaled(by_method(method, defaults["lr"]), size, defaults["tuned_at"])
    decay = by_method(method, defaults["weight_decay"])
    if "weight_decay" not in optimizer and decay is not None:
        optimizer["weight_decay"] = decay
    return {**values, "method": method | {key: defaults[key] for key in left_open}, "optimizer": optimizer}


def by_method(method: dict, table: dict) -> float | None:
    """`lora-64` or `locked-text` before `lora` or `locked`, `merge` where a merge finetunes, else finetune's."""
    inner = innermost(method)
    name = "merge" if inner["name"] == "finetune" and method["name"] == "merge" else inner["name"]
    known = (f"{name}-{inner.get('rank', inner.get('tower'))}", name, "finetune")
    return next((table[name] for name in known if name in table), None)


def scaled(peak: float | None, size: int, tuned_at: int | None) -> float | None:
    """A peak for batches of another size, by a square root as suits AdamW (Malladi et al. 2022, 2205.10287)."""
    if peak is None or tuned_at is None:
        return peak
    return float(f"{peak * (size / tuned_at) ** 0.5:.3g}")
