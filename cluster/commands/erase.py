"""`trailmark erase`: take a row, a record or a contributor out of the store, and say so in the log."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.erase import Erasing

NUM_SHOWN = 12
TOLD_KINDS = ("refinement", "adapter", "benchmark", "publication", "completions", "influence")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Trail")(erase)


def erase(
    target: Annotated[
        str | None, typer.Argument(metavar="ROW|RECORD|CONTRIBUTOR", help="A row's id, a record, a contributor's name.")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it stands in the log for good.")] = None,
    requester: Annotated[str, typer.Option("--as", help="Who asks: operator, or who contributed it.")] = "operator",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would go and what stands on it, no more.")
    ] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Only carry out what a crash cut off.")] = False,
) -> None:
    """Erase what TARGET is, with every copy of its rows. The log keeps its leaf, and every other proof stays valid.

    Weights are not changed: adapters that learnt from it are listed, for training them again is another matter.
    """
    from attribution.erasure import finish_erasures
    from attribution.trail import Trail
    from configs.errors import UserError
    from pipelines.erase import erase as carry_out
    from pipelines.erase import plan

    trail = Trail.open(create=False)
    num_finished = finish_erasures(trail)
    if num_finished or finish:
        typer.echo(f"{num_finished} records and tables removed that earlier redactions name")
    if finish:
        return
    if target is None:
        raise UserError("erase: name a row, a record or a contributor; --finish needs none")
    erasing = plan(trail, target)
    print_plan(erasing, "would go" if dry_run else "go")
    if dry_run:
        return
    if not reason:
        raise UserError("--reason: needed; it explains the hole to everyone who meets it")
    for entry in carry_out(trail, erasing, reason=reason, requester=requester):
        typer.secho(f"{entry.leaf.kind.replace('_', ' ')} recorded ({entry.leaf_hash[:12]})", fg="green")


def print_plan(erasing: "Erasing", verb: str) -> None:
    """Print what an erasure takes, and what stands on it."""
    from attribution.lineage import label_of

    num_rows = len(erasing.row_ids)
    typer.echo(f"{erasing.what} {erasing.name}: {len(erasing.leaves)} records and {num_rows} rows {verb}")
    for leaf in erasing.leaves[:NUM_SHOWN]:
        typer.echo(f"  record   {leaf[:16]}")
    for part, leaf, digest in erasing.tables:
        typer.echo(f"  rewrite  {part} of record {leaf[:16]} ({digest[:19]})")
    for digest in erasing.digests[:NUM_SHOWN]:
        typer.echo(f"  remove   {digest}")
    for digest in erasing.shared:
        typer.echo(f"  stays    {digest}: other records own it too")
    below = [entry for entry in erasing.descendants if entry.leaf.kind in TOLD_KINDS]
    if below:
        typer.secho(f"{len(below)} records stand on it and stay:", fg="yellow")
    for entry in below[:NUM_SHOWN]:
        typer.echo(f"  {entry.leaf.kind:<12} {label_of(entry)}  {entry.leaf_hash[:16]}")
    if len(below) > NUM_SHOWN:
        typer.echo(f"  and {len(below) - NUM_SHOWN} more")
