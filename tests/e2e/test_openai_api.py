"""The official openai client against a live server: Ray Serve, two replicas, the log writer actor, a fresh trail."""

import json
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import jsonschema
import openai
import pytest

from attribution.receipts import find_receipt
from attribution.trail import Trail
from configs.schema import AttributionSettings, ServeSettings
from serve_apps.apikeys import ApiKeys, keys_path
from serve_apps.openai import canonical_digest, output_digest
from tests.serve_apps.published import add_base, publish
from tests.tiny_model import QUESTIONS, conversation

pytestmark = pytest.mark.ray

MAX_MODEL_LEN = 512
TIMEOUT_S = 60.0
Value = TypeVar("Value")


@dataclass(frozen=True)
class Live:
    """A server that runs, and what was published before it started."""

    trail: Trail
    url: str
    digests: dict[str, str]
    base: Path
    secret: str
    operator_secret: str

    def client(self, secret: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret or self.secret, max_retries=0, timeout=TIMEOUT_S)

    def get(self, path: str, secret: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {secret or self.secret}"}
        return httpx.get(self.url + path, headers=headers, timeout=TIMEOUT_S)

    def receipt(self, receipt_id: str) -> dict[str, Any]:
        """Ask for a receipt until it is in the log."""
        found = wait_for(lambda: self._in_log(receipt_id))
        assert found["receipt"]["id"] == receipt_id
        return found

    def _in_log(self, receipt_id: str) -> dict[str, Any] | None:
        response = self.get(f"/v1/receipts/{receipt_id}")
        assert response.status_code in (200, 202), response.text
        return response.json() if response.status_code == 200 else None


def wait_for(condition: Callable[[], Value | None]) -> Value:
    deadline = time.monotonic() + TIMEOUT_S
    while (value := condition()) is None:
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)
    return value


@pytest.fixture(scope="module")
def live(
    ray_cluster: str, tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    from attribution import actors
    from serve_apps import app

    home = tmp_path_factory.mktemp("serve") / "home"
    trail = Trail.open(home)
    base_digest = add_base(trail, tiny_base, name="tiny")
    digests = {name: publish(trail, name, folder, base_digest=base_digest) for name, folder in tiny_adapters.items()}
    keys = ApiKeys(keys_path(home))
    secret, operator_secret = keys.create("acme"), keys.create("operator", is_operator=True)
    settings = ServeSettings(
        port=free_port(),
        base="tiny",
        num_replicas=2,
        num_threads=1,
        max_num_seqs=8,
        max_model_len=MAX_MODEL_LEN,
        receipt_flush_s=0.1,
    )
    actors.start(home, AttributionSettings())
    base_path = trail.store.get_directory(base_digest)
    url = app.deploy(settings, home=home, base_path=str(base_path), base_digest=base_digest)
    server = Live(trail, url, digests, tiny_base, secret, operator_secret)
    try:
        yield server
        last = ask(server, "Hi").trailmark["receipt_id"]
    finally:
        app.stop()
        actors.stop()
    # Stopping flushed what was still open, and left nothing behind.
    assert find_receipt(trail, last) is not None
    assert list((home / "run" / "spool").iterdir()) == []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(live: Live, question: str, model: str = "tiny", **fields: Any) -> Any:
    fields = {"temperature": 0, "max_tokens": 24, **fields}
    return live.client().chat.completions.create(model=model, messages=conversation(question), **fields)  # type: ignore[call-overload]


def test_a_chat_has_a_receipt_that_verifies_offline(live: Live, tmp_path: Path) -> None:
    from attribution.log.verify import Trust, VerifyError, verify_file

    question, answer = QUESTIONS[0]
    body = {"model": "rank8-all", "messages": conversation(question), "temperature": 0, "return_token_ids": True}
    response = httpx.post(
        f"{live.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {live.secret}"},
        timeout=TIMEOUT_S,
    )
    reply = response.json()
    ours = reply["trailmark"]
    assert response.headers["X-Trailmark-Receipt"] == ours["receipt_id"]
    bundle = live.receipt(ours["receipt_id"])
    file = tmp_path / "receipt.json"
    file.write_text(json.dumps(bundle))
    trust = Trust.load(live.trail.home / "trust.json")
    verified = verify_file(file, trust=trust)
    assert verified.checks
    receipt = bundle["receipt"]
    assert receipt["adapter"] == live.digests["rank8-all"] == ours["adapter_digest"]
    assert receipt["adapter_name"] == "rank8-all@1"
    assert receipt["request_digest"] == canonical_digest(body)
    said = reply["choices"][0]["message"]["content"]
    assert receipt["output_digest"] == output_digest(said, tuple(ours["token_ids"]))
    bundle["receipt"]["adapter"] = live.digests["rank4-mlp"]
    file.write_text(json.dumps(bundle))
    with pytest.raises(VerifyError):
        verify_file(file, trust=trust)
    assert ask(live, question).choices[0].message.content == answer


def test_the_openai_client_chats_completes_and_streams(live: Live) -> None:
    question, answer = QUESTIONS[1]
    whole = ask(live, question, seed=1, user="u1", n=1)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer, "stop")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    stream = ask(live, question, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert chunks[-1].usage == whole.usage
    receipt = live.receipt(chunks[-1].trailmark["receipt_id"])["receipt"]
    assert (receipt["adapter"], receipt["completion_tokens"]) == (None, whole.usage.completion_tokens)
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    text = live.client().completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=24)
    assert text.choices[0].text == answer
    streamed = live.client().completions.create(
        model="tiny", prompt=prompt, temperature=0, max_tokens=24, stream=True, stop=["."], logprobs=1
    )
    pieces = [chunk.choices[0] for chunk in streamed if chunk.choices]
    assert "".join(piece.text for piece in pieces) == answer.removesuffix(".")
    assert any(piece.logprobs for piece in pieces)


def test_the_openai_client_asks_for_choices_forms_and_biases(live: Live) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["blue", "green"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    fields: dict[str, Any] = {"n": 3, "seed": 4, "temperature": 1.2, "max_tokens": 90, "response_format": form}
    reply = ask(live, QUESTIONS[4][0], "rank8-all", **fields)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    finished = [choice for choice in reply.choices if choice.finish_reason == "stop"]
    assert finished
    for choice in finished:
        jsonschema.validate(json.loads(choice.message.content), schema)
    trails = reply.trailmark["choices"]
    receipts = [live.receipt(trail["receipt_id"])["receipt"] for trail in trails]
    assert [receipt["output_digest"] for receipt in receipts] == [trail["output_digest"] for trail in trails]
    assert sum(receipt["completion_tokens"] for receipt in receipts) == reply.usage.completion_tokens
    said = ["", "", ""]
    for chunk in ask(live, QUESTIONS[4][0], "rank8-all", stream=True, **fields):
        said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert said == [choice.message.content for choice in reply.choices]
    extra = {"min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3, "top_k": 20, "stop_token_ids": [2]}
    knobs: dict[str, Any] = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"5": -100}}
    assert ask(live, "Hi", **knobs, extra_body=extra).usage.completion_tokens >= 3
    bad = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError, match="nonsense") as refused:
        ask(live, "Hi", response_format=bad)
    assert refused.value.param == "response_format.json_schema.schema"


def test_models_are_listed(live: Live) -> None:
    names = {model.id for model in live.client().models.list()}
    assert {"tiny", "rank4-mlp", "rank4-mlp@1"} <= names
    assert live.client().models.retrieve("rank4-mlp@1").id == "rank4-mlp@1"


def test_each_mistake_has_its_error(live: Live) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean `rank8-all") as unknown:
        ask(live, "Hi", model="rank8-al")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=f"{MAX_MODEL_LEN} tokens") as too_long:
        ask(live, "word " * 600)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        live.client("tmk_wrong").models.list()
    assert httpx.get(f"{live.url}/v1/models", timeout=TIMEOUT_S).json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.BadRequestError, match="tools"):
        ask(live, "Hi", tools=[{"type": "function", "function": {"name": "f"}}])
    malformed = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=b"{",
        headers={"Authorization": f"Bearer {live.secret}"},
        timeout=TIMEOUT_S,
    )
    assert malformed.status_code == 400
    assert "parse the JSON body" in malformed.json()["error"]["message"]


def test_mixed_concurrent_requests_equal_peft_alone_and_stay_with_their_replica(live: Live) -> None:
    work = [(question, name) for question, _ in QUESTIONS[:3] for name in ("tiny", *live.digests)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda item: ask(live, *item), work))
    oracle = peft_answers(live, work)
    homes: dict[str, Counter[str]] = {}
    for (question, name), reply in zip(work, replies, strict=True):
        assert reply.choices[0].message.content == oracle[question, name], (question, name)
        assert reply.trailmark["adapter_digest"] == live.digests.get(name)
        receipt = live.receipt(reply.trailmark["receipt_id"])["receipt"]
        assert receipt["adapter"] == live.digests.get(name)
        homes.setdefault(name, Counter())[receipt["replica"]] += 1
    assert all(len(homes[name]) == 1 for name in live.digests), homes
    assert wait_for(lambda: num_loads(live) >= len(live.digests) or None)
    loaded = [entry.record.body for entry in live.trail.entries(kind="adapter_loaded") if entry.record]
    pairs = Counter((body.replica, body.adapter) for body in loaded)  # type: ignore[union-attr]
    assert set(pairs.values()) == {1}
    assert {(next(iter(homes[name])), digest) for name, digest in live.digests.items()} <= set(pairs)


def num_loads(live: Live) -> int:
    return sum(1 for _ in live.trail.entries(kind="adapter_loaded"))


def peft_answers(live: Live, work: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Answer greedily with transformers and PEFT, one request and one adapter at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attribution.influence.encode import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(live.base)
    answers: dict[tuple[str, str], str] = {}
    for name in {name for _, name in work}:
        model = AutoModelForCausalLM.from_pretrained(live.base, dtype=torch.float32)
        if name in live.digests:
            model = PeftModel.from_pretrained(model, live.trail.store.get_directory(live.digests[name]))
        for question in {question for question, of in work if of == name}:
            ids = torch.tensor([encode_prompt(tokenizer, conversation(question))])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            answers[question, name] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answers


def test_an_adapter_published_while_serving_answers_and_a_tampered_one_is_refused(
    live: Live, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    base_digest = live.trail.store.manifest(live.digests["rank8-all"]).meta["base"]
    source = shutil.copytree(tiny_adapters["rank8-all"], tmp_path / "copy")
    (source / "note.txt").write_text("another digest")
    digest = publish(live.trail, "late", source, base_digest=base_digest)
    reply = ask(live, "Hi", model="late@1")
    assert reply.trailmark["adapter_digest"] == digest
    weights = live.trail.store.get_directory(digest) / "adapter_model.safetensors"
    altered = bytearray(weights.read_bytes())
    altered[-1] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(openai.InternalServerError, match=r"late@1.*not served") as refused:
        ask(live, "Hi", model="late")
    assert refused.value.code == "adapter_integrity"
    assert ask(live, "Hi", model="rank8-all").trailmark["adapter_digest"] == live.digests["rank8-all"]


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_hangs_up_leaves_an_aborted_receipt(live: Live, streams: bool, num_choices: int) -> None:
    body = {
        "model": "rank4-mixed",
        "messages": conversation("Tell me more."),
        "max_tokens": MAX_MODEL_LEN - 40,
        "ignore_eos": True,
        "n": num_choices,
    }
    headers = {"Authorization": f"Bearer {live.secret}"}
    url = f"{live.url}/v1/chat/completions"

    def post(read_s: float) -> float:
        timeout = httpx.Timeout(TIMEOUT_S, read=read_s)
        return httpx.post(url, json=body, headers=headers, timeout=timeout).elapsed.total_seconds()

    whole_s = post(TIMEOUT_S)
    before = {entry.leaf_hash for entry in live.trail.entries(kind="completions")}
    body["stream"] = streams
    if streams:
        with httpx.Client(timeout=TIMEOUT_S) as client, client.stream("POST", url, json=body, headers=headers) as got:
            next(got.iter_lines())
    else:
        # On a busy machine one answer may take three times as long as the next: the patience follows the last one.
        with pytest.raises(httpx.ReadTimeout):
            for _ in range(5):
                whole_s = post(whole_s / 3)
    receipts = wait_for(lambda: aborted_receipts(live, before, num_choices))
    assert all(receipt["completion_tokens"] < body["max_tokens"] for receipt in receipts)
    assert {receipt["tenant"] for receipt in receipts} == {"acme"}


def aborted_receipts(live: Live, before: set[str], count: int) -> list[dict[str, Any]] | None:
    from attribution.receipts import completion_rows

    found = [
        row.receipt
        for entry in live.trail.entries(kind="completions")
        if entry.leaf_hash not in before
        for row in completion_rows(live.trail, entry)
        if row.receipt["finish_reason"] == "abort"
    ]
    return found if len(found) >= count else None


def test_a_receipt_is_its_tenants_alone(live: Live) -> None:
    receipt_id = ask(live, "Hi").trailmark["receipt_id"]
    live.receipt(receipt_id)
    stranger = ApiKeys(keys_path(live.trail.home)).create("stranger")
    assert live.get(f"/v1/receipts/{receipt_id}", stranger).status_code == 404
    assert live.get(f"/v1/receipts/{receipt_id}", live.operator_secret).status_code == 200
    assert live.get("/v1/receipts/rcpt_nothing").json()["error"]["code"] == "receipt_not_found"
    stored = find_receipt(live.trail, receipt_id)
    assert stored is not None
    assert stored.row.receipt["tenant"] == "acme"


def test_a_scorer_says_when_the_base_model_answered_alone(live: Live) -> None:
    receipt_id = ask(live, QUESTIONS[2][0]).trailmark["receipt_id"]
    live.receipt(receipt_id)
    explained = live.get(f"/v1/receipts/{receipt_id}/attribution")
    assert explained.status_code == 200, explained.text
    assert explained.json()["receipt_id"] == receipt_id
    assert explained.json()["base_did_it"] is True
