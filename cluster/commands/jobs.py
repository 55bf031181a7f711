"""`trailmark job`: refine, train, benchmark, settle and run in the cluster, outliving the terminal."""

from typing import Annotated

import typer

JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id, or the start of it.")]


def register(app: typer.Typer) -> None:
    """Add `job submit`, `logs`, `stop` and `list`."""
    group = typer.Typer(help="Run refine, train, benchmark, settle and workflows in the cluster.", no_args_is_help=True)
    group.command("submit", context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(submit)
    group.command("logs")(logs)
    group.command("stop")(stop)
    group.command("list")(list_jobs)
    app.add_typer(group, name="job", rich_help_panel="Cluster")


def submit(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help="refine, train, benchmark, settle or run; its own arguments follow.")],
) -> None:
    """Start `trailmark COMMAND ...` in the cluster and print its id."""
    from cluster import jobs
    from configs import env

    if command in jobs.JOB_COMMANDS and {"--help", "-h"} & set(context.args):
        root = context.find_root().command
        root.main([command, "--help"], prog_name="trailmark", standalone_mode=False)
        return
    job_id = jobs.submit(env.home(), [command, *context.args])
    typer.echo(job_id)
    typer.secho(f"follow it with: trailmark job logs {job_id} --follow", err=True)


def logs(
    job_id: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the job ends.")] = False,
) -> None:
    """Print a job's output. With --follow, exit 1 when the job failed."""
    from cluster import jobs
    from configs import env

    for chunk in jobs.logs(env.home(), job_id, follow=follow):
        typer.echo(chunk, nl=False)
    if follow and jobs.find(env.home(), job_id).status != "SUCCEEDED":
        raise typer.Exit(1)


def stop(job_id: JobArgument) -> None:
    """Stop a job."""
    from cluster import jobs
    from configs import env

    stopped = jobs.stop(env.home(), job_id)
    typer.echo(f"{stopped.job_id}: {stopped.status.lower()}")


def list_jobs() -> None:
    """List the cluster's jobs, newest first."""
    from datetime import datetime

    from rich.console import Console
    from rich.table import Table

    from cluster import jobs
    from configs import env

    table = Table("id", "status", "started", "command")
    for job in jobs.list_jobs(env.home()):
        started = datetime.fromtimestamp(job.start_us / 1e6).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(job.job_id, job.status.lower(), started, job.command)
    Console().print(table)
