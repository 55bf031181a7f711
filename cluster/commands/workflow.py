"""`trailmark run|approve|workflow`: a workflow from rows to a published adapter, and the story of its runs."""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from attribution.trail import Trail
    from cluster.workflow_steps import Tools
    from configs.schema import ClusterSettings
    from configs.workflow import Workflow

PANEL = "Workflows"
EXIT_CODES = {"done": 0, "partial": 0, "failed": 1, "waiting": 3, "refused": 4}

NameArgument = Annotated[str, typer.Argument(help="A workflow's name, or RUN: its name and a number, as NAME-3.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(rich_help_panel=PANEL)(run)
    app.command(rich_help_panel=PANEL)(approve)
    group = typer.Typer(help="Runs of workflows: failures, patches and their effects.", no_args_is_help=True)
    group.command("list")(list_workflows)
    group.command("show")(show)
    group.command("log")(log)
    app.add_typer(group, name="workflow", rich_help_panel=PANEL)


def run(
    workflow: Annotated[
        str | None, typer.Argument(help="A YAML file or a preset; with --resume a workflow's name (default: the last).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last run, as it was defined.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and why; do nothing.")] = False,
    start: Annotated[str | None, typer.Option("--from", help="Run this step and what follows it anew.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this step; repeat it.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, as steps.train.settings.rank=4; a change as any other."),
    ] = None,
    author: Annotated[str | None, typer.Option("--as", help="Who changed the workflow since its last run.")] = None,
    reason: Annotated[str, typer.Option(help="Why it was changed.")] = "",
) -> None:
    """Run a workflow: steps that are done are not done again, the rest goes on where it stopped.

    Exit code 0: done; 1: a step failed; 2: something is wrong with the call or the file; 3: people must approve first;
    4: they refused.
    """
    from rich.console import Console

    from attribution.trail import Trail
    from cluster.commands.workflow_tables import Teller, plan_table
    from cluster.workflow import Author, Driver
    from cluster.workflow_plan import Choice
    from cluster.workflow_steps import real_kinds

    trail = Trail.open(create=False)
    chosen, source = _chosen(trail, workflow, resume=resume, overrides=overrides or [])
    console = Console()
    teller = Teller(console, trail, chosen)
    choice = Choice(start, tuple(only or ()))
    with contextlib.ExitStack() as stack:
        kinds = real_kinds(_tools(console, trail, next(iter(chosen.settings.values())).cluster, stack))
        driver = Driver(trail, chosen, kinds, source=source, choice=choice, tell=teller)
        if dry_run:
            console.print(plan_table(chosen, driver.plan()))
            return
        finished = driver.run(Author(author, reason))
    teller.close(finished)
    raise typer.Exit(EXIT_CODES[finished.run.status])


def approve(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="The run that waits, as NAME-3, or a workflow's name.")],
    step: Annotated[str, typer.Argument(help="The step that asks for approval.")],
    name: Annotated[str, typer.Option("--as", help="Who approves: a contributor, or `operator`.")],
    reject: Annotated[bool, typer.Option("--reject", help="Refuse instead.")] = False,
    note: Annotated[str, typer.Option(help="Why; it stands in the record.")] = "",
) -> None:
    """Approve, under NAME's own key, exactly what a run's step asks for; a change of it later voids the approval."""
    from rich.console import Console

    from attribution.approvals import decide
    from attribution.trail import Trail
    from cluster.commands.workflow_tables import request_table
    from cluster.workflow_story import waiting_request

    trail = Trail.open(create=False)
    request = waiting_request(trail, run_id, step, name)
    Console().print(request_table(trail, request))
    entry = decide(trail, request, name=name, approve=not reject, note=note)
    word, colour = ("refused", typer.colors.YELLOW) if reject else ("approved", typer.colors.GREEN)
    typer.secho(f"{word} by {name} (record {entry.leaf_hash[:12]})", fg=colour)
    typer.echo(f"Go on with: trailmark run --resume {request.workflow}")


def list_workflows() -> None:
    """List the workflows that ran here."""
    from cluster.commands.workflow_tables import workflows_table

    _show(lambda trail: [workflows_table(trail)])


def show(name: NameArgument) -> None:
    """Show the last attempt of a run: its steps, what they made, why one failed, and its definition."""
    from cluster.commands.workflow_tables import run_view

    _show(lambda trail: run_view(trail, name))


def log(
    name: NameArgument,
    diff: Annotated[bool, typer.Option("--diff", help="Print each patch's diff.")] = False,
) -> None:
    """Tell a workflow's story: attempts, failures, patches with their authors and effects, approvals."""
    from cluster.commands.workflow_tables import story_view

    _show(lambda trail: story_view(trail, name, with_diffs=diff))


def _show(view: "Callable[[Trail], list[RenderableType]]") -> None:
    from rich.console import Console

    from attribution.trail import Trail

    console = Console()
    for part in view(Trail.open(create=False)):
        console.print(part)


def _tools(console: "Console", trail: "Trail", settings: "ClusterSettings", stack: contextlib.ExitStack) -> "Tools":
    """What the steps work with; Ray is joined or started when the first step needs it, and kept until the end."""
    from cluster.commands.workflow_tables import bars_for
    from cluster.session import ray_session
    from cluster.workflow_steps import Tools

    joined: list[str] = []

    def ray() -> None:
        if not joined:
            joined.append(stack.enter_context(ray_session(trail.home, settings)))

    return Tools(ray, lambda kind: bars_for(kind, console))


def _chosen(trail: "Trail", workflow: str | None, *, resume: bool, overrides: list[str]) -> "tuple[Workflow, str]":
    """Return the workflow to run and the file it came from."""
    from cluster.workflow_story import last_run, recorded_workflow
    from configs.errors import UserError
    from configs.workflow_file import load_workflow, workflow_presets

    if not resume:
        if workflow is None:
            raise UserError(f"workflow: name a YAML file or a preset ({', '.join(workflow_presets())})")
        loaded, file = load_workflow(workflow, overrides)
        return loaded, str(file)
    if overrides:
        raise UserError("--set: a resumed run is as it was defined; leave --resume out to change the workflow")
    run = last_run(trail, workflow)
    return recorded_workflow(trail, run), run.source
