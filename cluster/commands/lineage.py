"""`trailmark lineage ancestors|descendants|impact|path|diff|check`: ask the graph by the names people hold."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attribution.lineage_queries import LineageQueries

THING_HELP = (
    "NAME, NAME@VERSION, a receipt id, an example id, a digest, a key id, a leaf hash or the beginning of one; "
    "KIND:NAME when several have the name (rule:length, contributor:mira, row:1a2b3c4d)."
)
ThingArgument = Annotated[str, typer.Argument(metavar="THING", help=THING_HELP)]
KindOption = Annotated[list[str] | None, typer.Option("--kind", help="List records of this kind; repeat it.")]
LimitOption = Annotated[int, typer.Option("--limit", "-n", min=1, max=1000, help="Records to list, newest first.")]
BeforeOption = Annotated[int | None, typer.Option(help="List records before this log index: the next page.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")]


def add_to(group: typer.Typer) -> None:
    """Add the commands to `trailmark lineage`."""
    for command in (ancestors, descendants, impact, path, diff, check):
        group.command()(command)


def ancestors(
    thing: ThingArgument,
    kind: KindOption = None,
    limit: LimitOption = 50,
    before: BeforeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what THING was made from, directly or not."""
    _show_answer(_queries().ancestors(thing, kinds=kind or (), limit=limit, before=before), as_json)


def descendants(
    thing: ThingArgument,
    kind: KindOption = None,
    limit: LimitOption = 50,
    before: BeforeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what came of THING, directly or not."""
    _show_answer(_queries().descendants(thing, kinds=kind or (), limit=limit, before=before), as_json)


def impact(
    thing: ThingArgument,
    kind: KindOption = None,
    limit: LimitOption = 20,
    before: BeforeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which adapters and completions descend from a row, contributor, rule, prompt or any other THING."""
    from attribution.lineage_queries import AFFECTED_KINDS

    _show_answer(_queries().impact(thing, kinds=kind or AFFECTED_KINDS, limit=limit, before=before), as_json)


def path(
    ancestor: Annotated[str, typer.Argument(help="What it starts from; named as THING elsewhere.")],
    descendant: Annotated[str, typer.Argument(help="What it leads to.")],
    as_json: JsonOption = False,
) -> None:
    """Show a shortest chain of records from ANCESTOR to DESCENDANT; exit 1 when there is none."""
    found = _queries().path(ancestor, descendant)
    if as_json:
        _print_json(found.to_dict())
    else:
        from cluster.commands.lineage_tables import print_path

        print_path(found)
    if not found.items:
        raise typer.Exit(1)


def diff(
    older: Annotated[str, typer.Argument(help="The older version; alone: compare NAME@VERSION with the one before.")],
    newer: Annotated[str | None, typer.Argument(help="The newer version.")] = None,
    as_json: JsonOption = False,
    config: Annotated[str | None, typer.Option("--config", help="A YAML file or a preset (local, h200, ...).")] = None,
) -> None:
    """Say what changed between two versions and what it did to the score."""
    from attribution.lineage_diff import diff as compare
    from attribution.questions import Resampling
    from attribution.trail import Trail
    from configs.schema import load_settings

    section = load_settings(config).attribution
    resampling = Resampling(num_draws=section.num_bootstrap, confidence=section.confidence, seed=section.seed)
    found = compare(Trail.open(create=False), older, newer, resampling=resampling)
    if as_json:
        _print_json(found.to_dict())
        return
    from cluster.commands.lineage_tables import print_diff

    print_diff(found)


def check(
    rebuild: Annotated[bool, typer.Option(help="Make the index anew first.")] = False,
) -> None:
    """Compare the lineage index with one made from the log this moment; exit 1 when they differ."""
    from attribution.lineage_index import LineageIndex
    from configs.env import home

    index = LineageIndex.open(home())
    if rebuild:
        typer.echo(f"index made anew from {index.rebuild()} records")
    found = index.check()
    for problem in found:
        typer.secho(problem, fg=typer.colors.RED, err=True)
    if found:
        typer.echo("`trailmark lineage check --rebuild` makes the index anew")
        raise typer.Exit(1)
    typer.secho(f"{index.path} shows what the log says", fg=typer.colors.GREEN)


def _queries() -> "LineageQueries":
    """The index is asked without opening the trail, which reads the whole log."""
    from attribution.lineage_index import LineageIndex
    from attribution.lineage_queries import LineageQueries
    from attribution.trail import Trail
    from configs.env import home

    return LineageQueries(LineageIndex.open(home()), open_trail=lambda: Trail.open(create=False))


def _show_answer(answer: Any, as_json: bool) -> None:
    if as_json:
        _print_json(answer.to_dict())
        return
    from cluster.commands.lineage_tables import print_answer

    print_answer(answer)


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
