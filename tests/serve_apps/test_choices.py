"""Several choices and answers of a given form, through HTTP to a real engine and a real log."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from attribution.receipts import find_receipt, receipt_content
from serve_apps.calls import Answer, Call, Delta, Piece
from serve_apps.choices import choice_seed, complete_all, split, stream_all
from serve_apps.engine.config import SamplingParams
from serve_apps.errors import Problem, overloaded
from serve_apps.openai import output_digest
from tests.serve_apps.published import Published
from tests.serve_apps.world import QUESTION, chat, error, events, opened

HOT: dict[str, Any] = {"temperature": 1.8, "max_tokens": 12, "seed": 11}
COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["blue", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "colour", "schema": COLOUR, "strict": True}}


def texts(reply: dict[str, Any]) -> list[str]:
    return [choice["message"]["content"] for choice in reply["choices"]]


def test_each_choice_has_its_seed_and_its_receipt(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            sent = chat(model="rank8-all", n=4, return_token_ids=True, **HOT)
            response = await client.post("/v1/chat/completions", json=sent)
            reply = response.json()
            trails = reply["trailmark"]["choices"]
            ids = [trail["receipt_id"] for trail in trails]
            assert response.headers["X-Trailmark-Receipt"] == ", ".join(ids)
            assert [choice["index"] for choice in reply["choices"]] == [trail["index"] for trail in trails]
            assert len(set(ids)) == 4 and len(set(texts(reply))) == 4
            assert {**trails[0], "choices": trails} == {**reply["trailmark"], "index": 0}
            assert world.receipts.flush(20)
            num_completion = 0
            for text, trail, choice in zip(texts(reply), trails, reply["choices"], strict=True):
                stored = find_receipt(published.trail, trail["receipt_id"])
                assert stored is not None
                receipt = stored.row.receipt
                assert receipt["output_digest"] == output_digest(text, tuple(trail["token_ids"]))
                assert receipt["output_digest"] == trail["output_digest"]
                assert receipt["request_digest"] == trail["request_digest"] == reply["trailmark"]["request_digest"]
                assert receipt["adapter"] == published.digests["rank8-all"]
                assert receipt["finish_reason"] == choice["finish_reason"]
                assert receipt_content(published.trail, trail["receipt_id"])["output_text"] == text
                num_completion += receipt["completion_tokens"]
                num_prompt = receipt["prompt_tokens"]
            assert reply["usage"]["completion_tokens"] == num_completion
            assert reply["usage"]["prompt_tokens"] == num_prompt
            again = (await client.post("/v1/chat/completions", json=sent)).json()
            assert texts(again) == texts(reply)
            one = (await client.post("/v1/chat/completions", json={**sent, "n": 1})).json()
            assert texts(one) == texts(reply)[:1] and "choices" not in one["trailmark"]
            third = {**sent, "n": 1, "seed": choice_seed(HOT["seed"], 2)}
            assert texts((await client.post("/v1/chat/completions", json=third)).json()) == texts(reply)[2:3]

    asyncio.run(body())


def test_streamed_choices_say_the_same_each_under_its_index(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            sent = chat(n=3, logprobs=True, **HOT)
            whole = (await client.post("/v1/chat/completions", json=sent)).json()
            chunks = await events(client, {**sent, "stream_options": {"include_usage": True}})
            assert len({chunk["id"] for chunk in chunks}) == 1
            said, closing = ["", "", ""], {}
            for chunk in chunks[:-1]:
                (choice,) = chunk["choices"]
                said[choice["index"]] += choice["delta"].get("content", "")
                if choice["finish_reason"]:
                    closing[choice["index"]] = chunk["trailmark"]
            assert said == texts(whole)
            assert chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
            trails = chunks[-1]["trailmark"]["choices"]
            assert [closing[index] for index in range(3)] == [
                {name: value for name, value in trail.items() if name != "index"} for trail in trails
            ]
            digests = [trail["output_digest"] for trail in whole["trailmark"]["choices"]]
            assert [trail["output_digest"] for trail in trails] == digests
            prompt = {"model": "tiny", "prompt": "Bees", "n": 2, "max_tokens": 4, "seed": 1}
            legacy = (await client.post("/v1/completions", json=prompt)).json()
            assert [choice["index"] for choice in legacy["choices"]] == [0, 1]
            assert legacy["usage"]["completion_tokens"] <= 8

    asyncio.run(body())


def test_more_choices_than_the_server_holds_are_refused(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path, max_running_requests=3) as (world, client):
            refused = await client.post("/v1/chat/completions", json=chat(n=4))
            assert (refused.status_code, error(refused)["param"]) == (400, "n")
            two = [client.post("/v1/chat/completions", json=chat(n=2, ignore_eos=True, **HOT)) for _ in range(2)]
            statuses = sorted(response.status_code for response in await asyncio.gather(*two))
            assert statuses == [200, 429]
            assert world.gateway._num_running == 0

    asyncio.run(body())


def test_a_client_that_leaves_aborts_every_choice(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (world, client):
            sent = chat(n=3, ignore_eos=True, max_tokens=80, temperature=1)
            waiting = asyncio.create_task(client.post("/v1/chat/completions", json=sent))
            while world.engine.stats()["num_running"] != 3:
                await asyncio.sleep(0.005)
            ids = list(world.gateway._issued)[-3:]
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            while world.engine.stats()["num_running"]:
                await asyncio.sleep(0.005)
            assert world.receipts.flush(20)
            for receipt_id in ids:
                stored = find_receipt(published.trail, receipt_id)
                assert stored is not None and stored.row.receipt["finish_reason"] == "abort"

    asyncio.run(body())


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_of_a_schema_validates_streamed_or_not(
    published: Published, tmp_path: Path, temperature: float
) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            sent = chat(response_format=FORM, n=3, seed=5, max_tokens=90) | {"temperature": temperature}
            reply = (await client.post("/v1/chat/completions", json=sent)).json()
            finished = [choice for choice in reply["choices"] if choice["finish_reason"] == "stop"]
            assert finished
            for choice in finished:
                jsonschema.validate(json.loads(choice["message"]["content"]), COLOUR)
            chunks = await events(client, {**sent, "n": 1})
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == texts(reply)[0]
            plain = {"model": "tiny", "prompt": "It is ", "temperature": temperature, "max_tokens": 8}
            by_regex = {**plain, "response_format": {"type": "regex", "pattern": "(yes|no)!"}}
            said = (await client.post("/v1/completions", json=by_regex)).json()["choices"][0]
            assert (said["text"] in ("yes!", "no!"), said["finish_reason"]) == (True, "stop")

    asyncio.run(body())


def test_a_bad_schema_is_a_400_that_names_the_field_streamed_or_not(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "nonsense"}}}
            for stream in (False, True):
                refused = await client.post("/v1/chat/completions", json=chat(response_format=form, stream=stream))
                assert refused.status_code == 400
                assert error(refused)["param"] == "response_format.json_schema.schema"
                assert "nonsense" in error(refused)["message"]

    asyncio.run(body())


def test_biases_and_penalties_change_what_is_said(published: Published, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(published, tmp_path) as (_, client):
            plain = (await client.post("/v1/chat/completions", json=chat(return_token_ids=True))).json()
            first = plain["trailmark"]["token_ids"][0]
            sent = chat(logit_bias={str(first): -100}, return_token_ids=True)
            biased = (await client.post("/v1/chat/completions", json=sent)).json()
            assert first not in biased["trailmark"]["token_ids"]
            num_distinct = []
            for penalty in (0, 2):
                longer = chat(min_tokens=30, max_tokens=32, frequency_penalty=penalty, return_token_ids=True)
                token_ids = (await client.post("/v1/chat/completions", json=longer)).json()["trailmark"]["token_ids"]
                assert len(token_ids) >= 30
                num_distinct.append(len(set(token_ids)))
            assert num_distinct[1] > num_distinct[0]
            too_high = await client.post("/v1/chat/completions", json=chat(logit_bias={str(10**6): 1}))
            assert (too_high.status_code, error(too_high)["param"]) == (400, "logit_bias")

    asyncio.run(body())


CALL = Call("rcpt_0", 7, "m", "t", (1, 2), SamplingParams(seed=3), None, "sha256:0", {})
ANSWER = Answer(QUESTION, (1,), (), "stop", 2, None, "sha256:1")


class Scripted:
    """A backend whose choices end as the script says: an answer, a problem, or never."""

    def __init__(self, *ends: Answer | Problem | None) -> None:
        self._ends = iter(ends)
        self.num_begun = self.num_aborted = 0

    async def complete(self, call: Call) -> Answer | Problem:
        end = next(self._ends)
        self.num_begun += 1
        try:
            if end is None:
                await asyncio.Event().wait()
            assert end is not None
            return end
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise

    async def stream(self, call: Call) -> AsyncGenerator[Piece, None]:
        yield Delta(call.receipt_id, (), ())
        yield await self.complete(call)


def test_one_choices_problem_is_everyones_and_ends_the_others() -> None:
    problem = overloaded("full").problem

    async def body() -> None:
        calls = split(CALL, 3)
        backend = Scripted(None, problem, None)
        assert await complete_all(backend, calls) == problem
        assert backend.num_aborted == 2
        backend = Scripted(None, problem, None)
        pieces = [piece async for piece in stream_all(backend, calls)]
        assert pieces[-1][1] == problem
        assert not any(isinstance(piece, Answer | Problem) for _, piece in pieces[:-1])
        assert backend.num_aborted == backend.num_begun - 1
        left = Scripted(None, None, None)
        stream = stream_all(left, calls)
        await anext(stream)
        await stream.aclose()
        assert left.num_aborted == left.num_begun and not asyncio.all_tasks() - {asyncio.current_task()}
        good = Scripted(ANSWER, ANSWER)
        assert [index for index, piece in [p async for p in stream_all(good, calls[:2])] if piece == ANSWER] == [0, 1]

    asyncio.run(body())


def test_seeds_of_choices_are_fixed_and_apart() -> None:
    calls = split(CALL, 16)
    assert calls[0] is CALL
    assert len({call.sampling.seed for call in calls}) == len({call.receipt_id for call in calls}) == 16
    assert {call.request_digest for call in calls} == {"sha256:0"}
    # Fixed for ever: a recorded seed must give the same choices years from now.
    assert [choice_seed(3, index) for index in (0, 1, 2)] == [3, 90483680910418, 3840565176395285]
    assert [call.sampling.seed for call in split(split(CALL, 1)[0], 3)] == [choice_seed(3, index) for index in range(3)]
