"""`trailmark fsck`: check everything on disk, and remove what a crash left behind."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attribution.fsck import Finding, Report


def register(app: typer.Typer) -> None:
    """Add `fsck` to the command."""
    app.command()(fsck)


def fsck(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what a crash left behind; damage is told, never touched.")
    ] = False,
    store: Annotated[bool, typer.Option(help="Hash every stored file again too (about 1 GB/s).")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Check the log, its checkpoint, every record, the store and the tiles of this home against one another.

    Exit code 0: sound (what a crash left behind is listed and does no harm). 1: something is damaged. 2: not checked.
    """
    from attribution import fsck as checker
    from configs.env import home

    report = checker.check(home(), with_store=store)
    done = checker.repair(home()) if repair and report.is_sound else []
    if done:
        report = checker.check(home(), with_store=False)
    if as_json:
        found = {name: [asdict(finding) for finding in getattr(report, name)] for name in ("damage", "leftovers")}
        result = {"sound": report.is_sound, "checked": dict(report.checked), "repaired": done, **found}
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(report, done)
    if not report.is_sound:
        raise typer.Exit(1)


def _print(report: "Report", done: list[str]) -> None:
    for step in done:
        typer.echo(f"repaired  {step}")
    for finding in report.leftovers:
        _print_finding("leftover", finding)
    for finding in report.damage:
        _print_finding("DAMAGE", finding)
    what = ", ".join(f"{count} {name}" for name, count in report.checked.items() if count)
    if report.is_sound:
        typer.secho(f"SOUND  {what or 'an empty log'}", fg=typer.colors.GREEN, bold=True)
    else:
        typer.secho(f"DAMAGED  {len(report.damage)} findings; {what}", fg=typer.colors.RED, bold=True)


def _print_finding(label: str, finding: "Finding") -> None:
    typer.echo(f"{label:<9} {finding.where}\n          {finding.what}\n          -> {finding.remedy}")
