"""Recipes from YAML: scale < recipe < command line; a mistake is one line that names the file and the field."""

import typing
from pathlib import Path

import yaml

from fomo.errors import FieldError, UserError
from fomo.recipe import BUDGETS, Optimizer, Recipe
from fomo.schema import NOT_YAML, build, locate, one_of, read_yaml, sections

PRETRAINED_LR = 1e-5  # peak for open_clip's models, at batch 512 (paper, section 6.1)
ROOT = Path(__file__).resolve().parents[1] / "recipes"


def locate_fields(values: dict, file: Path) -> None:
    """Make the paths that `file` says absolute, in place."""
    model, stream = values.get("model"), values.get("stream")
    pretraining = model.get("pretraining") if isinstance(model, dict) else None
    for section, key in ((values, "data"), (pretraining, "data"), (stream, "file"), (stream, "counts")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = locate(section[key], file)


def load(
    path: str | Path | None = None,
    *,
    scale: str | None = None,
    model: str | None = None,
    data: str | None = None,
    seed: int | None = None,
    overrides: typing.Sequence[str] = (),
    fitted: dict | None = None,
) -> Recipe:
    """Read a recipe with its scale and the command line's overrides ("key.path=value").

    fitted: what suits the data (own.py), over the scale's choice and under the recipe's.
    """
    recipe_path = Path(path) if path else None
    said = sections(Recipe, read_yaml(recipe_path), recipe_path) if recipe_path else {}
    if recipe_path:
        locate_fields(said, recipe_path)
    line: dict = {}
    for override in overrides:
        set_path(line, override)
    if seed is not None:
        line["seed"] = seed
    if data is not None:
        line["data"] = str(Path(data).resolve())
    if model is not None:
        line["model"] = split_model(model)
    sections(Recipe, line, "command line")
    scale_name = scale or line.get("scale") or said.get("scale") or "tiny"
    scale_path, sized, defaults = load_scale(str(scale_name))
    reference = sized.get("optimizer", {}).get("batch_size") if fitted else None
    named = line.get("model") or said.get("model") or {}
    replaced = sized.pop("model", None) if named.get("name") or named.get("pretrained") else None
    if replaced and not same_architecture(named.get("pretrained"), replaced):
        sized.pop("threads", None)  # they suit the scale's own model, and so do its peaks
        defaults, reference = {**defaults, "lr": {"finetune": PRETRAINED_LR}}, Optimizer.batch_size
    sized = merged(sized, {k: v for k, v in (fitted or {}).items() if k != "defaults"})
    defaults = {**defaults, **(fitted or {}).get("defaults", {})}
    values = merged(merged(merged(sized, said), line), {"scale": str(scale_name)})
    origins = [("command line", line), (str(recipe_path), said), (str(scale_path), sized)]
    try:
        return build(Recipe, with_defaults(values, defaults, reference))
    except FieldError as error:
        raise UserError(f"{origin_of(error.field, origins)}: {error}") from None


def same_architecture(pretrained: str | None, own: dict) -> bool:
    """Whether a local model directory holds what the scale would make: then its peak rates hold, too."""
    config = Path(str(pretrained or "")) / "open_clip_config.json"
    if not own.get("config") or not config.is_file():
        return False
    found = read_yaml(config).get("model_cfg")  # JSON is YAML
    return isinstance(found, dict) and {k: found.get(k) for k in own["config"]} == own["config"]


def load_scale(name: str) -> tuple[Path, dict, dict]:
    """-> (path, the scale's recipe fields, its defaults by method). NAME in recipes/scales/ or a file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else ROOT / "scales" / f"{name}.yaml"
    if not path.exists() and path.parent == ROOT / "scales":
        one_of("scale", name, tuple(sorted(p.stem for p in path.parent.glob("*.yaml"))))
    values = read_yaml(path)
    defaults = values.pop("defaults", {})
    if not isinstance(defaults, dict) or not isinstance(defaults.get("lr", {}), dict):
        expected = "expected named fields, `lr` with a rate by method"
        raise UserError(f"{path}: defaults: {expected}, got {defaults!r}")
    locate_fields(sections(Recipe, values, path), path)
    return path, values, defaults


def split_model(text: str) -> dict:
    """--model NAME/TAG or a path -> the `model` section."""
    if Path(text).exists() or text.startswith((".", "/", "~")):
        return {"pretrained": str(Path(text).expanduser().resolve())}
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
        values[last] = yaml.safe_load(text)
    except NOT_YAML:
        raise UserError(f"--set {override}: {text!r} is not a YAML value") from None


def merged(low: dict, high: dict) -> dict:
    """`high` over `low`, section by section; a method that says its name, and a budget's amount, replace."""
    out = dict(low)
    for key, value in high.items():
        below = out.get(key)
        both = isinstance(value, dict) and isinstance(below, dict)
        if both and key == "budget" and any(name in value for name in BUDGETS):
            below = {k: v for k, v in below.items() if k not in BUDGETS}
        replaces = key == "method" and both and "name" in value
        out[key] = merged(below, value) if both and not replaces else value
    return out


def with_defaults(values: dict, defaults: dict, reference: int | None) -> dict:
    """Fill in the scale's `defaults` where the recipe leaves them open: keep, and lr by the innermost method
    (`lora-64` before `lora`; finetune's for a method that the scale does not list), scaled from the batch size
    `reference`, if there is one, by a square root, as suits AdamW (Malladi et al. 2022, arXiv 2205.10287)."""
    from fomo.methods import accepted_fields, build_method, innermost  # methods import this module

    method = values.get("method", {"name": "finetune"})
    build_method(method)  # its own checks
    values = merged({"method": method, "optimizer": {}}, values)
    peaks = defaults.get("lr", {})
    inner = innermost(method)
    known = (f"{inner['name']}-{inner.get('rank')}", inner["name"], "finetune")
    lr = next((peaks[name] for name in known if name in peaks), None)
    said = values["optimizer"]
    if isinstance(said, dict) and said.get("lr") is None and lr is not None:
        size = said.get("batch_size")
        if reference and isinstance(size, int) and size > 0:
            lr = float(f"{float(lr) * (size / reference) ** 0.5:.3g}")
        values["optimizer"] = {**said, "lr": lr}
    fill = {
        k: v for k, v in defaults.items() if k != "lr" and k in accepted_fields(method) and k not in method
    }
    values["method"] = {**method, **fill}
    return values


def origin_of(dotted: str, origins: list[tuple[str, dict]]) -> str:
    """Which file (or the command line) said the field `dotted`; the recipe if none did."""
    for name, values in origins:
        for key in dotted.split("."):
            values = values.get(key.split("[")[0], ...) if isinstance(values, dict) else ...
        if values is not ...:
            return name
    return next(name for name, _ in origins[1:] if name != "None")
