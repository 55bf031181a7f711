"""HTTP through the gateway to a real engine and a real log, all in one process."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import rfc8785

from attribution.receipts import find_receipt, new_receipt_id, receipt_content
from attribution.signed_models import sign
from serve_apps import gateway
from serve_apps.calls import Call, Delta, Piece
from serve_apps.errors import overloaded
from serve_apps.openai import canonical_digest, output_digest
from serve_apps.spool import Spool, SpooledRow
from tests.serve_apps.published import LocalBackend, Published, publish
from tests.serve_apps.world import ANSWER, QUESTION, chat, error, events, opened
from tests.tiny_model import QUESTIONS, build_tokenizer


def test_a_chat_is_answered_and_its_receipt_names_what_was_said(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            sent = chat(return_token_ids=True, user="u7")
            response = await client.post("/v1/chat/completions", json=sent)
            reply = response.json()
            assert reply["choices"][0]["message"]["content"] == ANSWER
            assert reply["choices"][0]["finish_reason"] == "stop"
            ours = reply["trailmark"]
            assert response.headers["X-Trailmark-Receipt"] == ours["receipt_id"]
            assert ours["adapter_digest"] is None
            assert world.receipts.flush(20)
            stored = find_receipt(published.trail, ours["receipt_id"])
            assert stored is not None
            receipt = stored.row.receipt
            assert receipt["request_digest"] == canonical_digest(sent) == ours["request_digest"]
            assert receipt["output_digest"] == output_digest(ANSWER, tuple(ours["token_ids"]))
            assert (receipt["tenant"], receipt["model"], receipt["base"]) == ("acme", "tiny", published.base.digest)
            assert receipt["completion_tokens"] == reply["usage"]["completion_tokens"] == len(ours["token_ids"])
            content = receipt_content(published.trail, ours["receipt_id"])
            assert content["output_text"] == ANSWER
            assert content["messages"] == sent["messages"]
            assert len(content["prompt_token_ids"]) == reply["usage"]["prompt_tokens"] == receipt["prompt_tokens"]

    asyncio.run(body())


def test_a_stream_says_the_same_as_a_whole_answer(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            for model in ("tiny", "rank8-all"):
                whole = (await client.post("/v1/chat/completions", json=chat(model=model))).json()
                chunks = await events(client, chat(model=model, stream_options={"include_usage": True}))
                text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
                assert text == whole["choices"][0]["message"]["content"]
                assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
                assert chunks[-1]["choices"] == []
                assert chunks[-1]["usage"] == whole["usage"]
                assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
                assert chunks[-2]["trailmark"]["adapter_digest"] == whole["trailmark"]["adapter_digest"]
                assert chunks[-2]["trailmark"]["output_digest"] == whole["trailmark"]["output_digest"]
                assert len({chunk["id"] for chunk in chunks}) == 1

    asyncio.run(body())


def test_completions_take_text_or_tokens_and_stop_where_told(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            tokenizer = world.engine.tokenizer
            prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
            fields = {"model": "tiny", "temperature": 0, "max_tokens": 20}
            by_text = (await client.post("/v1/completions", json={**fields, "prompt": prompt})).json()
            assert by_text["object"] == "text_completion"
            assert by_text["choices"][0]["text"] == ANSWER
            token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            by_tokens = (await client.post("/v1/completions", json={**fields, "prompt": token_ids})).json()
            assert by_tokens["choices"][0]["text"] == ANSWER
            cut = (await client.post("/v1/completions", json={**fields, "prompt": prompt, "stop": " Paris"})).json()
            assert cut["choices"][0]["text"] == ANSWER.split(" Paris")[0]
            short = (await client.post("/v1/completions", json={**fields, "prompt": prompt, "max_tokens": 2})).json()
            assert short["choices"][0]["finish_reason"] == "length"
            assert short["usage"]["completion_tokens"] == 2
            wrong = await client.post("/v1/completions", json={**fields, "prompt": [10**6]})
            assert error(wrong)["param"] == "prompt"

    asyncio.run(body())


def test_logprobs_are_in_openais_form(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            reply = (await client.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2))).json()
            tokens = reply["choices"][0]["logprobs"]["content"]
            assert len(tokens) == reply["usage"]["completion_tokens"]
            for token in tokens:
                assert token["logprob"] <= 0
                assert len(token["top_logprobs"]) == 2
                assert token["logprob"] == pytest.approx(token["top_logprobs"][0]["logprob"])  # greedy: the best one
                assert bytes(token["bytes"]).decode() == token["token"]
            part = build_tokenizer().encode("é", add_special_tokens=False)[0]  # the first of its two bytes
            biased = chat(logprobs=True, logit_bias={str(part): 100}, max_tokens=1)
            reply = (await client.post("/v1/chat/completions", json=biased)).json()
            (token,) = reply["choices"][0]["logprobs"]["content"]
            assert (token["token"], token["bytes"]) == ("\ufffd", [0xC3])
            prompt = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "logprobs": 1, "temperature": 0}
            legacy = (await client.post("/v1/completions", json=prompt)).json()["choices"][0]["logprobs"]
            assert len(legacy["tokens"]) == len(legacy["token_logprobs"]) == len(legacy["text_offset"]) == 3

    asyncio.run(body())


def test_models_are_listed_by_version_and_bare_name(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            models = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
            assert {"tiny", "rank2-attention", "rank2-attention@1"} <= set(models)
            assert models["rank2-attention"]["trailmark"]["alias_of"] == "rank2-attention@1"
            digest = published.digests["rank2-attention"]
            assert models["rank2-attention@1"]["trailmark"]["digest"] == digest
            one = (await client.get("/v1/models/rank2-attention@1")).json()
            assert one == models["rank2-attention@1"]
            assert error(await client.get("/v1/models/nothing"))["code"] == "model_not_found"

    asyncio.run(body())


def test_an_adapter_published_later_is_served_and_a_bare_name_means_the_newest(
    published: Published, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            assert (await client.post("/v1/chat/completions", json=chat(model="late"))).status_code == 404
            base = published.base.digest
            first = publish(published.trail, "late", tiny_adapters["rank2-attention"], base_digest=base)
            reply = (await client.post("/v1/chat/completions", json=chat(model="late"))).json()
            assert reply["trailmark"]["adapter_digest"] == first
            second = publish(published.trail, "late", tiny_adapters["rank8-all"], base_digest=base)
            for model, digest in (("late", second), ("late@1", first), ("late@2", second)):
                reply = (await client.post("/v1/chat/completions", json=chat(model=model))).json()
                assert reply["trailmark"]["adapter_digest"] == digest, model
            alien = publish(published.trail, "alien", tiny_adapters["rank4-mlp"], base_digest="sha256:" + "0" * 64)
            refused = error(await client.post("/v1/chat/completions", json=chat(model="alien")))
            assert refused["code"] == "base_mismatch"
            listed = (await client.get("/v1/models")).json()["data"]
            assert alien not in {entry["trailmark"]["digest"] for entry in listed}

    asyncio.run(body())


@pytest.mark.parametrize(
    ("request_of", "status", "code", "words"),
    [
        (lambda c: c.post("/v1/chat/completions", json=chat(model="rank8-al")), 404, "model_not_found", "`rank8-all"),
        (lambda c: c.post("/v1/chat/completions", json=chat("x " * 500)), 400, "context_length_exceeded", "128 tokens"),
        (lambda c: c.post("/v1/chat/completions", json=chat(max_tokens=127)), 400, "context_length_exceeded", "127"),
        (lambda c: c.post("/v1/chat/completions", content=b'{"model":'), 400, None, "parse the JSON"),
        (lambda c: c.post("/v1/chat/completions", json=chat(n=9)), 400, "invalid_value", "`n`"),
        (lambda c: c.post("/v1/chat/completions", json=chat(tools=[{}])), 400, "unsupported_parameter", "`tools`"),
        (lambda c: c.post("/v1/chat/completions", content=b" " * (5 << 20)), 413, None, "larger"),
        (lambda c: c.post("/v1/nothing", json={}), 404, "unknown_url", "/v1/nothing"),
        (lambda c: c.get("/v1/chat/completions"), 405, "method_not_allowed", "GET"),
        (lambda c: c.get("/v1/receipts/rcpt_nothing"), 404, "receipt_not_found", "rcpt_nothing"),
        (lambda c: c.get("/v1/receipts/rcpt_nothing/attribution"), 404, "receipt_not_found", "rcpt_nothing"),
    ],
)
def test_errors_have_openais_form(
    published: Published, tmp_path: Path, request_of: Any, status: int, code: str | None, words: str
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            response = await request_of(client)
            assert response.status_code == status
            told = error(response)
            assert told["code"] == code
            assert words in told["message"]

    asyncio.run(body())


def test_without_a_valid_key_nothing_is_answered(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            for secret, words in (("", "didn't provide"), ("tmk_wrong", "Incorrect API key")):
                async with world.client(secret) as stranger:
                    for response in (
                        await stranger.post("/v1/chat/completions", json=chat()),
                        await stranger.get("/v1/models"),
                        await stranger.get("/v1/models/tiny"),
                        await stranger.get("/v1/receipts/rcpt_x"),
                        await stranger.get("/v1/receipts/rcpt_x/attribution"),
                    ):
                        assert response.status_code == 401
                        assert error(response)["code"] == "invalid_api_key"
                        assert words in error(response)["message"]
                    assert (await stranger.get("/health")).json() == {"status": "ok"}
            world.keys.revoke("acme")
            assert (await client.get("/v1/models")).status_code == 401

    asyncio.run(body())


def test_keys_can_be_switched_off(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path, require_api_key=False) as (world, _), world.client() as stranger:
            reply = (await stranger.post("/v1/chat/completions", json=chat())).json()
            assert world.receipts.flush(20)
            stored = find_receipt(published.trail, reply["trailmark"]["receipt_id"])
            assert stored is not None
            assert stored.row.receipt["tenant"] == "anonymous"

    asyncio.run(body())


def test_a_receipt_is_pending_then_there_and_only_for_its_tenant(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with (
            opened(published, tmp_path, receipt_flush_s=0.3) as (world, client),
            world.tenant("other") as other,
            world.tenant("boss", is_operator=True) as boss,
        ):
            reply = (await client.post("/v1/chat/completions", json=chat(model="rank4-mlp"))).json()
            url = f"/v1/receipts/{reply['trailmark']['receipt_id']}"
            waiting = await client.get(url)
            assert (waiting.status_code, waiting.json()["status"]) == (202, "pending")
            assert int(waiting.headers["Retry-After"]) >= 1
            assert (await other.get(url)).status_code == 404
            assert world.receipts.flush(20)
            assert (await other.get(url)).status_code == 404
            assert (await client.get(url[:-4])).status_code == 404
            bundle = (await client.get(url)).json()
            assert bundle["receipt"]["adapter"] == published.digests["rank4-mlp"]
            assert (await boss.get(url)).json()["receipt"] == bundle["receipt"]
            explained = await client.get(f"{url}/attribution")
            assert explained.json()["receipt_id"] == reply["trailmark"]["receipt_id"]

    asyncio.run(body())


class DyingBackend(LocalBackend):
    """A replica that dies after its first tokens: no receipt is ever written."""

    async def _dying(self) -> AsyncGenerator[Piece, None]:
        yield Delta("Par", (1,), ())
        yield overloaded("the replica died").problem

    def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        return self._dying()


def test_a_receipt_whose_replica_died_is_pending_for_a_while_and_then_lost(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client), world.tenant("other") as other:
            answered = (await client.post("/v1/chat/completions", json=chat())).json()["trailmark"]["receipt_id"]
            world.gateway._backend = DyingBackend(world.gateway._backend._completer)
            response = await client.post("/v1/chat/completions", json=chat(stream=True))
            assert response.status_code == 200
            url = f"/v1/receipts/{response.headers['X-Trailmark-Receipt']}"
            assert (await client.get(url)).status_code == 202
            monkeypatch.setattr(gateway, "RECEIPT_LOST_S", 0.0)
            for path in (url, f"{url}/attribution"):
                lost = await client.get(path)
                assert (lost.status_code, error(lost)["code"]) == (404, "receipt_lost")
            assert error(await other.get(url))["code"] == "receipt_not_found"
            assert world.receipts.flush(20)
            assert (await client.get(f"/v1/receipts/{answered}")).status_code == 200

    asyncio.run(body())


def test_a_receipt_that_waits_for_the_log_is_never_called_lost(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            world.gateway._spool = Spool(tmp_path / "spool")
            receipt_id = new_receipt_id()
            world.gateway._issued[receipt_id] = gateway._Issued("acme", ended_at=0.0)
            monkeypatch.setattr(gateway, "RECEIPT_LOST_S", 0.0)
            segment = world.gateway._spool.open_segment("busy")
            segment.append(SpooledRow({"id": receipt_id, "tenant": "acme"}, bytes(32), {}))
            assert (await client.get(f"/v1/receipts/{receipt_id}")).status_code == 202
            segment.discard()
            assert error(await client.get(f"/v1/receipts/{receipt_id}"))["code"] == "receipt_lost"

    asyncio.run(body())


def test_a_tampered_adapter_is_refused_and_the_others_go_on(
    published: Published, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            source = shutil.copytree(tiny_adapters["rank2-attention"], tmp_path / "copy")
            (source / "note.txt").write_text("makes it another digest")
            digest = publish(published.trail, "tampered", source, base_digest=published.base.digest)
            good = await client.post("/v1/chat/completions", json=chat(model="tampered"))
            assert good.status_code == 200
            weights = published.trail.store.get_directory(digest, verify=False) / "adapter_model.safetensors"
            altered = bytearray(weights.read_bytes())
            altered[-1] ^= 1
            weights.write_bytes(altered)
            for stream in (False, True):
                refused = await client.post("/v1/chat/completions", json=chat(model="tampered", stream=stream))
                assert refused.status_code == 500
                assert refused.headers["x-should-retry"] == "false"
                assert error(refused)["code"] == "adapter_integrity"
            assert (await client.post("/v1/chat/completions", json=chat(model="rank8-all"))).status_code == 200
            assert str(tmp_path) not in refused.text

    asyncio.run(body())


def test_a_server_that_asks_for_signatures_refuses_an_adapter_until_it_is_signed(
    published: Published, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path, model_signatures="required") as (_, client):
            source = shutil.copytree(tiny_adapters["rank2-attention"], tmp_path / "copy")
            (source / "note.txt").write_text("published without a signature")
            digest = publish(published.trail, "unsigned", source, base_digest=published.base.digest)
            refused = await client.post("/v1/chat/completions", json=chat(model="unsigned"))
            assert (refused.status_code, error(refused)["code"]) == (500, "adapter_integrity")
            assert sign(published.trail, digest)
            assert (await client.post("/v1/chat/completions", json=chat(model="unsigned"))).status_code == 200

    asyncio.run(body())


def test_a_client_that_goes_away_leaves_a_receipt_of_what_was_generated(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            call = asyncio.create_task(
                client.post("/v1/chat/completions", json=chat(ignore_eos=True, max_tokens=100, model="rank8-all"))
            )
            while not world.gateway._issued:
                await asyncio.sleep(0)
            (receipt_id,) = world.gateway._issued
            while not world.engine.stats()["num_running"]:
                await asyncio.sleep(0.001)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call
            await asyncio.to_thread(world.receipts.flush, 20)
            stored = find_receipt(published.trail, receipt_id)
            assert stored is not None
            assert stored.row.receipt["finish_reason"] == "abort"
            assert stored.row.receipt["completion_tokens"] < 100
            assert world.gateway._num_running == 0
            content = receipt_content(published.trail, receipt_id)
            tokens = tuple(content["output_token_ids"])
            assert stored.row.receipt["output_digest"] == output_digest(content["output_text"], tokens)

    asyncio.run(body())


def test_more_requests_than_allowed_are_answered_429(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path, max_running_requests=2) as (_, client):
            calls = [client.post("/v1/chat/completions", json=chat(max_tokens=20)) for _ in range(6)]
            responses = await asyncio.gather(*calls)
            statuses = sorted(response.status_code for response in responses)
            assert statuses.count(200) >= 2
            assert set(statuses) == {200, 429}
            refused = next(response for response in responses if response.status_code == 429)
            assert error(refused)["type"] == "rate_limit_error"
            assert refused.headers["Retry-After"] == "1"
            assert (await client.post("/v1/chat/completions", json=chat())).status_code == 200

    asyncio.run(body())


def test_mixed_requests_each_equal_their_own_answer_alone(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            bodies = [chat(question, model) for question, _ in QUESTIONS[:2] for model in ("tiny", *published.digests)]
            alone = [(await client.post("/v1/chat/completions", json=body)).json() for body in bodies]
            half = len(bodies) // 2
            mixed: list[Any] = []
            for part in (bodies[:half], bodies[half:]):
                calls = [client.post("/v1/chat/completions", json=body) for body in part]
                mixed += [response.json() for response in await asyncio.gather(*calls)]
            for one, other in zip(alone, mixed, strict=True):
                assert one["choices"] == other["choices"]
                assert one["trailmark"]["adapter_digest"] == other["trailmark"]["adapter_digest"]
            answers = [reply["choices"][0]["message"]["content"] for reply in alone[:half]]
            assert len(set(answers)) > 1  # the adapters do change the answer

    asyncio.run(body())


def test_the_request_digest_is_what_a_caller_computes(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            raw = b'{ "temperature": 0.0, "prompt": "Hi",\n "model": "tiny", "max_tokens": 1 }'
            reply = (await client.post("/v1/completions", content=raw)).json()
            assert reply["trailmark"]["request_digest"] == canonical_digest(json.loads(raw))
            assert rfc8785.dumps(json.loads(raw)) == b'{"max_tokens":1,"model":"tiny","prompt":"Hi","temperature":0}'

    asyncio.run(body())
