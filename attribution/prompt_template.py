"""The text of a prompt template: `{{ name }}` is a variable that each request fills in, as in MLflow's registry."""

import re
from collections.abc import Mapping

from configs.errors import UserError

MAX_TEMPLATE_BYTES = 64 * 1024
VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


class TemplateError(UserError):
    """A template that cannot be registered, or variables that do not fill it."""


def check_template(template: str) -> None:
    """Raise TemplateError for an empty template, one over 64 kB, or braces around what is no name."""
    if not template.strip():
        raise TemplateError("template: empty; write what the model is to be told")
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise TemplateError(f"template: over {MAX_TEMPLATE_BYTES >> 10} kB; shorten it")
    rest = VARIABLE.sub("", template)
    if "{{" in rest or "}}" in rest:
        raise TemplateError("template: {{ or }} around what is no name; a variable is {{ name }}: letters, digits, _")


def variables_of(template: str) -> list[str]:
    """Return the names of a template's variables, each once, in order."""
    return list(dict.fromkeys(VARIABLE.findall(template)))


def fill_in(template: str, variables: Mapping[str, str]) -> str:
    """Return the template with its variables' values, which are taken as they are, braces and all.

    TemplateError when one is missing or strange.
    """
    wanted = variables_of(template)
    missing = [name for name in wanted if name not in variables]
    strange = sorted(set(variables) - set(wanted))
    if missing or strange:
        wrong = f"missing: {', '.join(missing)}" if missing else f"unknown: {', '.join(strange)}"
        raise TemplateError(f"{wrong}; the template's variables are {', '.join(wanted) or 'none'}")
    return VARIABLE.sub(lambda found: variables[found[1]], template)
