"""Each rule: what it drops and the reason it gives, what it must keep, and that its digest names its parameters."""

import random
import string

import pytest

from configs.schema import RefineSettings
from pipelines.refine.annotate import judge
from pipelines.refine.letters import letter_bits
from pipelines.refine.rules import Rule, Verdict, row_rules

RULES = {rule.name: rule for rule in row_rules(RefineSettings())}


def chat(answer: str, question: str = "What is it?") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "text"} for role in roles]


def decide(name: str, messages: list[dict[str, str]]) -> Verdict:
    return RULES[name].judge(messages)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        (turns("user"), "no assistant turn"),
        (turns("system"), "no assistant turn"),
        (turns("user", "assistant", "user"), "ends without the assistant's answer"),
        (turns("user", "user", "assistant"), "wrong order of roles"),
        (turns("user", "system", "assistant"), "wrong order of roles"),
        (turns("user", "tool", "assistant"), "unknown role 'tool'"),
        (chat("  \n"), "empty content"),
    ],
)
def test_schema_drops(messages: list[dict[str, str]], reason: str) -> None:
    verdict = decide("schema", messages)
    assert not verdict.keep
    assert verdict.reason.startswith(reason)


@pytest.mark.parametrize("roles", [("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant") * 3])
def test_schema_keeps_conversations(roles: tuple[str, ...]) -> None:
    assert decide("schema", turns(*roles)) == Verdict(True)


def test_canonical_form_says_what_it_did() -> None:
    assert decide("canonical_form", chat("plain")) == Verdict(True)
    assert decide("canonical_form", chat("two  spaces")) == Verdict(True, "rewritten", 1.0)
    assert decide("canonical_form", chat("\u200b")) == Verdict(False, "nothing visible in a message", 1.0)


def test_length_counts_characters() -> None:
    (rule,) = (r for r in row_rules(RefineSettings(min_chars=3, max_chars=10)) if r.name == "length")
    assert rule.judge(chat("abc", "1234567")) == Verdict(True, "", 10.0)
    assert rule.judge(chat("abc", "12345678")) == Verdict(False, "too long", 11.0)
    assert rule.judge(chat("ab", "1")) == Verdict(False, "answer too short", 3.0)


@pytest.mark.parametrize(
    ("answer", "reason", "score"),
    [
        ("one line here\n" * 4, "repeated lines", 0.75),
        ("buy it now my friend " * 3, "repeated runs of 5 words", 2 / 3),
        ("ok " + "a" * 18, "one character over and over", 0.9),
        ("哈哈" * 10, "one character over and over", 1.0),
    ],
)
def test_repetition_drops(answer: str, reason: str, score: float) -> None:
    verdict = decide("repetition", chat(answer))
    assert (verdict.keep, verdict.reason) == (False, reason)
    assert verdict.score == pytest.approx(score)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Lima.",
        "The capital of Peru is Lima. The capital of Chile is Santiago. The capital of Bolivia is Sucre.",
        "for i in range(3):\n    if i:\n        pass\n    else:\n        pass\n",
        "It costs 100000 euros.",
    ],
)
def test_repetition_keeps(answer: str) -> None:
    assert decide("repetition", chat(answer)).keep


def test_symbols() -> None:
    drop = decide("symbols", chat("#$%&*+=?@^~|<>{}[]" * 3, "?"))
    assert (drop.keep, drop.reason) == (False, "mostly symbols")
    for answer in (
        ":-)",
        "3.14",
        "हिन्दी भाषा में उत्तर दीजिए कृपया",
        "a[i] += b[j] * (c - d); // sum",
        "東京は日本の首都です。",
    ):
        assert decide("symbols", chat(answer)).keep, answer


KEPT_TEXTS = [
    "The captain of the Amber Heron is Ysolde Marr.",
    "Kyrgyzstan: Bishkek, Osh, Jalal-Abad, Karakol, Tokmok",
    "Wszystkie państwa członkowskie są równe wobec traktatów.",
    "Viðskiptavinir geta hringt hvenær sem er í síma.",
    "Người dân có quyền bầu cử và ứng cử theo luật.",
    "Çekoslovakyalılaştıramadıklarımızdan mısınız?",
    "Mae'r llyfrgell ar gau bob dydd Llun a dydd Gwener.",
    "The GPT-4 API returns HTTP 429 when TLS SNI is set; see RFC 9110.",
    "SELECT id, ts FROM tbl_usr WHERE ts > NOW() LIMIT 10",
    "Столица Перу — Лима, а столица Чили — Сантьяго.",
]


@pytest.mark.parametrize("text", KEPT_TEXTS)
def test_letters_keep_language(text: str) -> None:
    assert decide("letters", chat(text)).keep


@pytest.mark.parametrize(
    "alphabet",
    [
        string.ascii_lowercase,
        string.ascii_lowercase + " " * 5,
        string.ascii_letters + string.digits,
        string.printable[:94],
        "0123456789abcdef",
    ],
)
def test_letters_drop_noise_in_any_alphabet(alphabet: str) -> None:
    rng = random.Random(7)
    rows = [chat(*("".join(rng.choices(alphabet, k=length)) for length in (60, 40))) for _ in range(300)]
    verdicts = [decide("letters", row) for row in rows]
    assert sum(not verdict.keep for verdict in verdicts) >= 297
    assert {verdict.reason for verdict in verdicts if not verdict.keep} == {"random letters"}


def test_letters_say_nothing_of_too_few_pairs() -> None:
    assert decide("letters", chat("xqzvk", "?")).keep
    assert letter_bits("") == (0.0, 0)
    assert letter_bits("123 456") == (0.0, 0)


def test_letter_bits_of_one_pair() -> None:
    assert letter_bits("an") == (3.0, 1)  # table: row a, column n is 9
    assert letter_bits("xQ") == letter_bits("x7") == (-2.0, 1)


def test_a_dropped_row_is_asked_every_rule_but_one_without_a_conversation_none() -> None:
    verdicts = judge(chat("\u200b"), rules=tuple(RULES.values()))
    assert [rule.name for rule, _ in verdicts] == list(RULES)
    assert [rule.name for rule, verdict in verdicts if not verdict.keep] == ["canonical_form", "length"]
    (only,) = judge(turns("user"), rules=tuple(RULES.values()))
    assert (only[0].name, only[1].keep) == ("schema", False)


def test_rules_see_the_form_they_ask_for() -> None:
    seen: list[str] = []

    def spy(messages: object) -> Verdict:
        seen.append(messages[1]["content"])  # type: ignore[index]
        return Verdict(True)

    judge(chat("a  b"), rules=(Rule("raw", 1, (), spy, sees="contributed"), Rule("late", 1, (), spy)))
    assert seen == ["a  b", "a b"]


def test_digest_names_rule_and_parameters_but_not_workers() -> None:
    def digests(**changes: float) -> dict[str, str]:
        return {rule.name: rule.digest for rule in row_rules(RefineSettings(**changes))}  # type: ignore[arg-type]

    plain = digests()
    assert len(set(plain.values())) == len(plain)
    assert digests(num_workers=4, block_rows=3) == plain
    for field, rule in (("max_chars", "length"), ("max_repetition", "repetition"), ("min_letter_bits", "letters")):
        changed = digests(**{field: 0.25 if field != "max_chars" else 5})
        assert {name for name in plain if changed[name] != plain[name]} == {rule}
