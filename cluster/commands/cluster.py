"""`trailmark up`, `down` and `status`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.local import PartStatus, Started

PANEL = "Cluster"
MIB = 1 << 20


def register(app: typer.Typer) -> None:
    """Add the three commands."""
    app.command("up", rich_help_panel=PANEL)(up)
    app.command("down", rich_help_panel=PANEL)(down)
    app.command("status", rich_help_panel=PANEL)(status)


def up(
    config: Annotated[str | None, typer.Option(help="A YAML file or a preset (local, h200, multi-node).")] = None,
    mlflow: Annotated[bool, typer.Option(help="Start the MLflow server and the follower that fills it.")] = True,
    serve: Annotated[bool, typer.Option(help="Serve the API.")] = True,
) -> None:
    """Start Ray, MLflow and the API; what already runs is left alone."""
    from cluster import local
    from configs import env
    from configs.schema import load_settings

    settings = load_settings(config)
    with _progress("starting") as report:
        started = local.up(env.home(), settings, with_mlflow=mlflow, with_serve=serve, report=report)
    _print_started(started)


def down() -> None:
    """Stop everything `up` started; no process is left."""
    from cluster import local
    from configs import env

    home = env.home()
    with _progress("stopping") as report:
        num_stopped = local.down(home, report=report)
    message = f"stopped {num_stopped} processes; none is left" if num_stopped else f"nothing was up for {home}"
    typer.secho(message, fg=typer.colors.GREEN)


def status() -> None:
    """Show each part: where it answers, whether it lives, its memory, what the witnesses say.

    Exits 1 when a part is dead, a witness has seen another log than this one, or nothing is up.
    """
    from cluster import local
    from configs import env

    home = env.home()
    rows = local.status(home)
    if not rows:
        typer.echo(f"nothing is up for {home}; start it with `trailmark up`")
        raise typer.Exit(1)
    _print_status(rows)
    for row in rows:
        if row.is_alarm:
            typer.secho(f"ALARM  {row.name}: {row.remark}", fg=typer.colors.RED, bold=True, err=True)
    if not all(row.alive and not row.is_alarm for row in rows):
        raise typer.Exit(1)


@contextmanager
def _progress(first: str) -> Iterator[Callable[[str], None]]:
    """Show the step at work with a spinner, or one line per step where there is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(text, highlight=False)
        return
    with console.status(first) as spinner:
        yield spinner.update


def _print_started(started: "Started") -> None:
    from rich.console import Console
    from rich.table import Table

    from configs import env

    state = started.state
    table = Table(title="Trailmark is up", show_header=False, title_justify="left")
    rows = {
        "API": f"{state.api_url}/v1" if state.api_url else "not started",
        "API key": started.api_key or "as printed when it was made; another: trailmark apikey create NAME",
        "MLflow": state.mlflow_url or "not started",
        "Ray dashboard": f"{state.dashboard_url} (token: {env.home() / 'run' / 'ray_token'})",
        "Home": str(env.home()),
        "Logs": str(env.home() / "run"),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(soft_wrap=True).print(table)
    if started.api_key:
        typer.echo("The key is shown this once: only its hash is kept.")


def _print_status(rows: list["PartStatus"]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("part", "address", "pid", "state", "memory", "log")
    for row in rows:
        state = "[green]alive[/green]" if row.alive else "[red]dead[/red]"
        memory = f"{row.memory_bytes / MIB:.0f} MiB" if row.memory_bytes else ""
        remark = f"[red]{escape(row.remark)}[/red]" if row.is_alarm else escape(row.remark)
        table.add_row(row.name, row.address, str(row.pid or ""), state, memory, remark)
    Console().print(table)
