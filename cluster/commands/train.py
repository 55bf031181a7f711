"""`trailmark train|trace|benchmark|publish`: an adapter, what its run left, what it is worth, and its name."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Adapters"

ConfigOption = Annotated[str | None, typer.Option("--config", help="A YAML file or a preset (local, h200, ...).")]


def register(app: typer.Typer) -> None:
    """Add the four commands."""
    app.command(rich_help_panel=PANEL)(train)
    app.command(rich_help_panel=PANEL)(trace)
    app.command(rich_help_panel=PANEL)(benchmark)
    app.command(rich_help_panel=PANEL)(publish)


def train(
    dataset: Annotated[str, typer.Argument(help="A refined dataset by name or digest.")],
    name: Annotated[str, typer.Option(help="Name of the adapter in its record.")],
    base: Annotated[
        str | None, typer.Option(help="smollm2, a folder, a GGUF file or a hub name; base.source by default.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; overrides train.max_steps.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the rows; overrides train.epochs.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Overrides train.learning_rate.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Overrides train.seed.")] = None,
    query_set: Annotated[
        list[str] | None,
        typer.Option(help="A suite file or refined dataset to score every row against while training; repeat it."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Train a LoRA adapter on DATASET, prove that it reloads, and record it with a trace of every step."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.train_tables import TrainBars, training_table
    from cluster.session import ray_session
    from configs.schema import load_settings, parse_settings
    from pipelines.train.driver import train as run
    from pipelines.train.queries import artefact_of

    settings = load_settings(config)
    given: dict[str, object] = {"max_steps": max_steps, "epochs": epochs, "learning_rate": learning_rate, "seed": seed}
    given["query_sets"] = query_set
    overrides = {field: value for field, value in given.items() if value is not None}
    section = parse_settings({"train": {**settings.train.model_dump(), **overrides}}, source="command line").train
    trail = Trail.open(create=False)
    for reference in section.query_sets:
        artefact_of(trail, reference)  # a wrong one is told before Ray takes its seconds to start
    console = Console()
    with ray_session(trail.home, settings.cluster), TrainBars(console) as bars:
        report = run(trail, dataset, name=name, base=base or settings.base.source, settings=section, progress=bars)
    console.print(training_table(report, name))


def trace(
    adapter: Annotated[str, typer.Argument(help="Name, NAME@VERSION or digest of an adapter.")],
    top: Annotated[int, typer.Option(min=1, help="Rows to print at either end of a query set's scores.")] = 5,
) -> None:
    """Show what ADAPTER's training wrote down: the states to replay from, the recipe, the in-run scores."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.trace_tables import trace_view

    console = Console()
    for table in trace_view(Trail.open(create=False), adapter, top=top):
        console.print(table)


def benchmark(
    adapter: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or digest of an adapter.")],
    suite: Annotated[Path, typer.Option(help='JSON lines: {"id", "prompt", "expected": [...], "reference"}.')],
    config: ConfigOption = None,
) -> None:
    """Measure ADAPTER against its base on held-out questions and record the result."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.train_tables import BenchmarkBars, benchmark_table
    from configs.schema import load_settings
    from pipelines.benchmark.run import benchmark as run

    settings = load_settings(config).benchmark
    console = Console()
    with BenchmarkBars(console) as bars:
        report = run(Trail.open(create=False), adapter, suite=suite, settings=settings, progress=bars)
    console.print(benchmark_table(report, f"{adapter} on {suite.name}", confidence=settings.confidence))


def publish(
    name: Annotated[str, typer.Argument(help="Letters a-z, digits, '.', '_' and '-'.")],
    digest: Annotated[
        str | None, typer.Argument(help="sha256:... as `trailmark train` prints it. Default: newest trained as NAME.")
    ] = None,
    kind: Annotated[str, typer.Option(help="Kind of the artefact: adapter, refined, ...")] = "adapter",
) -> None:
    """Make DIGEST the next version of NAME; a version once published never changes."""
    from attribution.trail import Trail
    from pipelines.publish import PublishError, newest_adapter
    from pipelines.publish import publish as run

    if digest is None and kind != "adapter":
        raise PublishError(f"--kind {kind}: only an adapter's digest is found by NAME; give DIGEST")
    trail = Trail.open(create=False)
    digest = digest or newest_adapter(trail, name)
    run(trail, name, digest, kind)
    published = trail.registry.resolve(name)
    typer.secho(f"{published.reference} is {digest} (record {published.leaf_hash[:12]})", fg=typer.colors.GREEN)
