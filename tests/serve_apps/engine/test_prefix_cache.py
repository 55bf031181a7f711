"""Prefixes found again change no token, are never another adapter's or another content's, and are counted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from serve_apps.engine.adapter import WEIGHTS_FILE
from serve_apps.engine.engine import Engine
from serve_apps.engine.prefix import extend_keys, first_key
from tests.serve_apps.engine.engine_cases import Oracle, engine_for, prompts, ref, request, run, tokens


def hits(engine: Engine) -> int:
    return int(str(engine.stats()["prefix_hit_tokens"]))


def test_a_second_ask_computes_the_rest_only(tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle) -> None:
    """Blocks of 4: all whole blocks of the prompt but the one that holds its last token are found."""
    for folder in (None, strong_adapters["strong-r8-all"]):
        engine, adapter = engine_for(tiny_base), None if folder is None else ref(folder)
        prompt = prompts(engine, 2)[1]
        first = tokens(run(engine, [request("first", prompt, adapter)])["first"])
        num_prefilled = int(str(engine.stats()["num_prefill_tokens"]))
        second = tokens(run(engine, [request("second", prompt, adapter)])["second"])
        assert hits(engine) == (len(prompt) - 1) // 4 * 4
        assert int(str(engine.stats()["num_prefill_tokens"])) == num_prefilled + len(prompt) - hits(engine)
        assert first == second
        oracle.explain(prompt, second, folder)


def test_a_conversation_finds_its_own_answer(tiny_base: Path, oracle: Oracle) -> None:
    """The second turn's prompt is the first turn's prompt and answer: generated tokens are found too."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    answer = tokens(run(engine, [request("one", prompt)])["one"])
    turn = [*prompt, *answer, 5, 6, 7]
    produced = tokens(run(engine, [request("two", turn)])["two"])
    assert hits(engine) == (len(prompt) + len(answer) - 1) // 4 * 4
    oracle.explain(turn, produced)


def test_sharing_while_running(tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle) -> None:
    """Sequences of one prefix that run at once hold the same blocks, which are no neighbours of what they add."""
    engine, folder = engine_for(tiny_base, max_num_seqs=6), strong_adapters["strong-r8-all"]
    prefix = prompts(engine, 2)[1]
    run(engine, [request("warm", prefix, ref(folder), max_tokens=1)])
    asked = {f"r{index}": [*prefix[:-1], 40 + index, 50, 60] for index in range(5)}
    outputs = run(engine, [request(name, prompt, ref(folder)) for name, prompt in asked.items()])
    assert hits(engine) >= 5 * ((len(prefix) - 1) // 4 * 4)
    for name, prompt in asked.items():
        oracle.explain(prompt, tokens(outputs[name]), folder)


def test_another_adapter_or_the_base_never_hits(tiny_base: Path, strong_adapters: dict[str, Path]) -> None:
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    for index, adapter in enumerate([None, *(ref(folder) for folder in strong_adapters.values())]):
        run(engine, [request(f"r{index}", prompt, adapter, max_tokens=1)])
    assert hits(engine) == 0


def test_a_reload_of_changed_files_under_the_same_name_never_hits(
    tiny_base: Path, strong_adapters: dict[str, Path], oracle: Oracle, tmp_path: Path
) -> None:
    """A folder without a manifest keeps the name it was given, so only its content tells."""
    engine, folder = engine_for(tiny_base), tmp_path / "changing"
    prompt = prompts(engine, 1)[0]
    answers: list[Any] = []
    for factor in (1.0, -2.0):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(strong_adapters["strong-r8-all"], folder)
        tensors = {name: tensor * factor for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        answers.append(tokens(run(engine, [request("r", prompt, ref(folder))])["r"]))
        Oracle(tiny_base).explain(prompt, answers[-1], folder)
        assert engine.unload(ref(folder).digest)
    assert hits(engine) == 0 and answers[0] != answers[1]


def test_what_a_failing_request_left_is_not_found(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are not finite publish nothing, and clear no block that others hold."""
    engine = engine_for(tiny_base)
    prompt = prompts(engine, 1)[0]
    expected = tokens(run(engine, [request("sound", prompt)])["sound"])
    forward = engine._runner.model.forward
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner.model, "forward", lambda *args: forward(*args) * float("nan"))
        failed = run(engine, [request("longer", [*prompt, *range(20, 40)])])["longer"]
    assert failed[-1].finish_reason == "error"
    found = hits(engine)
    assert tokens(run(engine, [request("again", prompt)])["again"]) == expected
    run(engine, [request("longer", [*prompt, *range(20, 40)], max_tokens=1)])
    assert hits(engine) - found == 2 * ((len(prompt) - 1) // 4 * 4)


def test_preemption_finds_its_own_blocks(tiny_base: Path, oracle: Oracle) -> None:
    tight = engine_for(tiny_base, num_kv_blocks=26, max_num_seqs=3)
    asked = prompts(tight, 3)
    outputs = run(tight, [request(f"r{index}", prompt, max_tokens=40) for index, prompt in enumerate(asked)])
    assert int(str(tight.stats()["num_preemptions"])) > 0 and int(str(tight.stats()["prefix_evicted_blocks"])) > 0
    for index, prompt in enumerate(asked):
        oracle.explain(prompt, tokens(outputs[f"r{index}"]))
    assert tight.stats()["kv_blocks_free"] == 26


def test_it_can_be_switched_off(tiny_base: Path) -> None:
    engine = engine_for(tiny_base, enable_prefix_cache=False)
    prompt = prompts(engine, 1)[0]
    for _ in range(2):
        run(engine, [request("r", prompt)])
    assert hits(engine) == engine.stats()["kv_blocks_cached"] == 0


def test_keys_depend_on_everything_before() -> None:
    def keys(base: str, adapter: str | None, token_ids: list[int]) -> list[bytes]:
        chain = [first_key(base, adapter)]
        extend_keys(chain, token_ids, block_size=2, num_tokens=len(token_ids))
        return chain

    plain = keys("base", None, [1, 2, 3, 4, 5])
    assert len(plain) == 3 and plain[:2] == keys("base", None, [1, 2, 3])
    others = [("base2", None, [1, 2, 3, 4]), ("base", "x", [1, 2, 3, 4]), ("base", "y", [1, 2, 3, 4])]
    others += [("base", None, [9, 2, 3, 4]), ("base", None, [2, 1, 3, 4])]
    assert len({chain[2] for chain in [plain, *(keys(*other) for other in others)]}) == 6
