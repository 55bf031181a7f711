"""The program at toy size, and that it would notice a verifier that lets a bit through."""

import json

import pytest

from benchmarks import bitflip
from benchmarks.bitflip import Target, measure


def test_nothing_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert bitflip.main(["--max-bits", "60", "--check"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    figures, unproven = told["figures"], told["unproven"]
    assert [figure["name"] for figure in figures] == [
        "receipt file",
        "ancestry",
        "receipt bundle",
        "record proof",
        "tlog-proof",
        "leaf",
        "checkpoint and cosignatures",
        "trust file: keys and policy",
        "tile",
        "entry bundle",
        "trust.json of `up`",
        "trust.json, keys changed",
        "trust.json, digest demanded",
        "no quorum: witnesses told",
    ]
    assert {figure["num_bits"] for figure in figures[:8]} == {60}
    assert figures[2]["num_base64"] > 20, "unused bits of base64 are tried as well"
    assert sum(figure["num_passed"] + figure["num_crashed"] for figure in figures) == 0
    assert len(unproven) == 3 and sum(figure["num_crashed"] for figure in unproven) == 0


def test_a_careless_verifier_is_noticed() -> None:
    def careless(data: bytes) -> None:
        if data[0] != 0x41:
            raise bitflip.NoteError("changed")
        if data[1] == 0x40:
            raise KeyError("fell over")

    figure = measure(Target("careless", b"AB==", careless), max_bits=None)
    assert (figure.num_bits, figure.num_passed, figure.num_crashed, figure.num_base64) == (32, 23, 1, 0)
    figure = measure(Target("careless", b"AAAB==", careless), max_bits=None)
    assert (figure.num_base64, figure.is_good) == (15, False)
