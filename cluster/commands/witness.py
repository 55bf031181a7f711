"""`trailmark witness`: be a witness of a log, and see what the witnesses of this home's log say."""

from pathlib import Path
from typing import Annotated

import typer

DirectoryArgument = Annotated[Path, typer.Argument(help="The witness's folder.")]
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

witness_app = typer.Typer(
    help="Witness a log: cosign its checkpoints, and never two that contradict each other.", no_args_is_help=True
)


def register(app: typer.Typer) -> None:
    """Add `witness create|add-log|run|show|status|policy`."""
    app.add_typer(witness_app, name="witness")


@witness_app.command("create")
def create(
    directory: DirectoryArgument,
    name: Annotated[str, typer.Option(help="An address without scheme that is yours, e.g. witness.example.org/w1.")],
    ml_dsa: Annotated[bool, typer.Option("--ml-dsa", help="Cosign with an ML-DSA-44 key as well.")] = False,
) -> None:
    """Make a witness's keys and folder, and print the keys that readers put in their policies."""
    from attribution.log.witness import Witness

    for key in Witness.create(directory, name, with_ml_dsa=ml_dsa).keys:
        typer.echo(str(key))


@witness_app.command("add-log")
def add_log(
    directory: DirectoryArgument,
    key: Annotated[str, typer.Argument(help="The log's verifier key: `log` in its trust.json.")],
) -> None:
    """Let a witness, running or not, cosign a log."""
    from attribution.log.note import NoteError, NoteKey
    from attribution.log.witness import Witness
    from configs.errors import UserError

    try:
        parsed = NoteKey.parse(key)
    except NoteError as error:
        raise UserError(f"log key {key!r}: {error}") from error
    Witness(directory).add_log(parsed)
    typer.secho(f"{parsed.name} will be cosigned", fg=typer.colors.GREEN)


@witness_app.command("run")
def run(
    directory: DirectoryArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8702,
) -> None:
    """Answer add-checkpoint requests until SIGTERM or Ctrl-C."""
    import logging
    import signal
    import threading

    from attribution.log.witness import Witness
    from attribution.log.witness_http import serve

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    with serve(Witness(directory), host=host, port=port) as server:
        for number in (signal.SIGTERM, signal.SIGINT):
            # In a thread: `shutdown` waits for the loop that this signal interrupts.
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        typer.echo(f"witness answers on http://{host}:{server.server_port}")
        server.serve_forever(0.1)


@witness_app.command("show")
def show(directory: DirectoryArgument) -> None:
    """Print a witness's keys, the logs it knows, and where the requests lie that it refused as contradictions."""
    from attribution.log.witness import Witness
    from attribution.log.witness_http import describe

    witness = Witness(directory)
    typer.echo(describe(witness), nl=False)
    for path in witness.refusals():
        typer.echo(f"  {path}")


@witness_app.command("status")
def status() -> None:
    """Print what the witnesses of this home's log said last. Exits 1 when one has seen another log than this."""
    from attribution.log.facts import utc
    from attribution.log.publisher import load_outcome
    from configs.env import home

    outcome = load_outcome(home())
    if outcome is None or not outcome.witnesses:
        typer.echo("no witness was asked yet; `trailmark up` starts two, and HOME/policy lists them")
        raise typer.Exit(1)
    for state in outcome.witnesses:
        when = f", at {utc(state.cosigned_s * 1_000_000)}" if state.cosigned_s else ""
        typer.echo(f"{state.name:<14} {state.size} leaves cosigned{when}  {state.url}")
        if state.error:
            typer.echo(f"{'':<14} {state.error}")
        if state.alarm:
            typer.secho(f"{'':<14} ALARM {state.alarm}", fg=typer.colors.RED, bold=True)
    if outcome.error:
        typer.secho(outcome.error, fg=typer.colors.RED, bold=True)
    if outcome.error or any(state.alarm for state in outcome.witnesses):
        raise typer.Exit(1)


@witness_app.command("policy")
def policy(
    quorum: Annotated[
        str | None, typer.Option(help="Cosignatures to ask for: none, any, all or a number. Default: as HOME/policy.")
    ] = None,
) -> None:
    """Print a tlog-policy of this home's log and witnesses, for `trailmark verify --policy` and for other tools."""
    from attribution.log.note import NoteKey
    from attribution.log.policy import ML_DSA_44_COSIGNATURE, Policy
    from attribution.log.publisher import POLICY_FILE, policy_of
    from configs.env import home
    from configs.errors import UserError

    path = home() / POLICY_FILE
    if not path.is_file():
        raise UserError(f"{path}: not found; `trailmark up` writes it, or write one (c2sp.org/tlog-policy)")
    known = Policy.load(path)
    if quorum is None:
        typer.echo(known.text(), nl=False)
        return
    key = next(log.key for log in known.logs if isinstance(log.key, NoteKey))
    listed = [
        (item.name, item.url or "", [item.key])
        for item in known.witnesses
        if item.key.algorithm != ML_DSA_44_COSIGNATURE
    ]
    text = policy_of(listed, key, quorum)
    typer.echo(Policy.parse(text.encode()).text(), nl=False)
