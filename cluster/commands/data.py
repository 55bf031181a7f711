"""`trailmark contributor|contribute|refine|dataset`: rows in, refined, and looked up again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.commands.data_tables import RowBar
    from pipelines.contribute import ContributionReport
    from pipelines.refine.driver import RefineReport

PANEL = "Data"
NUM_REJECTS_SHOWN = 20

ConfigOption = Annotated[str | None, typer.Option("--config", help="A YAML file or a preset (local, h200, ...).")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    contributor = typer.Typer(help="People and teams who hand in rows.", no_args_is_help=True)
    contributor.command("add")(add_contributor)
    contributor.command("list")(list_contributors)
    app.add_typer(contributor, name="contributor", rich_help_panel=PANEL)
    app.command(rich_help_panel=PANEL)(contribute)
    app.command(rich_help_panel=PANEL)(refine)
    dataset = typer.Typer(help="Contributed and refined datasets.", no_args_is_help=True)
    dataset.command("list")(list_datasets)
    dataset.command("show")(show_dataset)
    dataset.command("why")(why)
    app.add_typer(dataset, name="dataset", rich_help_panel=PANEL)


def add_contributor(name: Annotated[str, typer.Argument(help="Name of a person or team.")]) -> None:
    """Create a key pair for NAME and record the contributor, signed with that key."""
    from attribution.trail import Trail
    from pipelines.contribute import add_contributor as add

    trail = Trail.open()
    entry = add(trail, name)
    key = trail.keys.get(name)
    typer.secho(f"{name} joined: key {key.key_id[:16]} (record {entry.leaf_hash[:12]})", fg=typer.colors.GREEN)
    typer.echo(f"Private key: {trail.keys.directory / (name + '.key')}; keep it secret and keep a copy.")


def list_contributors() -> None:
    """List the contributors with the rows they handed in."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.data_tables import contributors_table

    Console().print(contributors_table(Trail.open(create=False)))


def contribute(
    file: Annotated[Path, typer.Argument(help="JSON lines (.jsonl), a JSON array (.json) or Parquet.")],
    contributor: Annotated[str, typer.Option("--as", help="Who hands in the rows.")],
    licence: Annotated[str, typer.Option("--licence", help="SPDX id, e.g. CC-BY-4.0; or LicenseRef-NAME.")],
    name: Annotated[str | None, typer.Option(help="Name of the dataset; the file's name by default.")] = None,
    rejects: Annotated[Path | None, typer.Option(help="Write every row left out to this file, JSON lines.")] = None,
    config: ConfigOption = None,
) -> None:
    """Sign and record the rows of FILE; bad rows are listed and stop none of the good ones.

    A row is {"prompt", "completion"}, {"messages": [{"role", "content"}, ...]} or {"instruction", "input", "output"}.
    """
    from attribution.trail import Trail
    from configs.schema import load_settings
    from pipelines.contribute import contribute as hand_in

    settings = load_settings(config).contribute
    report = hand_in(Trail.open(), file, contributor=contributor, licence=licence, name=name, settings=settings)
    if rejects is not None:
        _write_rejects(rejects, report)
    _print_contribution(report, file, contributor, rejects)


def refine(
    name: Annotated[str, typer.Option(help="Name of the refined dataset.")],
    dataset: Annotated[
        list[str] | None, typer.Option(help="A contribution by name, digest or leaf hash; repeat it. Default: all.")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Refine contributions into one dataset: every row passes the rules or is dropped with a reason."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.data_tables import refinement_tables
    from cluster.session import ray_session
    from configs.schema import load_settings
    from pipelines.refine.read import ALL, refinable

    settings = load_settings(config)
    trail = Trail.open()
    chosen = dataset or [ALL]
    refinable(trail, chosen)  # a wrong name is told before Ray takes its seconds to start
    console = Console()
    with ray_session(trail.home, settings.cluster), _row_bar(console) as show:
        from pipelines.refine.driver import refine as run

        report = run(trail, chosen, settings.refine, name=name, progress=show)
    console.print(*refinement_tables(trail, report.num_in, report.num_kept, report.dropped, report.per_contributor))
    _print_refinement(report, name)


def list_datasets() -> None:
    """List contributed and refined datasets, oldest first."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.data_tables import datasets_table

    Console().print(datasets_table(Trail.open(create=False)))


def show_dataset(
    dataset: Annotated[str, typer.Argument(help="Name, digest or leaf hash of a contributed or refined dataset.")],
    rows: Annotated[int, typer.Option(min=0, help="Rows to print.")] = 5,
) -> None:
    """Show what a dataset holds and, for a refined one, what was dropped and why."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.data_tables import dataset_view

    Console().print(*dataset_view(Trail.open(create=False), dataset, num_rows=rows))


def why(example_id: Annotated[str, typer.Argument(help="Id of a row, or at least 8 hex digits of it.")]) -> None:
    """Print a row and every decision taken about it."""
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.data_tables import example_view

    Console().print(*example_view(Trail.open(create=False), example_id))


def _row_bar(console: "Console") -> "RowBar":
    from cluster.commands.data_tables import RowBar

    return RowBar(console)


def _write_rejects(path: Path, report: "ContributionReport") -> None:
    import json

    with path.open("w", encoding="utf-8") as file:
        for line, reason in report.rejected:
            file.write(json.dumps({"line": line, "reason": reason}, ensure_ascii=False) + "\n")


def _print_contribution(report: "ContributionReport", file: Path, contributor: str, rejects: Path | None) -> None:
    record = report.entry.leaf_hash[:12]
    typer.secho(f"{file.name}: {report.num_rows} rows recorded for {contributor} ({record})", fg=typer.colors.GREEN)
    if not report.rejected:
        return
    typer.secho(f"{len(report.rejected)} of {report.num_read} rows left out:", fg=typer.colors.YELLOW)
    for line, reason in report.rejected[:NUM_REJECTS_SHOWN]:
        typer.echo(f"  line {line}: {reason}")
    if len(report.rejected) > NUM_REJECTS_SHOWN and rejects is None:
        typer.echo(f"  and {len(report.rejected) - NUM_REJECTS_SHOWN} more; --rejects FILE writes all of them")
    if rejects is not None:
        typer.echo(f"All of them are in {rejects}")


def _print_refinement(report: "RefineReport", name: str) -> None:
    typer.secho(f"{name}: {report.digest} (record {report.entry.leaf_hash[:12]})", fg=typer.colors.GREEN)
    typer.echo("`trailmark dataset why EXAMPLE_ID` tells the decisions about one row.")
