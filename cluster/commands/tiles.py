"""`trailmark log tiles|fetch|consistency`: publish the log as static files, and read such files of any log."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.log import KEYS_OPTION, OUT_OPTION, log_app

if TYPE_CHECKING:
    from attribution.log.publisher import Publisher
    from attribution.log.tile_client import TileLog

SourceArgument = Annotated[str, typer.Argument(help="A folder of tiles, or the http(s) address they are served at.")]
LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def register(app: typer.Typer) -> None:
    """Add the three commands to `trailmark log`."""
    log_app.command("tiles")(tiles)
    log_app.command("fetch")(fetch)
    log_app.command("consistency")(consistency)


def tiles(
    out: Annotated[Path | None, typer.Option(help="Folder to write to. Default: HOME/tiles.")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until SIGTERM or Ctrl-C.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Write every file anew.")] = False,
    interval_s: Annotated[float, typer.Option(help="Seconds between looks at the log, with --follow.")] = 0.5,
) -> None:
    """Publish the log as static files (c2sp.org/tlog-tiles); HOME/policy's witnesses cosign its checkpoint."""
    from attribution.log.publisher import Publisher
    from attribution.log.tiles import rebuilt
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    publisher = Publisher(trail.log, home=trail.home, out=out)
    with publisher.exclusive():
        if rebuild:
            with rebuilt(publisher.out) as fresh:
                Publisher(trail.log, home=trail.home, out=fresh, cosigned=publisher.shown()).publish()
        if follow:
            _follow(publisher, interval_s)
        else:
            typer.echo(f"{publisher.out}: {publisher.publish()}")


def fetch(
    source: SourceArgument,
    index: Annotated[int, typer.Argument(help="Index of the entry.", min=0)],
    keys: Annotated[Path | None, KEYS_OPTION] = None,
    entry: Annotated[Path | None, typer.Option("--entry", help="Also write the entry's bytes to this file.")] = None,
    out: Annotated[Path | None, OUT_OPTION] = None,
) -> None:
    """Get an entry's proof (c2sp.org/tlog-proof) out of static files alone, checked against the signed checkpoint."""
    found = _open(source, keys).entry(index)
    if entry is not None:
        entry.write_bytes(found.entry)
    if out is None:
        typer.echo(found.proof, nl=False)
    else:
        out.write_text(found.proof, encoding="utf-8")
        typer.echo(f"{out}: entry {index} of {len(found.entry)} bytes, proof of {len(found.proof.encode())} bytes")


def consistency(
    source: SourceArgument,
    checkpoint: Annotated[Path, typer.Argument(help="A file with a checkpoint that the log signed earlier.")],
    keys: Annotated[Path | None, KEYS_OPTION] = None,
) -> None:
    """Show that a log still contains all it had when it signed an earlier checkpoint. Exits 2 when it does not."""
    from configs.errors import UserError

    try:
        older = checkpoint.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"checkpoint {checkpoint}: cannot be read: {error}") from error
    log = _open(source, keys)
    path = log.consistency(older)
    typer.secho(f"consistent: {log.checkpoint.size} leaves, proved by {len(path)} hashes", fg=typer.colors.GREEN)


def _open(source: str, keys: Path | None) -> "TileLog":
    from attribution.log.tile_client import TileLog, source_of
    from attribution.log.verify import Trust
    from configs.env import home

    trust = Trust.load(keys or home() / "trust.json")
    return TileLog(source_of(source), trust.log, former=trust.former_logs)


def _follow(publisher: "Publisher", interval_s: float) -> None:
    import logging
    import signal
    import threading

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    publisher.follow(stop, interval_s=interval_s, on_round=logging.getLogger(__name__).info)
