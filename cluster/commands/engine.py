"""`trailmark engine bench`: how fast the serving engine is here, without a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from serve_apps.engine.bench import Law, Load, Measured
    from serve_apps.engine.config import AdapterRef, EngineConfig

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def register(app: typer.Typer) -> None:
    """Add `engine bench`."""
    group = typer.Typer(help="Measure the serving engine.", no_args_is_help=True)
    group.callback()(_group)  # keeps the name `bench` although it is the only one
    group.command("bench")(bench)
    app.add_typer(group, name="engine", rich_help_panel="Serve")


def _group() -> None:
    """Measure the serving engine."""


def bench(
    base: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder; this home's newest base model by default.")
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that arrive at once.")] = 8,
    input_tokens: Annotated[int, typer.Option("--in", min=1, help="Tokens of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option("--out", min=1, help="Tokens of each answer.")] = 64,
    adapters: Annotated[int, typer.Option(min=0, help="Random adapters to make; 0 runs the base alone.")] = 0,
    law: Annotated[str, typer.Option(help="Their popularity: one, uniform, zipf (exponent 1.0) or distinct.")] = "zipf",
    rank: Annotated[str, typer.Option(help="Their ranks, comma-separated; taken in turn.")] = "8",
    modules: Annotated[str, typer.Option(help="The linears they adapt, comma-separated.")] = "q_proj,v_proj",
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; its own choice by default.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences per step; all by default.")] = None,
    adapter_cache_mib: Annotated[int, typer.Option(min=1, help="Memory for adapters on the device.")] = 512,
    cold: Annotated[
        bool, typer.Option("--cold", help="No warm-up: adapters are loaded within the measurement.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, adapters and their popularity.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Run B sequences on the engine in this process; print tokens/s, time to first token and inter-token latency."""
    from serve_apps.engine.bench import Load
    from serve_apps.engine.config import EngineConfig

    folder = base or _newest_base()
    load = Load(sequences, input_tokens, output_tokens, _law(law), adapters, temperature, seed)
    config = EngineConfig(
        base_path=str(folder),
        dtype=dtype,
        device=device,
        max_num_seqs=batch or sequences,
        max_model_len=input_tokens + output_tokens,
        max_step_tokens=max(512, batch or sequences),
        adapter_cache_bytes=adapter_cache_mib << 20,
        num_threads=threads,
        enable_prefix_cache=False,  # the warm-up runs the same prompts, and would spare the measured run theirs
    )
    measured = _run(config, load, ranks=_ranks(rank), modules=_modules(modules), is_cold=cold)
    _print(config, load, measured, as_json=as_json)


def _run(config: "EngineConfig", load: "Load", *, ranks: list[int], modules: list[str], is_cold: bool) -> "Measured":
    """Build engine and adapters, warm up, measure."""
    import tempfile

    from serve_apps.engine.bench import measure, requests_of, warm_up, write_random_adapter
    from serve_apps.engine.engine import Engine

    engine = Engine(config)
    refs: list[AdapterRef] = []
    with tempfile.TemporaryDirectory(prefix="trailmark-bench-") as scratch:
        for index in range(load.num_adapters):
            folder, rank = Path(scratch) / str(index), ranks[index % len(ranks)]
            refs.append(write_random_adapter(folder, engine.spec, rank=rank, modules=modules, seed=load.seed + index))
        requests = requests_of(load, refs, vocab_size=engine.spec.vocab_size)
        if not is_cold:
            warm_up(engine, requests)
        return measure(engine, requests)


def _print(config: "EngineConfig", load: "Load", measured: "Measured", *, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({"engine": asdict(config), "load": asdict(load), "measured": asdict(measured)}))
        return
    from rich.console import Console
    from rich.table import Table

    what = f"{load.num_adapters} adapters, law {load.law}" if load.num_adapters else "the base alone"
    shape = f"{load.num_sequences} sequences, {load.input_tokens} in / {load.output_tokens} out"
    table = Table("", "value", title=f"{shape}, {what}, {config.dtype} on {config.device}")
    table.add_row("output tokens/s", f"{measured.tokens_per_s:.1f}")
    table.add_row("prompt tokens/s until the last first token", f"{measured.prompt_tokens_per_s:.1f}")
    table.add_row("wall time", f"{measured.wall_s:.2f} s")
    for name, latencies in (("time to first token", measured.first_token_ms), ("inter-token", measured.inter_token_ms)):
        table.add_row(name, "  ".join(f"{key} {value:.1f}" for key, value in latencies.items()) + " ms")
    table.add_row("distinct adapters", str(measured.num_distinct_adapters))
    for key, value in measured.stats.items():
        table.add_row(key, str(value))
    Console().print(table)


def _newest_base() -> Path:
    """Return the folder of this home's newest base model, which the demo leaves."""
    from attribution.trail import Trail, TrailError
    from configs import env
    from configs.errors import UserError

    remedy = "give --base FOLDER, or run `make demo` first"
    try:
        trail = Trail.open(env.home(), create=False)
    except TrailError as error:
        raise UserError(f"base: {error}; {remedy}") from None
    for entry in reversed(list(trail.entries(kind="base_model"))):
        for output in entry.record.outputs if entry.record else ():
            if trail.store.has(output.digest):
                return trail.store.get_directory(output.digest)
    raise UserError(f"base: {trail.home} holds no base model; {remedy}")


def _law(name: str) -> "Law":
    from typing import cast

    from configs.errors import UserError
    from serve_apps.engine.bench import LAWS

    if name not in LAWS:
        raise UserError(f"--law {name!r} is none; use one of {', '.join(LAWS)}")
    return cast("Law", name)


def _ranks(text: str) -> list[int]:
    from configs.errors import UserError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--rank {text!r} is no list of whole numbers above 0; write for example 8,16,32")
    return [int(part) for part in parts]


def _modules(text: str) -> list[str]:
    from configs.errors import UserError

    names = [part.strip() for part in text.split(",")]
    wrong = [name for name in names if name not in MODULES]
    if wrong:
        raise UserError(f"--modules: {wrong[0]!r} is no linear; use {', '.join(MODULES)}")
    return names
