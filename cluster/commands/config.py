"""`trailmark config`: see and check the settings."""

from typing import Annotated

import typer

FileArgument = Annotated[str | None, typer.Argument(help="A YAML file or a preset (local, h200, multi-node).")]


def register(app: typer.Typer) -> None:
    """Add `config show` and `config check`."""
    group = typer.Typer(help="Show and check settings.", no_args_is_help=True)
    group.command("show")(show)
    group.command("check")(check)
    app.add_typer(group, name="config", rich_help_panel="Cluster")


def show(file: FileArgument = None) -> None:
    """Print every setting, with what FILE leaves out filled in."""
    import yaml

    from configs.schema import load_settings

    settings = load_settings(file)
    typer.echo(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), nl=False)


def check(file: Annotated[str, typer.Argument(help="A YAML file or a preset.")]) -> None:
    """Read FILE; exit 2 naming each setting that is unknown or out of range."""
    from configs.schema import load_settings

    settings = load_settings(file)
    changed = settings.model_dump(exclude_defaults=True)
    num_changed = sum(len(fields) for fields in changed.values())
    typer.secho(f"{file}: good; {num_changed} settings differ from the defaults", fg=typer.colors.GREEN)
