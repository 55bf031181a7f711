"""tlog-policy files: the specification's example, every rule of its syntax, and who makes which quorum."""

import itertools

import pytest

from attribution.keys import SigningKey
from attribution.log.cosignature import Cosigner
from attribution.log.mldsa import MlDsaKey
from attribution.log.note import Checkpoint, sign_note
from attribution.log.policy import Policy, PolicyError
from tests.attribution.witnessed import LOG, LOG_KEY, NOW_S, note_of, tree_of

NAMES = ("X1", "X2", "X3", "Y1", "Y2", "Y3")
COSIGNERS = {
    name: Cosigner(f"witness.test/{name}", SigningKey.from_seed(name, bytes(31) + bytes([number])))
    for number, name in enumerate(NAMES, 1)
}
LINES = "".join(f"witness {name} {cosigner.key}\n" for name, cosigner in COSIGNERS.items())
EXAMPLE = (
    f"# As in the specification.\n \t# and a comment after blanks\n\nlog\t{LOG_KEY}   https://log.test/ \n{LINES}"
    "group X-witnesses 2 X1 X2 X3\ngroup Y-witnesses any Y1 Y2 Y3\n"
    "group X-and-Y all X-witnesses Y-witnesses\nquorum X-and-Y\n"
)
KEY = {name: str(cosigner.key) for name, cosigner in COSIGNERS.items()}


def parse(text: str) -> Policy:
    return Policy.parse(text.encode("utf-8", "surrogateescape"))


def test_every_subset_of_the_examples_witnesses() -> None:
    policy = parse(EXAMPLE)
    for count in range(7):
        for names in itertools.combinations(NAMES, count):
            by_letter = {letter: sum(name[0] == letter for name in names) for letter in "XY"}
            assert policy.is_met_by(names) == (by_letter["X"] >= 2 and by_letter["Y"] >= 1), names
    assert not policy.is_met_by(["X-witnesses", "Y-witnesses", "X-and-Y"]), "names of groups are not cosignatures"
    assert policy.describe() == "2 of (2 of X1, X2, X3), (1 of Y1, Y2, Y3)"
    assert policy.logs[0].url == "https://log.test/"


def test_text_round_trip() -> None:
    policy = parse(EXAMPLE)
    assert parse(policy.text()) == policy


def test_a_checkpoint_under_a_policy() -> None:
    policy, note = parse(EXAMPLE), note_of(tree_of(3))
    enough = note + "".join(COSIGNERS[name].cosign(note, NOW_S) for name in ("X1", "X3", "Y2"))
    checkpoint, cosigned = policy.open(enough)
    assert (checkpoint.size, set(cosigned.times)) == (3, {"X1", "X3", "Y2"})
    with pytest.raises(PolicyError, match=r"2 of 6 cosigned; .* \(X1, X3 did\)"):
        policy.open(note + "".join(COSIGNERS[name].cosign(note, NOW_S) for name in ("X1", "X3")))
    twice = note + "".join(COSIGNERS["X1"].cosign(note, NOW_S + second) for second in range(3))
    assert policy.cosigned(twice).times.keys() == {"X1"}, "one witness thrice is one witness"
    elsewhere = sign_note(Checkpoint("other.test", 3, bytes(32)).text(), name=LOG_KEY.name, signer=LOG)
    with pytest.raises(PolicyError, match=r"origin 'other\.test' is none of the policy's logs"):
        policy.open(elsewhere)


def test_logs_of_both_kinds() -> None:
    ml_dsa = Cosigner(LOG_KEY.name, MlDsaKey.from_seed(bytes(32)))
    note = note_of(tree_of(3))
    both = note + ml_dsa.cosign(note, NOW_S)
    for key in (LOG_KEY, ml_dsa.key):
        assert parse(f"log {key}\nquorum none\n").open(both)[0].size == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must end in a newline"),
        ("quorum none", "must end in a newline"),
        ("quorum none\r\n", "control"),
        ("# \x7f\nquorum none\n", "control"),
        ("# nothing\n", "no quorum line"),
        ("quorum none\nquorum none\n", "line 2: a second quorum"),
        ("quorum X1\n", "line 1: 'X1': not defined"),
        (f"quorum X1\nwitness X1 {KEY['X1']}\n", "line 1: 'X1': not defined"),
        (f"witness none {KEY['X1']}\nquorum none\n", "'none': taken"),
        (f"witness a {KEY['X1']}\nwitness a {KEY['X2']}\nquorum a\n", "line 2: 'a': taken"),
        (f"witness a {KEY['X1']}\nwitness b {KEY['X1']}\nquorum a\n", "stands on an earlier line"),
        (f"log {LOG_KEY}\nlog {LOG_KEY}\nquorum none\n", "stands on an earlier line"),
        (f"log {KEY['X1']}\nquorum none\n", "0x04 is a witness's"),
        (f"witness a {LOG_KEY}\nquorum none\n", "0x01"),
        (f"witness a {KEY['X1']} u v\nquorum a\n", "expected"),
        (f"witness a\N{NO-BREAK SPACE}{KEY['X1']}\nquorum none\n", "expected"),
        (f"witness a {KEY['X1']}\ngroup g 1\nquorum a\n", "expected"),
        (f"witness a {KEY['X1']}\ngroup g 0 a\nquorum a\n", "asks for 0 of 1"),
        (f"witness a {KEY['X1']}\ngroup g 2 a\nquorum a\n", "asks for 2 of 1"),
        (f"witness a {KEY['X1']}\ngroup g 01 a\nquorum a\n", "neither `all`, `any` nor a number"),
        (f"witness a {KEY['X1']}\ngroup g any a a\nquorum g\n", "a member already"),
        (f"witness a {KEY['X1']}\ngroup g any a\ngroup h any a\nquorum g\n", "a member already"),
        (f"witness a {KEY['X1']}\ngroup g any g\nquorum g\n", "not defined"),
        (f"witness a {KEY['X1']}\ngroup g any none\nquorum g\n", "'none': not defined"),
        ("Quorum none\n", "'Quorum'"),
    ],
)
def test_wrong_policies_name_the_line(text: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        parse(text)


def test_names_are_octets() -> None:
    """K and the Kelvin sign are two names, and bytes that are no UTF-8 are a name too."""
    text = f"witness K {KEY['X1']}\nwitness \N{KELVIN SIGN} {KEY['X2']}\nwitness \udcff {KEY['X3']}\nquorum K\n"
    policy = parse(text)
    assert not policy.is_met_by(["\N{KELVIN SIGN}", "\udcff"])
    assert policy.is_met_by(["K"])
    assert parse(policy.text()) == policy


def test_thirty_two_of_each() -> None:
    keys = [SigningKey.from_seed("w", bytes([1, number]) + bytes(30)) for number in range(32)]
    lines = [f"witness w{n} {Cosigner(f'w.test/{n}', key).key}\n" for n, key in enumerate(keys)]
    groups = [f"group g{n} any w{n}\n" for n in range(31)] + [f"group g 31 {' '.join(f'g{n}' for n in range(31))}\n"]
    assert len(parse("".join([*lines, *groups, "quorum g\n"])).witnesses) == 32
