"""`trailmark statement` and `trailmark verify statement`: share out fees, show, export, check."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.log import DIGEST_OPTION, KEYS_OPTION, tell, verify_app

if TYPE_CHECKING:
    from collections.abc import Callable

    from attribution.log.trust import Trust
    from attribution.log.verify import Verified
    from attribution.trail import Entry, Trail

PANEL = "Credit"
LeafArgument = Annotated[
    str | None, typer.Argument(metavar="[LEAF]", help="Leaf hash, its beginning, or index; the newest by default.")
]


def register(app: typer.Typer) -> None:
    """Add the group, and `verify statement`."""
    group = typer.Typer(no_args_is_help=True, help="Share out a period's fees by settled values; show and export it.")
    group.command()(make)
    group.command()(show)
    group.command()(export)
    app.add_typer(group, name="statement", rich_help_panel=PANEL)
    verify_app.command("statement")(verify)


def make(
    fees: Annotated[Path, typer.Argument(help="Fee table: request_id, payer, fee. CSV, JSON lines or Parquet.")],
    start: Annotated[str, typer.Option("--from", help="Start of the period, ISO 8601, UTC without an offset.")],
    end: Annotated[str, typer.Option("--to", help="Its end, not included.")],
    settlement: Annotated[
        list[str] | None, typer.Option(help="A settlement's leaf, repeatable, where the newest is not the one.")
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="A YAML file or a preset; section `credit`.")] = None,
) -> None:
    """Make the signed statement of a period. A row that may not be paid is listed with its reason."""
    from attribution.statement_make import Period, make_statement
    from attribution.trail import Trail
    from configs.schema import load_settings
    from pipelines.statement import find_copies

    trail = Trail.open(create=False)
    entry = make_statement(
        trail,
        fees,
        Period(_time_us("--from", start), _time_us("--to", end)),
        settings=load_settings(config).credit,
        find_copies=partial(find_copies, trail),
        chosen=settlement or (),
    )
    _print(trail, entry)


def show(leaf: LeafArgument = None) -> None:
    """Show a statement: parts, people with their intervals, what was listed."""
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    _print(trail, _entry(trail, leaf))


def export(
    leaf: LeafArgument = None,
    form: Annotated[str, typer.Option("--format", "-f", help="json (with its proof), csv, html, or all.")] = "all",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File; folder for `all` (default: statement).")
    ] = None,
) -> None:
    """Write a statement as JSON with its proof, as CSV, and as a page."""
    from attribution.statement_export import ALL, export_folder, export_text
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    entry = _entry(trail, leaf)
    if form == ALL:
        for path in export_folder(trail, entry, out or Path("statement")):
            typer.echo(f"  {path}  {path.stat().st_size / 1000:,.1f} kB")
        return
    text = export_text(trail, entry, form)
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")
        typer.secho(f"{out}: {len(text.encode()) / 1000:,.1f} kB", fg=typer.colors.GREEN, err=True)


def verify(
    file: Annotated[Path, typer.Argument(help="statement.json of `trailmark statement export`.")],
    keys: Annotated[Path | None, KEYS_OPTION] = None,
    trust_digest: Annotated[str | None, DIGEST_OPTION] = None,
    home: Annotated[
        Path | None, typer.Option(help="Home folder: hold receipts, settlements and rows to it as well.")
    ] = None,
    recheck: Annotated[int, typer.Option(min=0, help="Train so many random cells again; needs --home.")] = 0,
    seed: Annotated[int | None, typer.Option(help="Draws the cells; random by default, and printed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print checks and facts as one JSON object.")] = False,
) -> None:
    """Verify a statement offline: signature, place in the log, sums, every line. Exits 1 when a check fails."""
    from configs.env import home as default_home
    from configs.errors import UserError

    if recheck and home is None:
        raise UserError(f"--recheck {recheck}: needs the home folder, whose data is trained on again; add --home HOME")
    trust = keys or (home or default_home()) / "trust.json"
    check = partial(_check, file, partial(_trust, trust, trust_digest), home, num_cells=recheck, seed=seed)
    tell(file, check, as_json=as_json)


def _trust(keys: Path, digest: str | None) -> "Trust":
    from attribution.log.trust import Trust

    return Trust.load(keys, digest=digest)


def _check(
    file: Path, load_trust: "Callable[[], Trust]", home: Path | None, *, num_cells: int, seed: int | None
) -> "Verified":
    from attribution.log.proved import VerifyError
    from attribution.statement_recheck import settlements_of
    from attribution.statement_verify import check_home, verify_statement
    from attribution.trail import Trail
    from pipelines.settled_values import check_values
    from pipelines.statement import find_copies

    try:
        data = file.read_bytes()
    except OSError as error:
        raise VerifyError("file", f"{file}: cannot be read: {error.strerror}") from error
    verified, statement = verify_statement(data, trust=load_trust())
    if home is None:
        return verified
    trail = Trail.open(home, create=False)
    leaf_hash = verified.facts["leaf_hash"]
    verified.checks.extend(check_home(trail, statement, partial(find_copies, trail), leaf_hash=leaf_hash))
    verified.checks.extend(check_values(trail, settlement) for settlement in settlements_of(trail, statement))
    if num_cells:
        from attribution.statement_recheck import recheck
        from pipelines.settle.recheck import recheck as measure_again

        found = recheck(trail, statement, measure_again, num_cells=num_cells, seed=seed)
        verified.checks.append(
            f"recheck: {found.num_cells} random cells (seed {found.seed}) trained again; the largest difference is "
            f"{found.largest_difference:.2g} (coalition {found.worst.coalition}, item {found.worst.item}), allowed "
            f"{found.worst.tolerance:g}"
        )
    return verified


def _entry(trail: "Trail", leaf: str | None) -> "Entry":
    from configs.errors import UserError

    if leaf is not None:
        return trail.entry(trail.leaf_hash(leaf))
    entries = list(trail.entries(kind="statement"))
    if not entries:
        raise UserError("no statement in this log; `trailmark statement make FEES --from DAY --to DAY` makes one")
    return entries[-1]


def _print(trail: "Trail", entry: "Entry") -> None:
    from attribution.statement_make import read_statement
    from attribution.statement_names import names_of
    from cluster.commands.statement_tables import print_statement

    statement = read_statement(trail, entry)
    print_statement(statement, names_of(trail, statement), leaf_hash=entry.leaf_hash)


def _time_us(option: str, text: str) -> int:
    """The microseconds of an ISO 8601 time; integers throughout, for a period ends to the microsecond."""
    from datetime import UTC, datetime, timedelta

    from configs.errors import UserError

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{option} {text!r}: write ISO 8601, as in 2026-11-01 or 2026-11-01T08:00:00") from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
