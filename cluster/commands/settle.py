"""`trailmark settle`: what contributors, datasets, rules and adapters are worth, measured by training without them."""

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Adapters"
OVER = "contributors, datasets, rules or adapters"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=PANEL)(settle)


def settle(
    adapter: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or digest of an adapter.")],
    suite: Annotated[Path, typer.Option(help='JSON lines: {"id", "prompt", "expected": [...], "reference"}.')],
    over: Annotated[str, typer.Option(help=f"Who or what is switched on and off: {OVER}.")] = "contributors",
    others: Annotated[
        list[str] | None, typer.Option("--with", help="A further adapter, for --over adapters; may be repeated.")
    ] = None,
    budget: Annotated[int | None, typer.Option(min=1, help="Retrains at most; overrides settle.budget.")] = None,
    precision: Annotated[
        float | None, typer.Option(min=0, help="Stop when intervals are this narrow; overrides settle.precision.")
    ] = None,
    utility: Annotated[
        str | None, typer.Option(help="likelihood, log_likelihood or exact_match; overrides settle.utility.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the draw of coalitions; overrides settle.seed.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Train once for the time it takes, tell, and stop.")
    ] = False,
    config: Annotated[str | None, typer.Option("--config", help="A YAML file or a preset (local, h200, ...).")] = None,
) -> None:
    """Measure what each part behind ADAPTER is worth on SUITE, by training coalitions of the parts again; record it.

    The cost is printed first. A run that was stopped goes on where it was: coalitions measured before are not trained
    again. "No measurable effect" is an answer.
    """
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.settle_tables import SettleBars, settlement_table
    from cluster.session import ray_session
    from configs.schema import load_settings, parse_settings
    from pipelines.benchmark.run import resolve_adapter
    from pipelines.settle.asked import asked

    settings = load_settings(config)
    given = {"budget": budget, "precision": precision, "utility": utility, "seed": seed}
    overrides = {field: value for field, value in given.items() if value is not None}
    section = parse_settings({"settle": {**settings.settle.model_dump(), **overrides}}, source="command line").settle
    trail = Trail.open(create=False)
    digests = tuple(resolve_adapter(trail, name).digest for name in others or ())
    ready = asked(trail, adapter, suite=suite, over=over, settings=section, others=digests)
    console = Console()
    with ray_session(trail.home, settings.cluster), SettleBars(console) as bars:
        from pipelines.settle.driver import settle as run

        report = run(trail, ready, progress=bars, dry_run=dry_run)
    if report is not None:
        console.print(settlement_table(report))
