"""`trailmark forget`: take a row or a contributor out of data, gradients and indexes; train again without it."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attribution.trail import Trail
    from configs.schema import Settings
    from pipelines.forget import Forgetting


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Trail")(forget)


def forget(
    target: Annotated[str, typer.Argument(metavar="EXAMPLE|CONTRIBUTOR", help="A row's id or a contributor's name.")],
    reason: Annotated[str | None, typer.Option(help="Why; it stands in the log for good.")] = None,
    requester: Annotated[str, typer.Option("--as", help="Who asks: operator, or who contributed it.")] = "operator",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would go and who learnt from it.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the adapters that learnt from it again, without it.")
    ] = False,
    config: Annotated[str | None, typer.Option("--config", help="For the cluster section only.")] = None,
) -> None:
    """Erase a row's or contributor's content, ids and gradients, and name the adapters that learnt from it.

    The log keeps its leaves and every other proof stays valid. Weights change only with
    --retrain, which publishes nothing.
    """
    from attribution.trail import Trail
    from cluster.commands.erase import print_plan
    from configs.errors import UserError
    from configs.schema import load_settings
    from pipelines.forget import forget as carry_out
    from pipelines.forget import plan_forget

    settings = load_settings(config)
    trail = Trail.open(create=False)
    forgetting = plan_forget(trail, target)
    print_plan(forgetting.erasing, "would go" if dry_run else "go")
    _print_learners(forgetting, retrain=retrain)
    if dry_run:
        return
    if not reason:
        raise UserError("--reason: needed; it explains the hole to everyone who meets it")
    for entry in carry_out(trail, forgetting, reason=reason, requester=requester):
        typer.secho(f"{entry.leaf.kind.replace('_', ' ')} recorded ({entry.leaf_hash[:12]})", fg="green")
    typer.echo("Recorded optimizer states stay: each is a sum over every row of its batches.")
    if retrain and forgetting.learners:
        _train_again(trail, forgetting, settings)


def _print_learners(forgetting: "Forgetting", *, retrain: bool) -> None:
    if not forgetting.learners:
        typer.echo("No adapter learnt from it.")
        return
    typer.secho(f"{len(forgetting.learners)} adapters learnt from it, and their weights still know it:", fg="yellow")
    for learner in forgetting.learners:
        rows = "without a trace" if learner.num_rows is None else f"{learner.num_rows} of its rows"
        typer.echo(f"  {learner.label}: {rows}  {learner.digest}")
    if not retrain:
        typer.echo("  --retrain trains them again without it")


def _train_again(trail: "Trail", forgetting: "Forgetting", settings: "Settings") -> None:
    from rich.console import Console

    from cluster.commands.train_tables import TrainBars, training_table
    from cluster.session import ray_session
    from pipelines.forget import train_again

    console = Console()
    with ray_session(trail.home, settings.cluster):
        for learner in forgetting.learners:
            with TrainBars(console) as bars:
                result = train_again(trail, learner, progress=bars)
            if result.report is None:
                typer.secho(f"{learner.label}: not trained again, {result.why}", fg="yellow")
                continue
            console.print(training_table(result.report, learner.name))
            typer.secho(
                f"{learner.label} has its successor {result.report.digest}; "
                f"`trailmark publish {learner.name} {result.report.digest}` gives it the name",
                fg="green",
            )
