"""The `trailmark` command: registers the command modules and turns a `UserError` into one red message and exit code 2.

Command modules import only typer and the standard library at the top, so that `trailmark --help` answers at once.
"""

import sys
from typing import Annotated

import typer

from cluster.commands import (
    ask,
    audit,
    config,
    data,
    demo,
    engine,
    erase,
    export,
    forget,
    fsck,
    jobs,
    keys,
    log,
    monitor,
    prompts,
    replay,
    serve,
    settle,
    statement,
    tiles,
    train,
    views,
    witness,
    workflow,
)
from cluster.commands import cluster as cluster_commands
from configs.errors import UserError

# Order of the panels in `--help`: the road a row travels.
COMMAND_MODULES = (
    demo,
    cluster_commands,
    data,
    prompts,
    train,
    settle,
    workflow,
    export,
    serve,
    engine,
    ask,
    audit,
    log,
    statement,
    fsck,
    tiles,
    witness,
    keys,
    erase,
    forget,
    monitor,
    replay,
    views,
    jobs,
    config,
)

app = typer.Typer(
    name="trailmark",
    help="Refine datasets, train and serve adapters, and keep a verifiable trail of who made what.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"trailmark {version('trailmark')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Refine datasets, train and serve adapters, and keep a verifiable trail of who made what."""


for _module in COMMAND_MODULES:
    _module.register(app)


def main() -> None:
    """Run the command line; exit 2 on a user's mistake, 130 on Ctrl-C."""
    try:
        app()
    except UserError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
