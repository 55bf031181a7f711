"""Licence ids are SPDX's, spelled as SPDX spells them."""

import pytest

from attribution.licences import KNOWN_LICENCES, LicenceError, canonical_licence


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("cc-by-4.0", "CC-BY-4.0"),
        (" mit ", "MIT"),
        ("apache-2.0 or mit", "Apache-2.0 OR MIT"),
        ("LicenseRef-Acme.1", "LicenseRef-Acme.1"),
    ],
)
def test_known_ids_get_their_spelling(given: str, canonical: str) -> None:
    assert canonical_licence(given) == canonical


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("CC-BY", "CC-BY-4.0"), ("Apache2", "Apache-2.0"), ("MIT OR GPL3", "GPL-3.0"), ("CC0", "CC0-1.0")],
)
def test_unknown_id_is_refused_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(LicenceError, match=f"did you mean '{nearest}"):
        canonical_licence(given)


@pytest.mark.parametrize("given", ["", "free", "LicenseRef-", "MIT OR", "LicenseRef-a b"])
def test_what_is_no_licence_is_refused(given: str) -> None:
    with pytest.raises(LicenceError, match="not a known SPDX id"):
        canonical_licence(given)


def test_list_is_sorted_and_without_repeats() -> None:
    assert list(KNOWN_LICENCES) == sorted(set(KNOWN_LICENCES))
