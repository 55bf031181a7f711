"""`trailmark ask who|improved|dataset|adapter|value`: the five questions, as tables, JSON or a page."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attribution.answers import Answer
    from attribution.trail import Trail
    from configs.schema import Settings

PANEL = "Questions"

HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write the answer as one page that loads nothing.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="NAME, NAME@VERSION or digest; all by default.")]
ConfigOption = Annotated[str | None, typer.Option("--config", help="A YAML file or a preset (local, h200, ...).")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(no_args_is_help=True, help="Who and what made an answer, a gain, a period's value.")
    group.command()(who)
    group.command()(rows)
    group.command()(improved)
    group.command()(dataset)
    group.command()(adapter)
    group.command()(value)
    app.add_typer(group, name="ask", rich_help_panel=PANEL)


def who(
    receipt: Annotated[str, typer.Argument(help="A receipt id, or its beginning; as JSON from the API: `trailmark`.")],
    as_json: JsonOption = False,
    examples: Annotated[
        int | None,
        typer.Option(min=1, help="Training rows listed, with their ids; attribution.top_examples by default."),
    ] = None,
    record: Annotated[bool, typer.Option(help="Append an influence record with every example's score.")] = True,
    html: HtmlOption = None,
    config: ConfigOption = None,
) -> None:
    """Who made this answer: base or adapter, which contributors, which rows; with intervals."""
    from attribution.questions import ask_who
    from attribution.trail import Trail
    from configs.schema import load_settings

    settings = load_settings(config)
    trail = Trail.open(create=False)
    started_s = time.process_time()
    with _waiting("explaining", quiet=as_json):
        answer = ask_who(trail, receipt, explain=_explainer(trail, settings, record, examples))
    _show(answer, as_json, html, cpu_s=time.process_time() - started_s)


def rows(
    queries: Annotated[str, typer.Argument(metavar="SUITE", help="A suite file or a refined dataset.")],
    adapter: Annotated[str, typer.Option("--adapter", help="NAME, NAME@VERSION or digest.")],
    examples: Annotated[int, typer.Option(min=1, help="Training rows listed.")] = 20,
    as_json: JsonOption = False,
    config: ConfigOption = None,
) -> None:
    """Which training rows a whole query set's answers rest on: exact best over the adapter's gradient store."""
    from attribution.influence.set_rows import rows_behind
    from attribution.trail import Trail
    from configs.schema import load_settings
    from pipelines.audit.driver import ask_of_suite

    settings = load_settings(config)
    trail = Trail.open(create=False)
    with _waiting("scoring", quiet=as_json):
        asked = ask_of_suite(trail, queries, adapter=adapter)
        found = rows_behind(
            trail,
            asked,
            num_rows=examples,
            resampling=_resampling(settings),
            normalise=settings.attribution.normalise,
        )
    if as_json:
        import json

        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return
    from cluster.commands.ask_tables import print_set_rows

    print_set_rows(found)


def improved(
    as_json: JsonOption = False, adapter: AdapterOption = None, html: HtmlOption = None, config: ConfigOption = None
) -> None:
    """What improved the model: adapters against their base, versions against the one before."""
    from attribution.questions import ask_improved

    _ask(lambda trail, settings: ask_improved(trail, adapter, resampling=_resampling(settings)), as_json, html, config)


def dataset(
    as_json: JsonOption = False, adapter: AdapterOption = None, html: HtmlOption = None, config: ConfigOption = None
) -> None:
    """Which dataset mattered: rows kept of each contribution, and its influence over explained answers."""
    from attribution.questions import ask_dataset

    _ask(lambda trail, settings: ask_dataset(trail, adapter, resampling=_resampling(settings)), as_json, html, config)


def adapter(
    as_json: JsonOption = False, adapter: AdapterOption = None, html: HtmlOption = None, config: ConfigOption = None
) -> None:
    """Which adapter changed performance: every benchmark with its interval."""
    from attribution.questions import ask_adapter

    _ask(lambda trail, settings: ask_adapter(trail, adapter, resampling=_resampling(settings)), as_json, html, config)


def value(as_json: JsonOption = False, html: HtmlOption = None, config: ConfigOption = None) -> None:
    """What part created value: completions and tokens of each model, beside what it was measured to change."""
    from attribution.questions import ask_value

    _ask(lambda trail, settings: ask_value(trail, resampling=_resampling(settings)), as_json, html, config)


def _ask(question: "Callable[[Trail, Settings], Answer]", as_json: bool, html: Path | None, config: str | None) -> None:
    from attribution.trail import Trail
    from configs.schema import load_settings

    settings = load_settings(config)
    started_s = time.process_time()
    answer = question(Trail.open(create=False), settings)
    _show(answer, as_json, html, cpu_s=time.process_time() - started_s)


def _resampling(settings: "Settings") -> Any:
    from attribution.questions import Resampling

    section = settings.attribution
    return Resampling(num_draws=section.num_bootstrap, confidence=section.confidence, seed=section.seed)


def _explainer(
    trail: "Trail", settings: "Settings", record: bool, num_examples: int | None
) -> Callable[[str], dict[str, Any]]:
    """Return a way to explain a receipt: the cluster's scorer when one is up (its model is warm), else this process."""
    if record and _cluster_is_up(trail.home):
        return lambda receipt: _explain_on_cluster(trail.home, receipt, num_examples)

    def locally(receipt: str) -> dict[str, Any]:
        from attribution.influence.who import ExplainSettings, explain

        how = ExplainSettings.of(settings.attribution)
        return explain(trail, receipt, how, record=record, num_examples=num_examples).to_dict()

    return locally


def _cluster_is_up(home: Path) -> bool:
    from cluster.state import load_state

    state = load_state(home)
    return state.is_alive("ray") and bool(state.api_url)


def _explain_on_cluster(home: Path, receipt: str, num_examples: int | None) -> dict[str, Any]:
    from attribution.actors import explain_remotely
    from cluster.session import connect

    with connect(home):
        return explain_remotely(receipt, num_examples)


def _waiting(text: str, *, quiet: bool) -> Any:
    """A spinner on stderr while a model is read and scored."""
    from contextlib import nullcontext

    from rich.console import Console

    console = Console(stderr=True)
    return console.status(text) if console.is_terminal and not quiet else nullcontext()


def _show(answer: "Answer", as_json: bool, html: Path | None, *, cpu_s: float) -> None:
    """Print the answer, and write its page; exit 1 when something damaged kept it from being whole."""
    if html is not None:
        from attribution.pages.ask import answer_html

        html.write_text(answer_html(answer), encoding="utf-8")
    if as_json:
        import json

        typer.echo(json.dumps(answer.to_dict(), indent=2, ensure_ascii=False))
    else:
        from cluster.commands.ask_tables import print_answer

        print_answer(answer, cpu_s=cpu_s)
    if html is not None and not as_json:
        typer.echo(f"page written to {html}")
    if answer.problem:
        raise typer.Exit(1)
