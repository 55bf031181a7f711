"""Prompt records as versions in MLflow's prompt registry."""

from typing import TYPE_CHECKING

from attribution.bodies import PromptBody
from attribution.mlflow_context import ViewContext
from attribution.mlflow_server import TAG_LEAF, create_once
from attribution.trail import Entry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import PromptVersion

ALIAS = "current"
TAG_TEXT, TAG_EXPERIMENTS = "mlflow.prompt.text", "_mlflow_experiment_ids"  # MLflow keeps a prompt's text in a tag


def write_prompt(context: ViewContext, entry: Entry) -> None:
    """A new version of the prompt, with the alias `current`."""
    assert entry.record is not None and isinstance(entry.record.body, PromptBody)
    name, client = prompt_name(entry.record.body.name), context.server.client
    known = context.cursor.get(entry.leaf_hash, "prompt")
    version = _find_version(context, name, entry.leaf_hash) if known is None else known.rpartition("/")[2]
    if version is None:
        tags = {TAG_EXPERIMENTS: f",{context.server.experiment_id},"}
        create_once(lambda: client.create_prompt(name, tags=tags))
        description = f"By {context.signer_name(entry)}, log entry {entry.index}."
        text, tags = template_of(context, entry), prompt_tags(context, entry)
        version = str(client.create_prompt_version(name, text, description=description, tags=tags).version)
    context.cursor.put(entry.leaf_hash, "prompt", f"{name}/{version}")
    client.set_prompt_alias(name, ALIAS, int(version))


def prompt_name(recorded: str) -> str:
    """Return the registered name: prompts share one name space with models, so a prompt's always ends in `.prompt`."""
    return f"{recorded.replace('/', '.')}.prompt"


def prompt_tags(context: ViewContext, entry: Entry) -> dict[str, str]:
    """Return the tags that tie a prompt version to its record."""
    assert entry.record is not None and isinstance(entry.record.body, PromptBody)
    return context.tags(entry, digest=entry.record.body.template)


def template_of(context: ViewContext, entry: Entry) -> str:
    """Return the prompt's text; an erased one says so."""
    assert entry.record is not None and isinstance(entry.record.body, PromptBody)
    store, digest = context.trail.store, entry.record.body.template
    text = store.get_blob(digest).decode("utf-8", errors="replace") if store.has(digest) else ""
    return text or "(the text of this prompt is not in the store)"  # MLflow refuses an empty one


def versions_of(context: ViewContext, name: str) -> "list[PromptVersion]":
    """Return every version of a registered prompt; none when the name is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return list(context.server.client.search_prompt_versions(name, max_results=1000))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise


def delete_version(context: ViewContext, leaf: str) -> None:
    """Delete the version that a prompt record left, wherever it is; its text goes with it."""
    versions = (
        item
        for prompt in registered(context)
        for item in versions_of(context, prompt)
        if item.tags.get(TAG_LEAF) == leaf
    )
    for version in versions:
        context.server.client.delete_prompt_version(version.name, str(version.version))


def registered(context: ViewContext) -> list[str]:
    """Return the names of the prompts that this view registered."""
    experiment = context.server.experiment_id
    found = context.server.client.search_prompts(f'experiment_id = "{experiment}"', max_results=1000)
    return [prompt.name for prompt in found]


def _find_version(context: ViewContext, name: str, leaf: str) -> str | None:
    return next((str(item.version) for item in versions_of(context, name) if item.tags.get(TAG_LEAF) == leaf), None)
