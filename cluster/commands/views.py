"""`trailmark mlflow` and `trailmark lineage`: look at the trail."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands import lineage as questions

if TYPE_CHECKING:
    from attribution.mlflow_view import MlflowView

UriOption = Annotated[
    str | None,
    typer.Option("--uri", help="The MLflow server; default: the one of `trailmark up`, else the port in the settings."),
]
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def register(app: typer.Typer) -> None:
    """Add `mlflow sync|follow|reconcile` and `lineage`."""
    mlflow = typer.Typer(
        help="Show the trail in MLflow, a view that can be rebuilt from the log.", no_args_is_help=True
    )
    mlflow.command("sync")(sync)
    mlflow.command("follow")(follow)
    mlflow.command("reconcile")(reconcile)
    app.add_typer(mlflow, name="mlflow", rich_help_panel="Trail")
    lineage = typer.Typer(help="See where a record comes from and what came of it.", no_args_is_help=True)
    lineage.command("show")(show)
    questions.add_to(lineage)
    app.add_typer(lineage, name="lineage", rich_help_panel="Trail")


def sync(uri: UriOption = None) -> None:
    """Write what MLflow does not have yet, then stop."""
    view = _view(uri)
    num_written = view.sync(lambda entry: typer.echo(f"  {entry.index:>6}  {entry.leaf.kind}"))
    typer.secho(f"{num_written} records written to {view.uri}", fg=typer.colors.GREEN)
    _tell_asides(view)


def follow(
    uri: UriOption = None, interval_s: Annotated[float, typer.Option(help="Seconds between looks at the log.")] = 1.0
) -> None:
    """Write each new record to MLflow until SIGTERM or Ctrl-C; waits while MLflow is away."""
    import logging
    import signal
    import threading

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    view = _view(uri)
    logger = logging.getLogger(__name__)
    logger.info("following the log of %s into %s", view.trail.home, view.uri)
    view.follow(
        stop,
        interval_s=interval_s,
        on_record=lambda entry: logger.info("log entry %d: %s", entry.index, entry.leaf.kind),
    )


def reconcile(
    uri: UriOption = None, repair: Annotated[bool, typer.Option(help="Mend what differs, or only report it.")] = True
) -> None:
    """Compare MLflow with the log, mend it, and exit 1 if it still differs."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    view = _view(uri)
    found = view.reconcile(repair=repair)
    _tell_asides(view)
    if not found:
        typer.secho(f"{view.uri} shows what the log says", fg=typer.colors.GREEN)
        return
    table = Table("Problem", "What", "Leaf", "In MLflow", "Detail", title=f"{view.uri} differs from the log")
    for item in found:
        table.add_row(item.problem, item.role, item.leaf[:16], item.mlflow_id, escape(item.detail))
    Console().print(table)
    raise typer.Exit(1)


def show(
    reference: Annotated[
        str, typer.Argument(metavar="RECORD", help="NAME, NAME@VERSION, a digest, or a leaf hash (8 digits or more).")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the graph as one self-contained page.")] = None,
) -> None:
    """Print what a record was made from, and write it as a page."""
    from rich.console import Console

    from attribution.pages.show import LineagePages, find_entry
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    entry = find_entry(trail, reference)
    pages = LineagePages(trail)
    Console().print(_tree(pages.neighbourhood(entry.leaf_hash), entry.leaf_hash))
    if html is not None:
        html.write_text(pages.page(entry.leaf_hash), encoding="utf-8")
        typer.echo(f"page: {html}")


def _tree(graph: dict[str, Any], focus: str) -> Any:
    """Return the ancestors as a tree with `focus` on top; a record met again is named, not unfolded."""
    from rich.markup import escape
    from rich.tree import Tree

    nodes = {node["id"]: node for node in graph["nodes"]}
    parents: dict[str, list[str]] = {}
    for edge in graph["edges"]:
        parents.setdefault(edge["to"], []).append(edge["from"])

    def line(leaf: str) -> str:
        node = nodes[leaf]
        return f"[bold]{escape(node['label'])}[/bold]  {node['kind'].replace('_', ' ')}  [dim]{leaf[:16]}[/dim]"

    seen: set[str] = set()

    def grow(tree: Tree, leaf: str) -> None:
        if leaf in seen:
            return
        seen.add(leaf)
        for parent in parents.get(leaf, ()):
            grow(tree.add(line(parent)), parent)

    root = Tree(line(focus))
    grow(root, focus)
    return root


def _view(uri: str | None) -> "MlflowView":
    from attribution.mlflow_view import MlflowView
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    return MlflowView(trail, uri or _server_of(trail.home))


def _server_of(home: Path) -> str:
    from cluster.state import load_state
    from configs.schema import MlflowSettings

    return load_state(home).mlflow_url or f"http://127.0.0.1:{MlflowSettings().port}"


def _tell_asides(view: "MlflowView") -> None:
    for aside in view.asides():
        typer.secho(f"log entry {aside.log_index} was refused: {aside.error}", fg=typer.colors.YELLOW, err=True)
