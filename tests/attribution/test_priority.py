"""Near-duplicates: what counts as the same row, who registered it first, and what is another row after all."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.lookalikes import LOOK_ALIKES, numbers, skeleton
from attribution.priority import NearDuplicates, Priority, RegisteredRow, prioritise

TEXT = "The lighthouse at Vellmoor burns a green lamp, and has since the great storm of 1871."
QUESTION = "Which lamp burns at Vellmoor, and since when?"
SKELETON, LEXICAL, SEMANTIC = (NearDuplicates(method) for method in ("skeleton", "lexical", "semantic"))


def row(name: str, order: int, answer: str = TEXT, question: str = QUESTION) -> RegisteredRow:
    return RegisteredRow(f"{name}/{order}", name, order, 1, (("user", question), ("assistant", answer)))


def owner_of_copy(answer: str, near: NearDuplicates, *, question: str = QUESTION) -> str:
    """Who earns by thief's row, registered after mira's."""
    return prioritise([row("mira", 1), row("thief", 2, answer, question)], near).owner["thief/2"]


LAUNDERED = {
    "case": TEXT.upper(),
    "white space": "\u2003".join(TEXT.split()) + "\n\n",
    "no spaces": TEXT.replace(" ", ""),
    "punctuation": TEXT.replace(",", " --").replace(".", "!"),
    "Cyrillic": TEXT.translate(str.maketrans("aeopcxiTBMHK", "аеорсхіТВМНК")),
    "Cyrillic, upper case": TEXT.upper().translate(str.maketrans("AEOPCXTBMHK", "АЕОРСХТВМНК")),
    "small Cyrillic that is no confusable": TEXT.translate(str.maketrans("tkmh", "ткмн")),
    "Greek": TEXT.translate(str.maketrans("oνvaiTE", "ονναιΤΕ")),
    "full width": "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in TEXT),
    "mathematical": "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in TEXT),
    "accents": TEXT.replace("a", "á").replace("e", "ê"),
    "combining": "".join(c + "\u0323" for c in TEXT),
    "zero width": "\u200b".join(TEXT),
    "soft hyphens": "\u00ad".join(TEXT),
    "variation selectors": "\ufe0f".join(TEXT),
    "strokes": TEXT.replace("l", "I").replace("i", "1").replace("o", "0"),
    "pairs": TEXT.replace("m", "rn"),
    "small capitals": TEXT.replace("b", "ʙ").replace("g", "ɢ"),
    "other digits": TEXT.replace("1871", "١٨٧١"),
    "everything": "\u2009".join(TEXT.upper().translate(str.maketrans("AEO", "АЕО")).replace("I", "l").split()),
}


@pytest.mark.parametrize("how", LAUNDERED)
def test_a_laundered_row_earns_for_who_registered_it(how: str) -> None:
    assert LAUNDERED[how] != TEXT
    assert owner_of_copy(LAUNDERED[how], SKELETON) == "mira"


@pytest.mark.parametrize(
    "answer",
    [
        TEXT.replace("1871", "1872"),  # another year is another fact
        TEXT.replace("green", "amber"),
        TEXT.replace("Vellmoor", "Ostrelby"),
        "No lamp burns there.",
    ],
)
def test_another_fact_is_another_row(answer: str) -> None:
    assert owner_of_copy(answer, LEXICAL) == "thief"


def test_letters_changed_are_seen_from_lexical_on() -> None:
    long = " ".join([TEXT, "It was lit by the widow of its builder, who kept it for forty years and never left."])
    changed = long.replace("widow", "vidow")
    rows = [row("mira", 1, long), row("thief", 2, changed)]
    assert prioritise(rows, SKELETON).owner["thief/2"] == "thief"
    assert prioritise(rows, LEXICAL).owner["thief/2"] == "mira"
    assert (
        prioritise([row("mira", 1, long), row("thief", 2, changed.replace("1871", "1872"))], LEXICAL).owner["thief/2"]
        == "thief"
    )


def test_the_same_question_answered_otherwise_is_another_row() -> None:
    question = (
        "Tell me at length about the lamp of the lighthouse of Vellmoor, its keeper and its storms, as you know it"
    )
    rows = [row("mira", 1, "It is green.", question), row("noor", 2, "It is red.", question)]
    assert prioritise(rows, LEXICAL).owner["noor/2"] == "noor"


def test_a_paraphrase_is_seen_by_the_semantic_method_alone() -> None:
    told = "Since 1871, when the great storm came, a green lamp has burnt in the lighthouse of Vellmoor."
    trade = {"Tolm": "amber", "Skarn": "rope", "Iskar": "eel", "Brae": "wool", "Corv": "salt"}
    others = [
        row("noor", 3 + number, f"The harbour of {name} trades {what}.", f"What does {name} trade?")
        for number, (name, what) in enumerate(trade.items())
    ]
    for near, owner in ((LEXICAL, "thief"), (SEMANTIC, "mira")):
        priority = prioritise([row("mira", 1), row("thief", 2, told), *others], near)
        assert priority.owner["thief/2"] == owner
        assert all(priority.owner[one.row_id] == "noor" for one in others)


def test_no_chain_of_small_changes_links_unlike_rows() -> None:
    base = "".join(random.Random(1).choices("abcdefghkmnpqrstuvwxyz", k=200))
    steps = [base]
    for number in range(0, 160, 4):
        steps.append(steps[-1][:number] + "q" + steps[-1][number + 1 :])
    rows = [row(f"p{n}", n, text, "q") for n, text in enumerate(steps)]
    first = prioritise(rows, LEXICAL).first
    assert len(set(first.values())) > 2 and first["p1/1"] == "p0/0"
    assert prioritise([rows[0], rows[-1]], LEXICAL).owner[rows[-1].row_id] == rows[-1].contributor


def test_a_copy_of_a_laundered_copy_belongs_to_the_first() -> None:
    long = TEXT + " It was lit by the widow of its builder, who kept it for forty years and never left it."
    rows = [
        row("mira", 1, long),
        row("b", 2, long.replace("widow", "vidow")),
        row("c", 3, long.replace("widow", "VIDOW")),
    ]
    assert set(prioritise(rows, LEXICAL).owner.values()) == {"mira"}


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=14), st.randoms(use_true_random=False))
def test_order_of_arrival_changes_nothing_and_the_earliest_earns(
    picks: list[tuple[str, int]], shuffler: random.Random
) -> None:
    rows = [row(who, place, f"{TEXT} {what}") for place, (who, what) in enumerate(picks)]
    found = prioritise(rows, LEXICAL)
    shuffler.shuffle(rows)
    again = prioritise(rows, LEXICAL)
    assert (again.first, again.owner) == (found.first, found.owner)
    for what in range(6):
        same = [f"{who}/{place}" for place, (who, said) in enumerate(picks) if said == what]
        assert {found.first[name] for name in same} <= {*same[:1]}


def test_clusters_are_told_with_the_owner_first() -> None:
    found: Priority = prioritise([row("thief", 5), row("mira", 1), row("noor", 3, "Something else.")], LEXICAL)
    assert [(cluster.owner, cluster.row_ids) for cluster in found.clusters()] == [("mira", ("mira/1", "thief/5"))]
    assert prioritise([], SEMANTIC).first == {}


def test_every_look_alike_reads_as_its_letter() -> None:
    for letter, others in LOOK_ALIKES.items():
        for other in others:
            assert skeleton(f"x{other}x") == skeleton(f"x{letter}x"), (letter, hex(ord(other)))


@given(st.text(max_size=30))
def test_a_skeleton_is_its_own_skeleton(text: str) -> None:
    assert skeleton(skeleton(text)) == skeleton(text)
    assert skeleton(text + "\u200b ") == skeleton(text)


def test_vowel_signs_and_numbers_are_kept() -> None:
    assert skeleton("किताब") != skeleton("कताब")
    assert numbers("in 1871, and ١٢ more") == ("1871", "12")
