"""`trailmark monitor`: replay the log and check all it promises, from a memory of one's own."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attribution.monitor import Progress, Report
    from attribution.trail import Trail

NUM_SHOWN = 50


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Trail")(monitor)


def monitor(
    follow: Annotated[bool, typer.Option("--follow/--once", help="Look again and again, or once.")] = False,
    url: Annotated[str | None, typer.Option(help="Watch a log by its tiles (tlog-tiles) at this address.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Watch the log of this home; default: yours.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder of the monitor's memory; default: in your cache.")] = None,
    keys: Annotated[Path | None, typer.Option(help="Trust file; default: trust.json of the home.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Check the records of entries seen before as well.")] = False,
    views: Annotated[bool, typer.Option(help="Compare the views with the log too.")] = True,
    mlflow: Annotated[str | None, typer.Option(help="MLflow's address; default: the one of `trailmark up`.")] = None,
    interval_s: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print each report as one JSON object.")] = False,
) -> None:
    """Check hashes, consistency, signatures, lineage, redactions and views. Exits 1 when anything does not hold.

    Only what is new since the last run is read. Keep the memory where the log's operator cannot write: it is what
    tells a fork or a rollback.
    """
    stop = _stop_signal() if follow else None
    found = False
    while True:
        report = _look(url, folder, state, keys, full=full, views=views, mlflow=mlflow, quiet=as_json)
        found |= bool(report.violations)
        _print(report, as_json=as_json)
        if stop is None or stop.wait(interval_s):
            break
    if found:
        raise typer.Exit(1)


def _look(
    url: str | None,
    folder: Path | None,
    state: Path | None,
    keys: Path | None,
    *,
    full: bool,
    views: bool,
    mlflow: str | None,
    quiet: bool,
) -> "Report":
    from hashlib import sha256

    from attribution.log.sequencer import LogError
    from attribution.log.trust import Trust
    from attribution.monitor import Report, Violation, watch
    from attribution.monitor_sources import TrailSource, UrlSource
    from attribution.monitor_state import Memory
    from attribution.monitor_views import check_views
    from attribution.trail import Trail
    from configs.env import cache_home, home

    where = folder or home()
    trust = Trust.load(keys or where / "trust.json")
    memory = Memory(state or cache_home() / "monitor" / sha256(trust.log.name.encode()).hexdigest()[:16])
    if url is not None:
        report = watch(UrlSource(url), memory, trust.history(), progress=_progress(quiet))
        report.views["all"] = "not compared: they lie in the home, not among the tiles"
        return report
    try:
        trail = Trail.open(where, create=False)
    except LogError as error:  # the files do not even lead to their own checkpoint
        return Report(trust.log.name, 0, "", memory.size, {"hashes": 1}, [Violation("hashes", None, str(error))])
    report = watch(TrailSource(trail), memory, trust.history(), trail=trail, full=full, progress=_progress(quiet))
    if views and report.size:
        address, omitted = (mlflow, "") if mlflow else _mlflow_of(trail)
        check_views(trail, report, mlflow_uri=address, no_mlflow=omitted)
    else:
        report.views["all"] = f"not compared: {'the log itself does not hold' if views else '--no-views'}"
    return report


def _mlflow_of(trail: "Trail") -> tuple[str | None, str]:
    """The address of the home's MLflow, or None and why it cannot be asked."""
    from cluster.services import http_answers
    from cluster.state import load_state

    url = load_state(trail.home).mlflow_url
    if not url:
        return None, "none runs for this home; --mlflow URL gives the address of another"
    return (url, "") if http_answers(f"{url}/health") else (None, f"{url} does not answer")


def _progress(quiet: bool) -> "Progress":
    from configs.env import is_interactive

    def show(done: int, total: int) -> None:
        if total > 10_000:
            typer.echo(f"\r{done:,} of {total:,} entries", nl=False, err=True)

    return show if not quiet and is_interactive() else lambda done, total: None


def _stop_signal() -> Any:
    import signal
    import threading

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _print(report: "Report", *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        typer.echo(json.dumps({"holds": not report.violations, **asdict(report)}, ensure_ascii=False))
        return
    word, colour = ("VIOLATED", "red") if report.violations else ("HOLDS", "green")
    num_new = report.size - report.first if report.size else 0
    typer.secho(f"{word}  {report.origin or 'log'}: {report.size} entries, {num_new} checked now", fg=colour, bold=True)
    for check, number in sorted(item for item in report.checked.items() if not item[0].startswith("view ")):
        bad = sum(item.check == check for item in report.violations)
        typer.echo(f"  {'--' if bad else 'ok'}  {check:<14} {number} checked{f', {bad} do not hold' if bad else ''}")
    for view, told in report.views.items():
        mark = "ok" if told.startswith("equals") else "??" if told.startswith("not") else "--"
        typer.echo(f"  {mark}  view {view:<9} {told}")
    for item in report.void[:NUM_SHOWN]:
        typer.echo(f"  void  entry {item.index}, {item.check.replace('_', ' ')}: {item.detail}; it counts for nothing")
    for item in report.violations[:NUM_SHOWN]:
        place = "log" if item.index is None else f"entry {item.index}"
        typer.secho(f"  {item.check}: {place}: {item.detail}", fg="red", err=True)
    if len(report.violations) > NUM_SHOWN:
        typer.echo(f"  and {len(report.violations) - NUM_SHOWN} more; --json tells all", err=True)
