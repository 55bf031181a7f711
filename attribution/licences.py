"""Licence ids a contributor may give: SPDX ids, expressions of them, and LicenseRef- for terms of one's own.

Source: the SPDX licence list (https://spdx.org/licenses/), of which this is the part that data and text
are shared under.
"""

import re
from difflib import get_close_matches

from configs.errors import UserError

KNOWN_LICENCES = (
    "0BSD",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-2.0",
    "Artistic-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "C-UDA-1.0",
    "CC-BY-1.0",
    "CC-BY-2.0",
    "CC-BY-2.5",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-NC-2.0",
    "CC-BY-NC-3.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-ND-4.0",
    "CC-BY-NC-SA-3.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0",
    "CC-BY-SA-2.0",
    "CC-BY-SA-2.5",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-PDDC",
    "CC0-1.0",
    "CDLA-Permissive-1.0",
    "CDLA-Permissive-2.0",
    "CDLA-Sharing-1.0",
    "ECL-2.0",
    "EPL-2.0",
    "EUPL-1.2",
    "GFDL-1.3-only",
    "GFDL-1.3-or-later",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "ISC",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "MIT",
    "MIT-0",
    "MPL-2.0",
    "O-UDA-1.0",
    "ODC-By-1.0",
    "ODbL-1.0",
    "OGL-UK-3.0",
    "PDDL-1.0",
    "PSF-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
)
LICENCE_REF = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")
OPERATOR = re.compile(r" (AND|OR) ", re.IGNORECASE)


class LicenceError(UserError):
    """A licence id that is not known."""


def canonical_licence(text: str) -> str:
    """Return the licence as SPDX spells it: one id, or ids joined by AND or OR (no brackets).

    Raises:
        LicenceError: an id that is not on the list, with the nearest one that is.
    """
    pieces = OPERATOR.split(text.strip())
    # re.split with one group alternates id, operator, id, ...
    pieces[::2] = [_canonical_id(piece.strip()) for piece in pieces[::2]]
    return " ".join(piece.upper() if i % 2 else piece for i, piece in enumerate(pieces))


def _canonical_id(text: str) -> str:
    if LICENCE_REF.fullmatch(text):
        return text
    spelling = {known.lower(): known for known in KNOWN_LICENCES}
    if text.lower() in spelling:
        return spelling[text.lower()]
    near = get_close_matches(text.lower(), list(spelling), n=1, cutoff=0.5)
    hint = f"did you mean {spelling[near[0]]!r}?" if near else "for example CC-BY-4.0, CC0-1.0, MIT or Apache-2.0"
    raise LicenceError(f"licence {text!r}: not a known SPDX id; {hint} For terms of your own write LicenseRef-NAME")
