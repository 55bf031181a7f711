"""`trailmark export|sign`: an adapter's lineage in other people's formats, and its model signature."""

import re
from pathlib import Path
from typing import Annotated

import typer

PANEL = "Adapters"


def register(app: typer.Typer) -> None:
    """Add the two commands."""
    app.command(rich_help_panel=PANEL)(export)
    app.command(rich_help_panel=PANEL)(sign)


def export(
    adapter: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or digest of an adapter.")],
    form: Annotated[
        str, typer.Option("--format", "-f", help="cyclonedx, openlineage, prov, slsa, model-card, or all of them.")
    ] = "all",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File, or folder for `all` (default: NAME-VERSION here).")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="With `all`: copy the adapter's files too.")] = False,
) -> None:
    """Write where ADAPTER comes from, for tools and people outside: documents, proofs, signature.

    The same log gives the same files, byte for byte.
    """
    from attribution.exports.dossier import ExportError, gather
    from attribution.exports.formats import ALL, export_folder, export_text
    from attribution.trail import Trail

    if weights and form != ALL:
        raise ExportError(f"--weights: goes with --format all, not {form}")
    trail = Trail.open(create=False)
    dossier = gather(trail, adapter)
    for hole in dossier.holes:
        typer.secho(f"missing: {hole.sentence}", fg=typer.colors.YELLOW, err=True)
    for sentence in dossier.void.values():
        typer.secho(f"void: {sentence}", fg=typer.colors.YELLOW, err=True)
    if form == ALL:
        folder = out or Path(re.sub(r"[^\w.-]+", "-", dossier.reference).strip("-"))
        written = export_folder(trail, dossier, folder, weights=weights)
        _tell_validity((folder / "bom.cdx.json").read_text(encoding="utf-8"))
        for path in written:
            typer.echo(f"  {path}  {path.stat().st_size / 1000:,.1f} kB")
        typer.secho(f"{dossier.reference}: {len(written)} files in {folder}", fg=typer.colors.GREEN)
        return
    text = export_text(trail, dossier, form)
    if form == "cyclonedx":
        _tell_validity(text)
    if out is None:
        typer.echo(text, nl=False)
    elif out.is_dir():
        raise ExportError(f"--out {out}: is a folder; give a file for one format")
    else:
        out.write_text(text, encoding="utf-8")
        typer.secho(f"{out}: {len(text.encode()) / 1000:,.1f} kB", fg=typer.colors.GREEN, err=True)


def sign(
    adapter: Annotated[str, typer.Argument(help="NAME, NAME@VERSION or digest of an adapter.")],
) -> None:
    """Give ADAPTER a model signature (OpenSSF, P-256) and record it; publishing does so by itself."""
    from attribution.exports.dossier import resolve_adapter
    from attribution.signed_models import sign as run
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    digest, _ = resolve_adapter(trail, adapter)
    is_new = run(trail, digest)
    words = "signed and recorded" if is_new else "has a signature of this home's key already"
    typer.secho(f"{adapter}: {words}", fg=typer.colors.GREEN)


def _tell_validity(text: str) -> None:
    """Hold a bill of materials to the schema; say so when that could not be done."""
    from attribution.exports.cyclonedx import validate

    if not validate(text):
        typer.echo("CycloneDX not validated: pip install 'trailmark[exports]' brings the schema", err=True)
