"""Command line of fomo. Start reading here; each command is one call into the package.

python fomo.py update --recipe recipes/merge.yaml
python fomo.py update --recipe recipes/finetune.yaml --set optimizer.lr=3e-4 --seed 1
python fomo.py report runs/merge-tiny-seed0 runs/finetune-tiny-seed1 -o both.html
"""

import os
import sys
from pathlib import Path

import click

from fomo.errors import Failure, Interrupted, UserError


class Commands(click.Group):
    """A user's mistake is one line and exit status 2, a failure while running is one line and 1."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except UserError as error:
            status, message = 2, str(error)
        except Failure as error:
            status, message = 1, str(error)
        except BrokenPipeError:  # `| head` has seen enough: click ends quietly
            raise
        except OSError as error:  # a full disk, a folder that may not be written
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            status, message = 1, " ".join(text.split())
        except KeyboardInterrupt:  # before the run has anything to save
            status, message = 130, "interrupted"
        except Interrupted as stop:
            status, message = stop.exit_status, str(stop)
        print(f"fomo: {message}", file=sys.stderr)
        ctx.exit(status)


class Place(click.ParamType):
    """A path, or a name that stands for one. A leading `~` is the home folder, quoted or not; no variables."""

    name = "path"

    def __init__(self, accepted):
        self.accepted = accepted

    def get_metavar(self, param, ctx):
        return self.accepted

    def convert(self, value, param, ctx):
        if not value.strip():
            name = param.opts[0] if isinstance(param, click.Option) else self.accepted
            raise UserError(f"{name}: empty, accepted: {self.accepted}")
        return os.path.expanduser(value)


def shared_options(*names):
    """Several of the shared options at once."""
    shared = {
        "scale": click.option(
            "--scale", type=Place("NAME|FILE"), help="Model, data, budget and defaults of a size."
        ),
        "set": click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one recipe field."
        ),
        "seed": click.option("--seed", type=int, help="Seed of the stream and of every draw."),
        "model": click.option(
            "--model",
            type=Place("NAME/TAG|PATH"),
            help="Start from this model, not the scale's: of open_clip or transformers, on the hub or here.",
        ),
        "image-size": click.option(
            "--image-size",
            type=click.IntRange(min=1),
            metavar="N",
            help="Side of its pictures, if another than its own; a ViT's position embeddings are interpolated.",
        ),
        "data": click.option(
            "--data",
            type=Place("FILE|DIR"),
            help="A data file, a folder, a table or a shard; else the scale's.",
        ),
        "one_class": click.option(
            "--one-class", is_flag=True, help="Accept a folder with a single class, whose score says nothing."
        ),
        "device": click.option(
            "--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", show_default=True
        ),
        "workers": click.option(
            "--workers",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Processes that make batches.",
        ),
        "skip-bad": click.option(
            "--skip-bad", is_flag=True, help="Go on without pictures that cannot be read, however many."
        ),
    }

    def decorate(command):
        for name in reversed(names):
            command = shared[name](command)
        return command

    return decorate


def show_version(ctx, param, wanted):
    """What a report of a fault should say."""
    if not wanted:
        return
    from importlib.metadata import version

    from fomo import __version__

    beside = ", ".join(f"{name} {version(name)}" for name in ("torch", "open_clip_torch"))
    print(f"fomo {__version__} ({beside}, Python {sys.version.split()[0]})")
    ctx.exit()


@click.group(cls=Commands)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of fomo, torch and open_clip.",
)
def cli():
    """Keep a CLIP model up to date over its life, under a compute budget, without forgetting what it knew."""


@cli.command()
@click.option("--recipe", "path", type=Place("FILE"), help="One experiment; by default recipes/guide.yaml.")
@click.option(
    "--out", type=Place("DIR"), help="The run folder; by default runs/RECIPE-SCALE-seedN or runs/DATA."
)
@click.option("--resume", is_flag=True, help="Go on where the run folder stands.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and write nothing.")
@shared_options(
    "one_class", "model", "image-size", "data", "scale", "set", "seed", "device", "workers", "skip-bad"
)
def update(path, dry_run, device, workers, skip_bad, **options):
    """Take a model through every update of a recipe and evaluate it after each.

    --data may be a folder of pictures (class folders, a table, tar shards): one update teaches them all.
    """
    from fomo.distributed import process_group
    from fomo.runs.lineage import start_run

    with process_group(device) as ranks:
        recipe, folder = ranks.broadcast_object(lambda: start_run(path, dry_run=dry_run, **options))
        if dry_run:
            from fomo.budget import dry_run as preview

            print(ranks.broadcast_object(lambda: preview.dry_run(recipe, device)))
        else:
            how = {"resume": options["resume"], "skip_bad": skip_bad, "device": device, "workers": workers}
            run_and_report(recipe, folder, ranks, **how)


def run_and_report(recipe, folder, ranks, **how):
    from fomo.report.page import report_run
    from fomo.update import run_recipe

    run_recipe(recipe, folder, ranks=ranks, **how)
    print(ranks.broadcast_object(lambda: report_run(folder)))


@cli.command("continue")
@click.argument("run", type=Place("RUN"))
@click.option("--data", required=True, type=Place("FILE|DIR"), help="What the next update teaches.")
@click.option(
    "--out", type=Place("DIR"), help="The child's run folder; by default beside RUN, as RUN-updateN."
)
@shared_options("one_class", "device", "workers", "skip-bad")
def go_on(run, data, out, device, workers, **accepted):
    """The next update of a finished run, as a child run: its buffer is all that earlier updates taught."""
    from fomo.distributed import process_group
    from fomo.runs.lineage import child_run

    with (
        process_group(device) as ranks,
        child_run(Path(run), data, out, ranks, **accepted) as (recipe, folder),
    ):
        run_and_report(recipe, folder, ranks, resume=True, device=device, workers=workers)


@cli.command()
@click.argument("run", type=Place("RUN"))
def log(run):
    """Every update that a run's model has lived through, its parents' too."""
    from fomo.runs.lineage import history

    print(history(Path(run)))


@cli.command()
@click.argument("run", type=Place("RUN"))
@click.option("--to", "update_number", type=click.IntRange(min=0), required=True, metavar="N")
def rollback(run, update_number):
    """Deploy update N again: model/ holds it and `continue` starts from it. Nothing is deleted."""
    from fomo.runs.lineage import roll_back

    print(roll_back(Path(run), update_number))


@cli.command()
@click.argument("run", type=Place("RUN"))
@click.argument("a", type=click.IntRange(min=0))
@click.argument("b", type=click.IntRange(min=0))
def diff(run, a, b):
    """Which concepts got better and worse from update A to update B."""
    from fomo.runs.lineage import compare

    print(compare(Path(run), a, b))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@shared_options("model", "image-size", "data", "scale", "set", "seed", "device")
def eval(as_json, device, **options):
    """Score a model on every test set of a data file."""
    from fomo.datasets.infer import given
    from fomo.devices import pick_device
    from fomo.eval.zero_shot import evaluate_data
    from fomo.load_recipe import load
    from fomo.pretrain import starting_model

    with given(options.pop("data")) as data:
        recipe = load(None, data=data, **options)
        place = pick_device(device, recipe.threads)
        scores = evaluate_data(starting_model(recipe.model, place), recipe.data, place)
    print(scores.as_json() if as_json else scores.as_text())


@cli.command()
@click.option(
    "-o",
    "out",
    type=Place("DIR|FILE"),
    help="Train it anew, as a directory or as FILE.safetensors and FILE.json.",
)
@shared_options("scale", "set", "device")
def pretrain(out, device, **options):
    """Train a scale's base model from random weights; without -o, say where the one that `update` takes is."""
    from fomo.load_recipe import load
    from fomo.pretrain import pretrain_scale

    print(pretrain_scale(load(None, **options), out, device))


@cli.command()
@click.option(
    "--rule", required=True, metavar="RULE", help="interpolate, slerp, ties, ...: see fomo/weights.py."
)
@click.option("--base", type=Place("MODEL"), help="The common original, for rules on task vectors.")
@click.argument("models", nargs=-1, required=True, type=Place("MODEL"))
@click.option(
    "-o",
    "out",
    required=True,
    type=Place("FILE|DIR"),
    help="A file of weights, a model directory, or a plot.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="A parameter of the rule, as keep=0.5."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the merge is stored in; by default the widest of the models'.",
)
@click.option("--sweep", metavar="KEY=A,B,C", help="Score each value on --data and draw the curve to -o.")
@shared_options("data", "device")
def merge(rule, base, models, out, settings, dtype, sweep, data, device):
    """Merge checkpoints, oldest first; a two-model rule takes OLD NEW, and `keep` is the share of OLD."""
    from fomo import merge_files
    from fomo.datasets.infer import given

    if sweep:
        with given(data) as file:
            print(merge_files.sweep(rule, settings, sweep, base, models, file, Path(out), device))
    else:
        print(merge_files.merge(rule, settings, base, models, Path(out), dtype))


@cli.command()
@click.argument("model", type=Place("RUN|MODEL"))
@click.argument("out", type=Place("DIR"))
@click.option(
    "--to", type=click.Choice(["transformers"]), required=True, help="The library that shall open it."
)
def export(model, out, to):
    """Write a run's deployed model, or any that --model takes, for another library, with its processor."""
    from fomo.hugging_face.export import export

    print(export(model, Path(out)))


@cli.command()
@click.option("--order", type=Place("ORDER|FILE.json"), help="One of the paper's six, or a stream file.")
@click.option("--updates", type=int, metavar="T", help="Into so many chunks; by default the scale's.")
@click.option("--per-dataset", is_flag=True, help="One update per dataset instead of T equal chunks.")
@click.option("--reverse", is_flag=True, help="The exact reversal.")
@click.option("--plot", type=Place("FILE"), help="Draw which dataset feeds which update (.png, .svg).")
@click.option("-o", "out", type=Place("FILE.json"), help="Write the stream in the official format.")
@shared_options("data", "model", "image-size", "scale", "set", "seed", "device")
def stream(plot, out, device, order, updates, per_dataset, reverse, **options):
    """Show the stream of a data file: what each update would learn, in which order."""
    from fomo.datasets.infer import given
    from fomo.devices import pick_device
    from fomo.load_recipe import load
    from fomo.pretrain import starting_model
    from fomo.report.previews import preview_stream, stream_section

    with given(options.pop("data")) as data:
        if order and not order.endswith(".json"):
            options["overrides"] += (f"stream.order={order}",)  # before stream.every is judged by it
        recipe = load(None, data=data, **options)
        how = stream_section(recipe.stream, order, updates, reverse, per_dataset)
        place = pick_device(device, recipe.threads)
        model = lambda: starting_model(recipe.model, place)  # noqa: E731  only some orders need it
        print(preview_stream(recipe, how, model, place, out=out, picture=plot))


@cli.command()
@click.option("--methods", metavar="A,B", help="Names in recipes/methods; by default all of them.")
@click.option(
    "--updates", default="20,50,100,200", show_default=True, metavar="T,T", help="Columns of steps."
)
@click.option(
    "--memory-table", type=Place("FILE"), help="CSV method,peak_gib: peaks in place of the counted ones."
)
@click.option(
    "--fisher", type=click.Choice(["once", "per_step"]), help="How EWC's Fisher pass is charged; the scale's."
)
@click.option("--measure", "measured", is_flag=True, help="Also measure each peak on this CUDA device.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@shared_options("scale", "set", "model", "image-size")
def budget(methods, updates, memory_table, fisher, measured, as_json, **options):
    """What each method costs in FLOPs and memory, and how many steps a scale's budget buys. Needs no GPU."""
    from fomo.budget.mafs import make_table

    table = make_table(methods, updates, memory_table, fisher, measured, options)
    print(table.as_json() if as_json else table.as_text())


@cli.command()
@click.option(
    "--recipe", "paths", multiple=True, required=True, type=Place("FILE"), help="Several are overlaid."
)
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="N", help="Per update; by default what the budget allows."
)
@click.option("--csv", "as_csv", is_flag=True, help="Every step as a line update,step,lr.")
@click.option("--plot", type=Place("FILE"), help="Draw all updates (.png, .svg).")
@shared_options("scale", "set", "seed")
def schedule(paths, steps, as_csv, plot, **options):
    """Show the learning rate over all updates: as a table, as CSV, or drawn. Needs no data."""
    from fomo.report.previews import preview_schedule, rate_curves

    print(preview_schedule(rate_curves(paths, steps, options), as_csv=as_csv, picture=plot))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=Place("RUN"))
@click.option("-o", "out", type=Place("FILE.html"), help="By default report.html in the first run.")
def report(runs, out):
    """Draw one or several runs: was it worth it, the KA-ZS plane, scores, what each set and class gained or lost.

    -o FILE.html also writes the figures as PNG and SVG and the tables as CSV, to FILE_files beside it.
    """
    from fomo.report.page import write_report

    print(write_report([Path(run) for run in runs], Path(out) if out else None))


@cli.command()
@click.argument("studies", nargs=-1, type=Place("STUDY"))
@click.option("--seeds", metavar="S,S,...", help="By default those of each study: 0,1,2.")
@click.option(
    "--shard", metavar="I/N", help="Only the I-th of N parts of the runs, for a cluster's job array."
)
@click.option("--dry-run", is_flag=True, help="List the runs with estimated hours; write nothing.")
@click.option("--out", type=Place("DIR"), help="Runs and results; by default results/SCALE.")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Runs side by side; by default one per core, or per GPU."
)
@click.option(
    "--bases",
    type=click.IntRange(min=1),
    default=1,
    help="Of so many base models seed S takes number S mod N; all but the first are pretrained here.",
)
@shared_options("scale", "device")
def reproduce(studies, seeds, scale, **options):
    """Run the guide's studies (recipes/studies, all or the named ones) and say which of its claims hold."""
    from fomo.guide.run_studies import reproduce
    from fomo.schema import Natural, convert

    chosen = convert(seeds.split(","), list[Natural], "--seeds") if seeds else None
    print(reproduce(studies, scale=scale or "tiny", seeds=chosen, **options))


@cli.group()
def data():
    """What there is to learn from."""


@data.command("list")
@click.option("--root", type=Place("DIR"), help="Say what of it is in this folder (the authors' layout).")
def list_datasets(root):
    """The paper's 63 datasets: sizes, classes, domain, and where each can be had."""
    from fomo.datasets.sources.catalogue import listing

    print(listing(root))


@data.command("check")
@click.argument("path", type=Place("FILE|DIR"))
@click.option("--plot", type=Place("DIR"), help="Draw a contact sheet of each dataset there.")
@click.option(
    "--model", type=Place("NAME/TAG|PATH"), help="Whose captions they must fit; by default any CLIP's."
)
@click.option(
    "--bad", type=Place("LIST.txt"), help="Write all pictures that cannot be read: PATH, a tab, why."
)
def check_data(path, plot, model, bad):
    """Open everything that a data file names; exit 2 where something would keep a run from making sense."""
    from fomo.datasets.check import check
    from fomo.datasets.infer import given
    from fomo.load_recipe import load
    from fomo.text import plural

    with given(path) as file:
        found = check(file, plot, load(None, data=file, model=model).model if model else None)
    print(found.text())
    if bad:
        print(found.write_bad(Path(bad)))
    if found.errors:
        raise UserError(f"{path}: {plural(len(found.errors), 'error')}, first: {found.errors[0]}")


@data.command("cache")
@click.argument("path", required=False, type=Place("FILE|DIR"))
@click.option(
    "--size",
    is_flag=False,
    flag_value=0,
    type=click.IntRange(min=0),
    metavar="[N]",
    help="Side in pixels; by default the file's or the scale's. Without N and FILE: how large the cache is.",
)
@click.option("--clear", is_flag=True, help="Empty the cache but for what other processes work with.")
@shared_options("scale", "set", "model", "image-size")
def cache_data(path, size, clear, **options):
    """Decode and resize every picture of a data file once, in parallel; `update` would do it on first use.

    Without FILE, say where the cache is and how large.
    """
    from fomo import cache_folder

    if clear and (path or size):
        raise UserError("--clear: empties the whole cache, it takes no FILE and no --size N")
    if size is not None and bool(size) != (path is not None):
        raise UserError("--size: takes the side in pixels with a FILE, and nothing without")
    if path is None:
        print(cache_folder.clear() if clear else cache_folder.overview())
        return
    from fomo.datasets.check import as_cached, fill_caches
    from fomo.datasets.infer import given
    from fomo.load_recipe import load

    with given(path) as file:
        print(fill_caches(file, as_cached(file, load(None, data=file, **options).model, size)))


if __name__ == "__main__":
    cli()
