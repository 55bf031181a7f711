"""`trailmark audit`: what answers would lose without a few training rows, by differentiating the recorded run."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from attribution.influence.audit import Asked
    from attribution.trail import Trail
    from pipelines.audit.driver import AuditReport, Refused

PANEL = "Questions"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel=PANEL)(audit)


def audit(
    receipt: Annotated[str | None, typer.Argument(help="A receipt id, or its beginning.")] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Audit so many receipts of the home, drawn by --seed.")
    ] = None,
    queries: Annotated[
        str | None, typer.Option(metavar="SUITE", help="A suite file or refined dataset: the mean loss on it.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="With --queries: NAME, NAME@VERSION or digest.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of --sample.")] = 0,
    top: Annotated[int, typer.Option(min=1, help="Rows shown that helped most, and that hindered most.")] = 5,
    record: Annotated[bool, typer.Option(help="Append an influence record with every row's effect.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """What an answer would lose without a training row: causal for small removals; minutes, not seconds.

    The recorded run is replayed and differentiated exactly. The effects do not add up to the value created.
    """
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    asked, refused = _asked(trail, receipt, sample=sample, queries=queries, adapter=adapter, seed=seed)
    report = _run(trail, asked, num_top=top, record=record)
    _show(report, refused, as_json=as_json)
    if not report.audits:
        raise typer.Exit(2)


def _asked(
    trail: "Trail", receipt: str | None, *, sample: int | None, queries: str | None, adapter: str | None, seed: int
) -> "tuple[list[Asked], list[Refused]]":
    from configs.errors import UserError
    from pipelines.audit.driver import ask_of_receipts, ask_of_suite, draw_receipts

    if sum(given is not None for given in (receipt, sample, queries)) != 1:
        raise UserError("audit: give one of RECEIPT, --sample N and --queries SUITE (with --adapter)")
    if (queries is None) != (adapter is None):
        raise UserError("audit: --queries and --adapter go together: a query set is asked of one adapter")
    if queries is not None and adapter is not None:
        return [ask_of_suite(trail, queries, adapter=adapter)], []
    if sample is not None:
        return ask_of_receipts(trail, draw_receipts(trail, sample, seed=seed))
    assert receipt is not None
    from attribution.influence.audit import ask_of_receipt

    return [ask_of_receipt(trail, receipt)], []


def _run(trail: "Trail", asked: "list[Asked]", *, num_top: int, record: bool) -> "AuditReport":
    from contextlib import nullcontext

    from pipelines.audit.driver import audit as carry_out

    on_cluster = _cluster_is_up(trail.home)
    connection = nullcontext("")
    if on_cluster:
        from cluster.session import connect

        connection = connect(trail.home)  # type: ignore[assignment]
    with connection:
        return carry_out(trail, asked, num_top=num_top, record=record, on_cluster=on_cluster)


def _cluster_is_up(home: "Path") -> bool:
    from cluster.state import load_state

    return load_state(home).is_alive("ray")


def _show(report: "AuditReport", refused: "list[Refused]", *, as_json: bool) -> None:
    everything = [*refused, *report.refused]
    if as_json:
        import json

        audits = [each.to_dict() for each in report.audits]
        left = [{"question": one.question, "reason": one.reason} for one in everything]
        typer.echo(json.dumps({"audits": audits, "refused": left}, indent=2, ensure_ascii=False))
        return
    from cluster.commands.audit_tables import print_audits

    print_audits(report.audits, everything)
