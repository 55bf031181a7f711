"""The best examples of a question: exact against sorting everything, whatever the shards and whoever holds them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attribution.influence import gradient_store
from attribution.influence.codec import FactorCodec, GradientCodec
from attribution.influence.gradient_store import GradientStore
from attribution.influence.topk import Asked, Hit, merge, top_examples
from kernels.gradients import BLOCK

VIEWS = ("10", "20", "60")
NUM, DIM = 11, BLOCK


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GradientStore:
    """Eleven examples in shards of four, two of them deleted, one of them twice under another id."""
    one = FactorCodec("q.lora_A", torch.eye(1), torch.eye(DIM), torch.ones(1, DIM), torch.arange(DIM))
    codec = GradientCodec("adam", (one,), torch.arange(DIM), 1.0)
    generator = np.random.default_rng(0)
    rows = {view: generator.standard_normal((NUM, DIM)).astype(np.float32) for view in VIEWS}
    for values in rows.values():
        values[7] = values[2]
    weights = generator.random((NUM, len(VIEWS)))
    weights[7] = weights[2]
    folder = tmp_path_factory.mktemp("topk") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradient_store, "SHARD_ROWS", 4)
        made = GradientStore.create(folder, dict.fromkeys(VIEWS, codec), about={"beta2": "0.9"})
        made.append([f"e{row:02}" for row in range(NUM)], rows, weights=weights)
    made.delete(["e03", "e09"])
    return made


def asked(views: tuple[str, ...], normalise: str, num_queries: int = 2) -> Asked:
    rows = np.random.default_rng(len(views)).standard_normal((len(views), num_queries, DIM)).astype(np.float32)
    return Asked(views, rows, normalise)  # type: ignore[arg-type]


def looped(store: GradientStore, question: Asked, query: int) -> dict[str, float]:
    """Score example by example in float64, over what the shards hold."""
    raw: dict[str, list[tuple[float, float, float]]] = {}
    steps = [int(view) for view in question.views]
    for shard in store.shards:
        for row in shard.live.tolist():
            found = []
            for index, view in enumerate(question.views):
                weight = sum(
                    float(shard.weights[row, column])
                    for column, other in enumerate(store.views)
                    if min(steps, key=lambda step: abs(step - int(other))) == int(view)
                )
                h = shard.rows(view).values()[row].astype(np.float64)
                q = question.rows[index, query].astype(np.float64)
                found.append((weight, float(q @ h), float(np.sqrt(q @ q) * np.sqrt(h @ h))))
            raw[shard.ids[row]] = found
    if question.normalise == "none":
        return {
            name: sum((1 - 0.9**step) ** 0.5 * w * dot for step, (w, dot, _) in zip(steps, parts, strict=True))
            for name, parts in raw.items()
        }
    return {name: sum(w * dot / size for w, dot, size in parts) for name, parts in raw.items()}


@pytest.mark.parametrize("normalise", ["none", "cosine"])
@pytest.mark.parametrize("views", [VIEWS, ("60",), ("10", "60")])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_top_examples_are_the_sorted_loops(
    store: GradientStore, normalise: str, views: tuple[str, ...], k: int
) -> None:
    question = asked(views, normalise)
    found = top_examples(store, question, k=k)
    assert len(found) == 2
    for query, hits in enumerate(found):
        expected = looped(store, question, query)
        order = sorted(expected, key=lambda name: (-round(expected[name], 9), name))[:k]
        assert [hit.example_id for hit in hits] == order
        np.testing.assert_allclose([hit.score for hit in hits], [expected[name] for name in order], rtol=1e-4)
        assert not {"e03", "e09"} & {hit.example_id for hit in hits}


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_however_shards_are_divided_the_answer_is_the_same_bits(store: GradientStore, data: st.DataObject) -> None:
    question = asked(VIEWS, "cosine")
    whole = top_examples(store, question, k=5)
    names = [shard.name for shard in store.shards]
    owner = {name: data.draw(st.integers(0, 2)) for name in names}
    groups = [[name for name in names if owner[name] == index] for index in range(3)]
    parts = [top_examples(store, question, k=5, shards=group) for group in groups if group]
    assert tuple(merge((part[query] for part in parts), k=5) for query in range(2)) == whole
    assert top_examples(store, question, k=5) == whole


def test_equal_scores_go_by_id(store: GradientStore) -> None:
    hits = top_examples(store, asked(("60",), "none", 1), k=50)[0]
    scores = {hit.example_id: hit.score for hit in hits}
    assert scores["e02"] == scores["e07"]
    order = [hit.example_id for hit in hits]
    assert order.index("e07") == order.index("e02") + 1
    assert merge([[Hit("b", 1.0)], [Hit("a", 1.0), Hit("c", 0.5)]], k=2) == (Hit("a", 1.0), Hit("b", 1.0))


def test_an_emptied_store_has_no_best(tmp_path: Path) -> None:
    one = FactorCodec("q.lora_A", torch.eye(1), torch.eye(DIM), torch.ones(1, DIM), torch.arange(DIM))
    made = GradientStore.create(tmp_path / "s", {"1": GradientCodec("adam", (one,), torch.arange(DIM), 1.0)})
    made.append(["a"], {"1": np.ones((1, DIM), np.float32)})
    made.delete(["a"])
    question = Asked(("1",), np.ones((1, 1, DIM), np.float32))
    assert top_examples(made, question, k=3) == ((),)
