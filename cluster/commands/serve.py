"""`trailmark apikey`: who may call the API. Keys take effect at the next request, without a restart."""

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add `apikey create`, `list` and `revoke`."""
    group = typer.Typer(help="Make, list and revoke keys of the API.", no_args_is_help=True)
    group.command("create")(create)
    group.command("list")(list_keys)
    group.command("revoke")(revoke)
    app.add_typer(group, name="apikey", rich_help_panel="Serve")


def create(
    name: Annotated[str, typer.Argument(help="What the key is for, for example the service that will use it.")],
    tenant: Annotated[str, typer.Option(help="Whose receipts it may read; the name by default.")] = "",
    operator: Annotated[
        bool, typer.Option("--operator", help="Let it read every tenant's receipts and all lineage.")
    ] = False,
) -> None:
    """Make a key and print it. It is shown this once; the file keeps only its hash."""
    from configs import env
    from serve_apps.apikeys import ApiKeys, keys_path

    secret = ApiKeys(keys_path(env.home())).create(name, tenant=tenant or None, is_operator=operator)
    typer.echo(secret)
    typer.secho("Keep it now: it cannot be shown again. Use it as OPENAI_API_KEY.", err=True)


def list_keys() -> None:
    """List the keys: names and tenants, never secrets."""
    from datetime import UTC, datetime

    from rich.console import Console
    from rich.table import Table

    from configs import env
    from serve_apps.apikeys import ApiKeys, keys_path

    keys = ApiKeys(keys_path(env.home())).list()
    if not keys:
        typer.echo("no API key yet; make one with: trailmark apikey create NAME")
        return
    table = Table("name", "id", "tenant", "reads", "made (UTC)")
    for key in keys:
        made = datetime.fromtimestamp(key.created_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(key.name, key.key_id, key.tenant, "every receipt" if key.is_operator else "its own", made)
    Console().print(table)


def revoke(name: Annotated[str, typer.Argument(help="The key's name or id.")]) -> None:
    """Revoke a key; requests with it are refused from now on."""
    from configs import env
    from serve_apps.apikeys import ApiKeys, keys_path

    key = ApiKeys(keys_path(env.home())).revoke(name)
    typer.echo(f"revoked {key.name} ({key.key_id})")
