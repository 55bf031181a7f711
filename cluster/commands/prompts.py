"""`trailmark prompt`: templates that completions can be made with, and be traced back to."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `prompt add|list|show`."""
    prompt = typer.Typer(help="Prompt templates, signed and versioned like data.", no_args_is_help=True)
    prompt.command("add")(add)
    prompt.command("list")(list_prompts)
    prompt.command("show")(show)
    app.add_typer(prompt, name="prompt", rich_help_panel="Data")


def add(
    file: Annotated[Path, typer.Argument(help="Text; {{ name }} is a variable that each request fills in.")],
    contributor: Annotated[str, typer.Option("--as", help="Who wrote it.")],
    name: Annotated[str | None, typer.Option(help="Name of the prompt; the file's name by default.")] = None,
) -> None:
    """Sign and record the template in FILE as the next version of its name."""
    from attribution.bodies import PublicationBody
    from attribution.prompt_template import variables_of
    from attribution.trail import Trail
    from configs.errors import UserError
    from pipelines.prompts import register_prompt

    try:
        template = file.read_text(encoding="utf-8").strip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text: {error}") from error
    entry, published = register_prompt(Trail.open(), name or file.stem, template, contributor=contributor)
    assert published.record is not None and isinstance(published.record.body, PublicationBody)
    body = published.record.body
    typer.secho(f"{body.name}@{body.version}: {body.digest} (record {entry.leaf_hash[:12]})", fg=typer.colors.GREEN)
    filled = "".join(f', "{variable}": "..."' for variable in variables_of(template))[2:]
    variables = f', "variables": {{{filled}}}' if filled else ""
    typer.echo(f'Chat requests name it: "prompt": {{"id": "{body.name}", "version": "{body.version}"{variables}}}')


def list_prompts() -> None:
    """List every version of every prompt."""
    from attribution.log.facts import utc
    from attribution.trail import Trail

    for found in Trail.open(create=False).registry.list(kind="prompt"):
        typer.echo(f"{found.reference:<32} {utc(found.time_us)}  {found.digest[:19]}")


def show(reference: Annotated[str, typer.Argument(help="NAME or NAME@VERSION.")]) -> None:
    """Print a prompt's template."""
    from attribution.trail import Trail

    trail = Trail.open(create=False)
    found = trail.registry.resolve(reference, kind="prompt")
    typer.echo(trail.store.get_blob(found.digest).decode())
