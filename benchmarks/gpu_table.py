"""What benchmarks/gpu.py found, as Markdown; what is missing is a dash."""

from parts import ENDED

GIB, T = 2**30, 1e12
DASH = "-"


def on_one_line(value: object) -> str:
    if isinstance(value, dict) and "median" in value:
        waits = f", waits {value['waits']:.1%}" if "waits" in value else ""
        return with_spread(value, ".4g") + waits
    if isinstance(value, dict):
        return "; ".join(f"{key} {on_one_line(own)}" for key, own in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def tables(found: dict[str, dict]) -> str:
    rows = [row for name, own in found.items() for row in training_rows(name, own)]
    training = markdown(TRAINING, rows) if rows else ""
    waiting = markdown(WAITING, [row for name, own in found.items() for row in waiting_rows(name, own)])
    merges = markdown(MERGING, [row for name, own in found.items() for row in merging_rows(name, own)])
    ends = [f"- {name}: {own[ENDED]}" for name, own in found.items() if ENDED in own]
    failed = [
        f"- {name}: {key}: {value}"
        for name, own in found.items()
        for key, value in own.items()
        if key.endswith("failed") or key == "fewer workers"
    ]
    parts = [machine(found.get("machine", {})), training, waiting, resuming(found.get("resume", {})), merges]
    return "\n\n".join(filter(None, [*parts, "\n".join([*ends, *failed])]))


def markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(own: dict) -> str:
    device, versions = own.get("device", {}), own.get("versions", {})
    words = [device.get("name", "unknown device")]
    if "driver" in device:
        words += [f"{device['memory'] / GIB:.0f} GiB", f"driver {device['driver']}", f"CUDA {device['cuda']}"]
    words += [f"{name} {version}" for name, version in versions.items()]
    words.append(f"{own.get('cores', DASH)} CPU cores")
    rates = [
        f"{key.removesuffix('_flops')} {rate['best'] / T:.4g}"
        for key, rate in own.items()
        if key.endswith("_flops")
    ]
    return f"{', '.join(words)}; TFLOP/s of matrix products: {', '.join(rates) or DASH}"


TRAINING = (
    "model",
    "batch",
    "way",
    "samples/s",
    "MFU",
    "loop / bare",
    "peak GiB",
    "predicted / measured",
    "open_clip samples/s",
    "ours / open_clip",
    "short captions / open_clip",
    "compiling",
)


def training_rows(name: str, own: dict) -> list[list[str]]:
    rows = []
    for way in ("eager", "compiled", "in parts"):
        row, memory = own.get(way, {}), own.get(f"memory, {way}")
        if "ours" not in row:
            continue
        rows.append(
            [
                name,
                f"{own['whole_batch'] if way == 'in parts' else own['batch_size']}",
                way,
                with_spread(row["ours"], ",.0f"),
                f"{row['mfu']:.1%}" if "mfu" in row else DASH,
                with_spread(row.get("loop_over_bare"), ".3f"),
                f"{memory['measured'] / GIB:.2f}" if memory else DASH,
                f"{memory['ratio']:.3f}" if memory else DASH,
                with_spread(row.get("open_clip"), ",.0f"),
                with_spread(row.get("over_open_clip"), ".2f"),
                with_spread(row.get("short_over_open_clip"), ".2f"),
                f"{own['compile_seconds']:.0f} s" if way == "compiled" else DASH,
            ]
        )
    return rows


def with_spread(found: dict | None, form: str) -> str:
    """Median (lowest, highest, n)."""
    if found is None:
        return DASH
    median, lowest, highest = (format(found[key], form) for key in ("median", "lowest", "highest"))
    return f"{median} ({lowest}, {highest}, n = {found['n']})"


WAITING = ("model", "batches made by", "samples/s", "waits for data")


def waiting_rows(name: str, own: dict) -> list[list[str]]:
    makers = {key: row for key, row in own.get("workers", {}).items() if key.endswith("workers")}
    rows = [
        [name, makers_name, with_spread(row, ",.0f"), f"{row['waits']:.1%}"]
        for makers_name, row in makers.items()
    ]
    peer = own.get("eager", {}).get("open_clip")
    if peer:
        rows.append([name, "open_clip's loop", with_spread(peer, ",.0f"), f"{peer['waits']:.1%}"])
    return rows


def resuming(own: dict) -> str:
    """One line."""
    said = [
        f"{about}: {agreement(own[name])}"
        for name, about in (
            ("resumed", "one that was stopped and went on"),
            ("whole again", "the same once more"),
        )
        if name in own
    ]
    return f"Beside an uninterrupted run at tiny, {'; '.join(said)}." if said else ""


def agreement(row: dict) -> str:
    return "bits agree" if row["bits_agree"] else f"largest difference {row['largest_difference']:.2g}"


MERGING = ("merge", "seconds", "memory above, GiB")


def merging_rows(name: str, own: dict) -> list[list[str]]:
    row = own.get("merged")
    return [[name, f"{row['seconds']:.2f}", f"{row['memory'] / GIB:.2f}"]] if row else []
