"""`trailmark key`: the signing keys of this home, what happened to each, and how to change one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attribution.keys import SigningKey
    from attribution.remote_keys import RemoteKey
    from attribution.trail import Trail

NAME_HELP = "A contributor's name, `operator` or `log`."


def register(app: typer.Typer) -> None:
    """Add the commands."""
    key = typer.Typer(help="Signing keys: rotate, revoke, encrypt, and what happened to them.", no_args_is_help=True)
    for command in (list_keys, show, rotate, revoke, encrypt, history):
        key.command("list" if command is list_keys else command.__name__)(command)
    app.add_typer(key, name="key", rich_help_panel="Trail")


def list_keys() -> None:
    """List the keys of this home: whose, where the private half is, and whether it may still sign."""
    from attribution.trail import Trail
    from cluster.commands.key_tables import key_table

    _print(key_table(Trail.open(create=False)))


def show(name: Annotated[str, typer.Argument(help=NAME_HELP)]) -> None:
    """Show the key that NAME signs with now."""
    from attribution.key_changes import current_key
    from attribution.trail import Trail
    from cluster.commands.key_tables import key_events, where_of

    trail = Trail.open(create=False)
    key = current_key(trail, name)
    typer.echo(f"name        {key.name} ({key.role})\nkey id      {key.key_id}\npublic key  {key.public_hex}")
    if name == "log":
        typer.echo(f"verifier    {trail.log.key}")
    typer.echo(f"private     {where_of(trail, name)}")
    for event in key_events(trail, name):
        if event.key_id == key.key_id:
            typer.echo(f"{event.what:<11} {event.time}  {event.detail}")


def rotate(
    name: Annotated[str, typer.Argument(help=NAME_HELP)],
    lost: Annotated[bool, typer.Option("--lost", help="The old key cannot sign; the operator's vouches.")] = False,
    uri: Annotated[str | None, typer.Option(help="Take a key kept elsewhere: file2:PATH or hv:NAME/VERSION.")] = None,
    public_key: Annotated[str | None, typer.Option(help="Its public key in hex (for file2: read from it).")] = None,
) -> None:
    """Give NAME a new key. The old one signs the change, then nothing more; what it signed before stays valid."""
    from attribution.key_changes import rotate as change
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    old = trail.keys.get(name).key_id if trail.keys.has(name) else "(lost)"
    entry = change(trail, name, lost=lost, replacement=None if uri is None else _remote(name, uri, public_key))
    new = trail.keys.get(name)
    typer.secho(f"{name}: key {old[:16]} gave way to {new.key_id[:16]} (record {entry.leaf_hash[:12]})", fg="green")
    typer.echo(f"The old key lies in {trail.keys.directory / 'former'}; it signs nothing any more.")
    _tell_readers(trail, name)


def revoke(
    name: Annotated[str, typer.Argument(help=NAME_HELP)],
    reason: Annotated[str, typer.Option(help="Why; it stands in the log for good.")],
    since: Annotated[
        str | None, typer.Option("--from", help="From when on, ISO 8601 in UTC (2026-11-25T08:00:00); default: now.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Id of one key of NAME; default: all in force then or later.")] = None,
) -> None:
    """Record that what NAME signed from a time on does not count. Older records stay valid."""
    from attribution.bodies import KeyRevocationBody
    from attribution.key_changes import current_key, key_ids_of_name
    from attribution.key_changes import revoke as end
    from attribution.log.facts import utc
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    matches = [key_id for key_id in key_ids_of_name(trail, name) if key and key_id.startswith(key)]
    key_id = matches[0] if len(matches) == 1 else key
    revoked = []
    for entry in end(trail, name, reason=reason, from_us=None if since is None else _time_us(since), key_id=key_id):
        body = entry.record.body if entry.record is not None else None
        if isinstance(body, KeyRevocationBody):
            revoked.append(body.key_id)
            what = f"key {body.key_id[:16]} revoked from {utc(body.from_us)} on"
        else:
            what = "rotated first"
        typer.secho(f"{name}: {what} (record {entry.leaf_hash[:12]})", fg="green")
    if current_key(trail, name).key_id in revoked:
        typer.echo(f"`trailmark key rotate {name!r} --lost` gives {name} a new key.")
    _tell_readers(trail, name)


def encrypt(
    names: Annotated[list[str] | None, typer.Argument(help="Which keys; default: every one that is not yet.")] = None,
) -> None:
    """Put private keys under a passphrase: $TRAILMARK_KEY_PASSPHRASE, else asked for twice."""
    from attribution.keys import encrypt_key_file
    from attribution.trail import Trail
    from cluster.commands.key_tables import where_of

    trail = Trail.open(create=False)
    chosen = names or [name for name in trail.keys.list() if where_of(trail, name) == "plain file"]
    passphrase = _new_passphrase() if chosen else ""
    for name in chosen:
        encrypt_key_file(trail.keys, name, passphrase)
        typer.secho(f"{name}: encrypted (scrypt, AES-256)", fg="green")
    if not chosen:
        typer.echo("No key lies in the open.")


def history(name: Annotated[str | None, typer.Argument(help=NAME_HELP)] = None) -> None:
    """Tell what happened to every key: introduced, rotated, revoked, with the records that say so."""
    from attribution.trail import Trail
    from cluster.commands.key_tables import history_table

    _print(history_table(Trail.open(create=False), name))


def _print(table: object) -> None:
    from rich.console import Console

    Console().print(table)


def _remote(name: str, uri: str, public_key: str | None) -> "RemoteKey":
    from attribution.keys import SigningKeyError
    from attribution.remote_keys import RemoteKey, public_key_of, require_scheme

    require_scheme(uri)
    if public_key is not None:
        return RemoteKey(name, uri, public_key_of(public_key))
    if not uri.startswith("file2:"):
        raise SigningKeyError(f"--public-key: needed for {uri}; give the key's 64 hex digits")
    return RemoteKey(name, uri, _key_at(Path(uri.removeprefix("file2:"))).public_bytes)


def _key_at(path: Path) -> "SigningKey":
    from attribution.keys import SigningKey

    return SigningKey.load(path)


def _new_passphrase() -> str:
    from configs.env import key_passphrase

    given = key_passphrase()
    if given:
        return given
    typed: str = typer.prompt("New passphrase", hide_input=True, confirmation_prompt=True)
    return typed


def _time_us(text: str) -> int:
    from datetime import UTC, datetime

    from configs.errors import UserError

    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--from {text!r}: write ISO 8601, as in 2026-11-25T08:00:00") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def _tell_readers(trail: "Trail", name: str) -> None:
    """Say what readers and witnesses must do; what this home can do itself for a new log key is done."""
    if name not in ("operator", "log"):
        return
    home = trail.home
    typer.echo(f"Hand out {home / 'trust.json'} again; receipts of before and after verify with the old one too.")
    if name == "log":
        from attribution.log.publisher import renew_published

        trail.refresh()
        if published := renew_published(trail.log, home):
            typer.echo(f"Published under the new key: {published}.")
        for witness in _strange_witnesses(home):
            typer.echo(f"Witness {witness}: its operator runs `trailmark witness add-log DIR {trail.log.key}`.")


def _strange_witnesses(home: Path) -> list[str]:
    """The witnesses that HOME/policy asks and that do not lie in this home."""
    from attribution.log.policy import Policy
    from attribution.log.publisher import POLICY_FILE, WITNESSES
    from attribution.log.witness import KEY_FILE, Witness

    if not (home / POLICY_FILE).is_file():
        return []
    folders = [file.parent for file in (home / WITNESSES).glob(f"*/{KEY_FILE}")]
    own = {str(key) for folder in folders for key in Witness(folder).keys}
    return [
        f"{item.name} ({item.url})"
        for item in Policy.load(home / POLICY_FILE).witnesses
        if item.url and str(item.key) not in own
    ]
