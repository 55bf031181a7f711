"""`trailmark verify` and `trailmark log`: check a file offline, look at the log, take proofs out of it."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from attribution.log.verify import Verified
    from attribution.trail import Entry

KEYS_OPTION = typer.Option("--keys", help="Trust file: {version, log, keys}. Default: trust.json of the home folder.")
DIGEST_OPTION = typer.Option("--trust-digest", help="The trust file must have this SHA-256, as `verify` prints it.")
OUT_OPTION = typer.Option("--out", "-o", help="Write to this file instead of the screen.")
SHOWN_LAST = ("log", "tree_size", "root", "trust", "witnesses", "keys")


class _FileByDefault(TyperGroup):
    """`trailmark verify FILE` means `trailmark verify file FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["file", *args]
        return super().parse_args(ctx, args)


verify_app = typer.Typer(
    cls=_FileByDefault,
    help="Verify offline; `verify FILE` checks a receipt, an ancestry or a record proof.",
    no_args_is_help=True,
)
log_app = typer.Typer(help="Look at the transparency log and take proofs out of it.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add `verify` and `log` to the command."""
    app.add_typer(verify_app, name="verify")
    app.add_typer(log_app, name="log")


@verify_app.command("file")
def verify(
    file: Annotated[Path, typer.Argument(help="A receipt, an ancestry or a record proof (JSON).")],
    ancestry: Annotated[
        Path | None, typer.Option(help="Ancestry of the receipt's adapter, from `trailmark log ancestry`.")
    ] = None,
    keys: Annotated[Path | None, KEYS_OPTION] = None,
    trust_digest: Annotated[str | None, DIGEST_OPTION] = None,
    policy: Annotated[
        Path | None, typer.Option(help="A tlog-policy file: witnesses, and how many must have cosigned.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print checks and facts as one JSON object.")] = False,
) -> None:
    """Verify a receipt, ancestry or record proof offline: no network, no log. Exits 1 when a check fails."""
    from attribution.log.verify import Trust, verify_file
    from configs.env import home

    def check() -> "Verified":
        trust = Trust.load(keys or home() / "trust.json", digest=trust_digest)
        trusted = trust if policy is None else trust.with_policy_of(policy)
        return verify_file(file, trust=trusted, ancestry=ancestry)

    tell(file, check, as_json=as_json)


@verify_app.command("adapter")
def adapter(
    target: Annotated[
        str, typer.Argument(metavar="DIR|ADAPTER", help="An exported folder, or NAME@VERSION, NAME or digest.")
    ],
    keys: Annotated[Path | None, KEYS_OPTION] = None,
    trust_digest: Annotated[str | None, DIGEST_OPTION] = None,
    signature: Annotated[Path | None, typer.Option(help="Model signature; default: model.sig beside DIR.")] = None,
    proof: Annotated[
        list[Path] | None, typer.Option(help="Record proof, repeatable; default: proof.json, *.proof.json beside DIR.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print checks and facts as one JSON object.")] = False,
) -> None:
    """Verify an adapter offline: its files, its model signature, its place in the log. Exits 1 when a check fails.

    A name is looked up in this home; a folder needs only the files beside it and the log's trust.json.
    """
    from attribution.log.verify import Trust
    from attribution.verify_adapter import verify_adapter, verify_adapter_of
    from configs.env import home

    folder = Path(target)
    trust_file = keys or (home() / "trust.json")
    if folder.is_dir():
        verify = partial(verify_adapter, folder, signature=signature, proofs=proof or ())
    else:
        verify = partial(verify_adapter_of, home(), target)
    tell(target, lambda: verify(trust=Trust.load(trust_file, digest=trust_digest)), as_json=as_json)


@log_app.command("show")
def show(
    leaf: Annotated[
        str | None, typer.Argument(help="Leaf hash, its beginning, or index: show that entry whole.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many of the newest entries.")] = 20,
) -> None:
    """List the newest entries, or show one."""
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    if leaf is None:
        _print_table(list(trail.entries(kind=kind))[-count:], total=trail.log.size)
    else:
        typer.echo(json.dumps(_entry_json(trail.entry(trail.leaf_hash(leaf))), indent=2, ensure_ascii=False))


@log_app.command("checkpoint")
def checkpoint() -> None:
    """Print the signed checkpoint, after checking every entry against it."""
    from attribution.trail import Trail

    typer.echo(Trail.open(create=False).log.checkpoint, nl=False)


@log_app.command("proof")
def proof(
    leaf: Annotated[str, typer.Argument(help="Leaf hash, its beginning, or index.")],
    out: Annotated[Path | None, OUT_OPTION] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Only the tlog-proof text, for other people's tools.")] = False,
) -> None:
    """Write a record's offline proof with those of its ancestors, for `trailmark verify`."""
    from attribution.lineage import record_bundle
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    leaf_hash = trail.leaf_hash(leaf)
    if not bare:
        _write(record_bundle(trail, leaf_hash), out)
        return
    text = trail.proof(leaf_hash)["proof"]
    if out is None:
        typer.echo(text, nl=False)
    else:
        out.write_text(text, encoding="utf-8")


@log_app.command("receipt")
def receipt(
    receipt_id: Annotated[str, typer.Argument(help="Receipt id, or its beginning.")],
    out: Annotated[Path | None, OUT_OPTION] = None,
    with_ancestry: Annotated[
        bool, typer.Option("--with-ancestry", help="One file with all the records its adapter comes from.")
    ] = False,
) -> None:
    """Write a completion's receipt, about 4 kB, with all that is needed to verify offline that the log holds it."""
    from attribution.receipt_file import receipt_file
    from attribution.receipts import receipt_bundle
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    if with_ancestry:
        _write(receipt_bundle(trail, receipt_id), out)
    else:
        _write(receipt_file(trail, receipt_id), out, indent=None)


@log_app.command("ancestry")
def ancestry(
    receipt_id: Annotated[str, typer.Argument(help="Receipt id, or its beginning.")],
    out: Annotated[Path | None, OUT_OPTION] = None,
) -> None:
    """Write the records that a receipt's adapter and base come from: one file for all receipts of that adapter."""
    from attribution.receipt_file import ancestry_file
    from attribution.trail import Trail

    _write(ancestry_file(Trail.open(create=False), receipt_id), out)


def tell(what: Path | str, verify: "Callable[[], Verified]", *, as_json: bool) -> None:
    """Print what was shown, or the check that failed, which exits 1."""
    from attribution.log.proved import VerifyError

    try:
        verified = verify()
    except VerifyError as error:
        if as_json:
            typer.echo(json.dumps({"verified": False, "check": error.check, "reason": error.reason}))
        else:
            typer.secho(f"NOT VERIFIED  {what}", fg=typer.colors.RED, bold=True, err=True)
            typer.echo(f"  failed check: {error.check}\n  {error.reason}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        result = {"verified": True, "kind": verified.kind, "checks": verified.checks, "facts": verified.facts}
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _print_verified(what, verified)


@log_app.command("take-over")
def take_over() -> None:
    """Take the log from a writer on a machine that is gone for good, so that this machine may append."""
    from attribution.trail import Trail

    log = Trail.open(create=False).log
    number = log.take_over()
    log.release()
    typer.echo(f"take-over {number}: every writer before it is fenced off")


def _write(value: dict[str, Any], out: Path | None, *, indent: int | None = 1) -> None:
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    out.write_text(text, encoding="utf-8")
    typer.echo(f"{out}: {len(text.encode()) / 1000:.1f} kB; check it with `trailmark verify {out}`")


def _print_verified(file: Path | str, verified: "Verified") -> None:
    typer.secho(f"VERIFIED  {file}  ({verified.kind})", fg=typer.colors.GREEN, bold=True)
    for check in verified.checks:
        name, _, rest = check.partition(": ")
        typer.echo(f"  ok  {name:<13} {rest}")
    facts = dict(verified.facts)
    people = facts.pop("contributors")
    for name in [*(key for key in facts if key not in SHOWN_LAST), *SHOWN_LAST]:
        _print_fact(name, facts.get(name))
    if people:
        typer.echo("\n  contributors            rows given  rows kept   key")
    for person in people:
        typer.echo(
            f"  {person['name'][:22]:<22} {person['num_rows']:>11} {person['num_kept']:>10}   {person['key_id'][:16]}"
        )


def _print_fact(name: str, value: Any) -> None:
    if name == "witnesses" and value is not None:
        for witness, time in value.items():
            typer.echo(f"  {'cosigned by':<20} {witness} at {time}")
    elif name == "keys":
        for key_id, whose in value.items():
            typer.echo(f"  {'key used':<20} {key_id} ({whose})")
    elif isinstance(value, dict | list):
        typer.echo(f"  {name:<20} {json.dumps(value, ensure_ascii=False)}")
    elif value is not None:
        typer.echo(f"  {name:<20} {value}")


def _print_table(entries: "list[Entry]", *, total: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from attribution.lineage import label_of
    from attribution.log.facts import utc

    table = Table(title=f"{total} entries", title_justify="left", box=None)
    for heading in ("index", "time", "kind", "what", "leaf"):
        table.add_column(heading, no_wrap=heading != "what")
    for entry in entries:
        table.add_row(str(entry.index), utc(entry.leaf.time_us), entry.leaf.kind, label_of(entry), entry.leaf_hash[:16])
    Console().print(table)


def _entry_json(entry: "Entry") -> dict[str, Any]:
    """The public leaf and the private statement, as they are."""
    from attribution.records import statement_of

    return {
        "index": entry.index,
        "leaf_hash": entry.leaf_hash,
        "leaf": entry.leaf.to_json(),
        "statement": "erased" if entry.record is None else statement_of(entry.record),
    }
