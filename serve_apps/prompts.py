"""Registered prompts in requests: `name@version` to a filled-in template, the system message of the conversation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attribution.prompt_template import TemplateError, fill_in
from attribution.registry import RegistryError
from attribution.store import StoreError
from serve_apps.errors import ApiError, Problem, invalid

if TYPE_CHECKING:
    from attribution.trail import Trail
    from serve_apps.openai import PromptReference


@dataclass(frozen=True)
class FilledPrompt:
    """A template filled in; `reference` is the `name@version` that the receipt names."""

    reference: str
    text: str


def filled_prompt(trail: "Trail", asked: "PromptReference") -> FilledPrompt:
    """Return the registered prompt that a request names, its variables filled in. ApiError when that cannot be."""
    reference = asked.id if asked.version is None else f"{asked.id}@{asked.version}"
    try:
        found = trail.registry.resolve(reference, kind="prompt")
        template = trail.store.get_blob(found.digest).decode()
        return FilledPrompt(found.reference, fill_in(template, asked.variables or {}))
    except RegistryError as error:
        raise ApiError(Problem(404, f"{error}.", code="prompt_not_found", param="prompt")) from None
    except StoreError:
        message = f"The text of prompt `{reference}` was erased or lost; use another version."
        raise ApiError(Problem(410, message, code="prompt_gone", param="prompt")) from None
    except TemplateError as error:
        raise invalid("prompt.variables", str(error)) from None
