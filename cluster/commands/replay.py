"""`trailmark replay`: run a recorded run again and say whether the same came out."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.replay import ReplayReport

PANEL = "Trail"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=PANEL)(replay)


def replay(
    run: Annotated[str, typer.Argument(help="A refinement, adapter or benchmark: name, digest or leaf hash.")],
    kind: Annotated[str | None, typer.Option(help="refinement, adapter or benchmark, when RUN names several.")] = None,
    from_step: Annotated[
        int | None, typer.Option(min=0, help="An adapter: only from the state kept after so many steps to the next.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="For the cluster section only.")] = None,
) -> None:
    """Run RUN again from its record and compare the results; exit 1 when they differ. Nothing is recorded."""
    import contextlib

    from rich.console import Console

    from attribution.trail import Trail
    from cluster.session import ray_session
    from configs.schema import load_settings
    from pipelines.replay import differences, find_run, replay_from
    from pipelines.replay import replay as run_again

    settings = load_settings(config)
    trail = Trail.open(create=False)
    entry = find_run(trail, run, kind=kind or (None if from_step is None else "adapter"))
    console = Console()
    for line in differences(entry):
        typer.secho(f"Warning: {line}", fg=typer.colors.YELLOW, err=True)
    needs_ray = entry.leaf.kind != "benchmark"
    session = ray_session(trail.home, settings.cluster) if needs_ray else contextlib.nullcontext()
    with session, console.status(f"Replaying {entry.leaf.kind} {entry.leaf_hash[:12]}"):
        report = run_again(trail, entry) if from_step is None else replay_from(trail, entry, from_step)
    console.print(_table(report))
    if not report.equal:
        if report.largest_difference is not None:
            typer.secho(f"Largest difference of a value: {report.largest_difference:.3g}", fg=typer.colors.RED)
        raise typer.Exit(1)


def _table(report: "ReplayReport") -> "Table":
    from rich.table import Table

    title = f"Replay of {report.entry.leaf.kind} {report.entry.leaf_hash[:12]}"
    table = Table("", "recorded", "replayed", "equal", title=title)
    for fact in report.facts:
        table.add_row(fact.fact, fact.recorded, fact.replayed, "[green]yes" if fact.equal else "[red]no")
    return table
