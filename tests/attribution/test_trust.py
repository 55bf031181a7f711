"""The trust file: what can be seen to be wrong with it is refused, and its digest can be demanded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attribution.log.policy import LOCAL_MARK
from attribution.log.proved import VerifyError
from attribution.log.trust import Trust, trust_bytes
from attribution.log.verify import verify_bytes
from benchmarks.bitflip import Kept, kept
from cluster import cli

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return kept(tmp_path_factory.mktemp("home"))


def refusal(data: bytes, folder: Path, proof: bytes | None = None) -> str:
    """The check that a trust file fails, alone or with a proof; "" when it passes."""
    (folder / "trust.json").write_bytes(data)
    try:
        trust = Trust.load(folder / "trust.json")
        if proof is not None:
            verify_bytes(proof, trust=trust)
    except VerifyError as error:
        return error.check
    return ""


def changed(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    value = json.loads(data)
    change(value)
    return trust_bytes(value)


def other_digit(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


def of_operator(value: dict[str, Any], name: str) -> dict[str, Any]:
    """The operator's entry among `former`, or the one of its key among `revoked`."""
    former = next(entry for entry in value["former"] if entry["role"] == "operator")
    return former if name == "former" else next(e for e in value["revoked"] if e["key_id"] == former["key_id"])


def _reason(value: dict[str, Any]) -> None:
    of_operator(value, "revoked")["reason"] += "!"


def _time(value: dict[str, Any]) -> None:
    of_operator(value, "revoked")["from_us"] ^= 1


def _until(value: dict[str, Any]) -> None:
    of_operator(value, "former")["until_us"] ^= 1


def _last_size(value: dict[str, Any]) -> None:
    next(entry for entry in value["former"] if entry["role"] == "log")["last_size"] += 1


CHANGES = (_reason, _time, _until, _last_size)


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_file_says_of_a_key_must_be_what_the_log_says(
    found: Kept, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """By the signed record in the file; in files of old form, and of a size, by the notices of the proof."""
    for data in (found.changed, found.without_records):
        assert refusal(data, tmp_path, found.newer) == refusal(data, tmp_path, found.older) == ""
    alone = refusal(changed(found.changed, change), tmp_path)
    assert alone == ("" if change is _last_size else "keys")
    assert refusal(changed(found.without_records, change), tmp_path, found.newer) in ("trust file", "rotated key")


def test_every_revoked_key_and_every_field_is_checked(found: Kept, tmp_path: Path) -> None:
    num_revoked = len(json.loads(found.changed)["revoked"])
    assert num_revoked == 2
    for number in range(num_revoked):

        def take_back(value: dict[str, Any], number: int = number) -> None:
            value["revoked"][number]["key_id"] = other_digit(value["revoked"][number]["key_id"])

        assert refusal(changed(found.changed, take_back), tmp_path) == "keys"


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["revoked"][0].update(key_id="ab"),
        lambda value: value["revoked"][0].update(from_us="now"),
        lambda value: value["revoked"][0].update(since=1),
        lambda value: value["former"][0].update(role="operatoq"),
        lambda value: value["revoked"][0].update(record=value["former"][0]["record"]),
        lambda value: value["revoked"][0]["record"].update(payload="AAAA"),
        lambda value: value["keys"].clear(),
    ],
)
def test_entries_of_another_shape_or_with_another_record(
    found: Kept, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    assert refusal(changed(found.changed, change), tmp_path) == "keys"


def test_there_is_one_form(found: Kept, tmp_path: Path) -> None:
    for data in (found.written, found.changed, (GOLDEN / "trust.json").read_bytes()):
        assert refusal(data, tmp_path) == ""
        assert refusal(data + b"\n", tmp_path) == refusal(json.dumps(json.loads(data)).encode(), tmp_path) == "keys"
    umlaut = changed(found.without_records, lambda value: value["revoked"][0].update(reason="verlor'n \u00fcber Nacht"))
    assert refusal(umlaut, tmp_path) == ""
    assert refusal(umlaut.replace(b"\\u00fc", b"\\u00Fc"), tmp_path) == "keys"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("The local", "the local"),
        ("witness witness-1 ", "witness vitness-1 "),
        ("witness witness-1 ", "witness  witness-1 "),
        ("quorum none\n", "quorum none\n# mine\n"),
    ],
)
def test_nothing_stands_in_its_policy_unchecked(found: Kept, tmp_path: Path, before: str, after: str) -> None:
    policy = json.loads(found.written)["policy"]
    assert policy.startswith(LOCAL_MARK) and before in policy
    data = changed(found.written, lambda value: value.update(policy=policy.replace(before, after, 1)))
    assert refusal(data, tmp_path) == "policy"
    (tmp_path / "policy").write_text(policy.replace(before, after, 1))
    (tmp_path / "trust.json").write_bytes(found.written)
    assert Trust.load(tmp_path / "trust.json").with_policy_of(tmp_path / "policy").policy, "one's own file is free"


def test_of_two_revocations_of_a_key_the_one_that_reaches_further_back_counts(found: Kept, tmp_path: Path) -> None:
    def again(value: dict[str, Any]) -> None:
        value["revoked"].insert(0, {**value["revoked"][0], "from_us": 5})

    (tmp_path / "trust.json").write_bytes(changed(found.without_records, again))
    trust = Trust.load(tmp_path / "trust.json")
    assert trust.history().revoked[trust.revocations[0][0]].from_us == 5


def test_the_digest_is_told_and_can_be_demanded(found: Kept, tmp_path: Path) -> None:
    (tmp_path / "trust.json").write_bytes(found.written)
    (tmp_path / "proof.json").write_bytes(found.older)
    arguments = ["verify", str(tmp_path / "proof.json"), "--keys", str(tmp_path / "trust.json"), "--json"]
    told = json.loads(CliRunner().invoke(cli.app, arguments).output)["facts"]["trust"]
    for digest in (told, told.removeprefix("sha256:")):
        assert CliRunner().invoke(cli.app, [*arguments, "--trust-digest", digest]).exit_code == 0
    refused = CliRunner().invoke(cli.app, [*arguments, "--trust-digest", "sha256:" + "0" * 64])
    assert (refused.exit_code, json.loads(refused.output)["check"]) == (1, "trust digest")
