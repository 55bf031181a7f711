"""A prompt template enters the record under its contributor's key, and its next version is published at once."""

from typing import TYPE_CHECKING

from attribution.prompt_template import TemplateError, check_template
from pipelines.publish import publish, require_name

if TYPE_CHECKING:
    from attribution.trail import Entry, Trail


def register_prompt(trail: "Trail", name: str, template: str, *, contributor: str) -> "tuple[Entry, Entry]":
    """Record a template, signed by its contributor, publish it, and return both entries.

    Raises:
        PublishError: a name that cannot be published.
        TemplateError: what `check_template` refuses, or nobody of that name.
    """
    from attribution.bodies import PromptBody
    from attribution.records import Artefact, Party
    from attribution.trust_file import LOG_KEY, OPERATOR

    require_name(name)
    check_template(template)
    people = sorted(set(trail.keys.list()) - {OPERATOR, LOG_KEY})
    if contributor not in people:
        known = ", ".join(people) or "none yet; `trailmark contributor add NAME` makes one"
        raise TemplateError(f"contributor {contributor!r}: has no key here; there are: {known}")
    key, digest = trail.keys.get(contributor), trail.store.put_blob(template.encode())
    entry = trail.record(
        "prompt",
        PromptBody(name, digest),
        outputs=[Artefact("prompt", name, digest)],
        contributors=[Party(key.key_id, "contributor")],
        signer=key,
    )
    return entry, publish(trail, name, digest, "prompt")
