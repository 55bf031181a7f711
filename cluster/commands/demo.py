"""`trailmark demo`: the whole road on real input."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Start here")(demo)


def demo(
    quick: Annotated[bool, typer.Option(help="Fewer rows, steps and questions: under half the time.")] = False,
    out: Annotated[Path, typer.Option(help="Where the rows, the receipt and the pages go.")] = Path("demo-out"),
    home: Annotated[Path | None, typer.Option(help="Home folder; `.trailmark` here when none is set.")] = None,
) -> None:
    """Contribute, refine, train, serve, ask, and prove who made the answer; about 10 minutes on 2 cores.

    What an earlier run finished is used again. The cluster is left up; `trailmark down` stops it.
    """
    from cluster.demo import run_demo
    from configs import env

    chosen = home or (Path(env.variable("TRAILMARK_HOME")) if env.variable("TRAILMARK_HOME") else Path(".trailmark"))
    run_demo(chosen.resolve(), out=out, quick=quick)
