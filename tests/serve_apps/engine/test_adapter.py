"""What the engine refuses to load, by name, and that a refusal costs no resident adapter its place."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.lora import MODULES
from serve_apps.engine.adapter import CONFIG_FILE, WEIGHTS_FILE, inspect_adapter, read_adapter
from serve_apps.engine.adapter_pool import AdapterPool
from serve_apps.engine.architecture import GROUPS, ModelSpec, read_spec
from serve_apps.engine.config import AdapterRef
from serve_apps.engine.errors import CorruptAdapter, EngineError, UnknownAdapter, UnsupportedAdapter
from serve_apps.engine.host_tier import HostTier
from tests.serve_apps.engine.engine_cases import ref

Q0_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q0_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def read(adapter: AdapterRef, spec: ModelSpec) -> Any:
    return read_adapter(adapter, spec, dtype=torch.float32)


@pytest.fixture
def spec(tiny_base: Path) -> ModelSpec:
    return read_spec(tiny_base)


@pytest.fixture
def copy(strong_adapters: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the rank-1 q/v adapter, to spoil."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes((strong_adapters["strong-r1-qv"] / name).read_bytes())
    return folder


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, **values}))


def set_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "a bias on LoRA B"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"trainable_token_indices": [3]}, "trained token embeddings"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"fan_in_fan_out": True}, "transposed"),
        ({"invented_next_year": {"depth": 2}}, "invented_next_year"),
        ({"target_modules": ["lm_head"]}, "names no linear"),
    ],
)
def test_unsupported_is_named_with_what_works(
    values: dict[str, Any], message: str, copy: Path, spec: ModelSpec
) -> None:
    set_config(copy, **values)
    with pytest.raises(UnsupportedAdapter, match=message) as caught:
        read(ref(copy), spec)
    assert "what works: LoRA A and B on any of q_proj" in str(caught.value)


def test_embedding_lora_is_unsupported(copy: Path, spec: ModelSpec) -> None:
    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    set_tensors(copy, lambda tensors: tensors.update({name: torch.ones(1, 448)}))
    with pytest.raises(UnsupportedAdapter, match="lora_embedding_A"):
        read(ref(copy), spec)


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 0] = value

    return change


SPOILED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nan": (set_value(Q0_A, float("nan")), "q_proj.lora_A.weight .* not finite"),
    "infinite": (set_value(Q0_B, float("inf")), "q_proj.lora_B.weight .* not finite"),
    "no B": (lambda tensors: tensors.pop(Q0_B), "lacks the tensor .*q_proj.lora_B"),
    "no module": (lambda tensors: [tensors.pop(Q0_A), tensors.pop(Q0_B)], "layer 0 q_proj is not in the file"),
    "wrong shape": (lambda tensors: tensors.update({Q0_A: torch.ones(2, 64)}), r"q_proj.lora_A.weight .* \[2, 64\]"),
    "integers": (lambda tensors: tensors.update({Q0_A: torch.ones(1, 64, dtype=torch.int32)}), "q_proj.lora_A"),
    "not targeted": (
        lambda tensors: tensors.update({Q0_A.replace("q_proj", "k_proj"): torch.ones(1, 64)}),
        "k_proj is in the file but not targeted",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_corrupt_tensors_are_named(name: str, copy: Path, spec: ModelSpec) -> None:
    change, message = SPOILED[name]
    set_tensors(copy, change)
    with pytest.raises(CorruptAdapter, match=message):
        read(ref(copy), spec)


@pytest.mark.parametrize(
    "head", ["", "{", "[1]", '{"a": 1}', '{"a": {"data_offsets": "x"}}', '{"a": {"data_offsets": []}}']
)
def test_a_file_that_is_not_safetensors_is_corrupt(head: str, copy: Path, spec: ModelSpec) -> None:
    (copy / WEIGHTS_FILE).write_bytes(len(head).to_bytes(8, "little") + head.encode())
    for read_some in (read, inspect_adapter):
        with pytest.raises(CorruptAdapter, match=f"{WEIGHTS_FILE} is not a whole safetensors file"):
            read_some(ref(copy), spec)


def test_a_truncated_file_is_corrupt_and_the_tensor_that_it_ends_in_is_named(copy: Path, spec: ModelSpec) -> None:
    content = (copy / WEIGHTS_FILE).read_bytes()
    head_size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + head_size])
    head.pop("__metadata__", None)
    for name, entry in head.items():
        (copy / WEIGHTS_FILE).write_bytes(content[: 8 + head_size + entry["data_offsets"][0] + 4])
        for read_some in (read, inspect_adapter):
            with pytest.raises(CorruptAdapter, match=f"it ends inside tensor {name}"):
                read_some(ref(copy), spec)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_tensor_of_rank_zero_is_named(side: str, copy: Path, spec: ModelSpec) -> None:
    shape = {"A": (0, 64), "B": (64, 0)}[side]
    set_tensors(copy, lambda tensors: tensors.update({Q0_A.replace("lora_A", f"lora_{side}"): torch.ones(shape)}))
    with pytest.raises(CorruptAdapter, match=rf"q_proj.lora_{side}.weight .*0"):
        read(ref(copy), spec)


def test_rank_zero_is_corrupt(copy: Path, spec: ModelSpec) -> None:
    set_config(copy, rank_pattern={"q_proj": 0})
    with pytest.raises(CorruptAdapter, match=r"rank 0 of model\.layers\.\d\.self_attn\.q_proj"):
        read(ref(copy), spec)


def test_a_rank_beyond_the_kernels_is_unsupported(copy: Path, spec: ModelSpec) -> None:
    set_config(copy, rank_pattern={"q_proj": 513})
    with pytest.raises(UnsupportedAdapter, match=r"rank 513 .* is over 512"):
        read(ref(copy), spec)


@pytest.mark.parametrize("config", ["not json", "[]", ""])
def test_a_config_that_is_no_object_is_corrupt(config: str, copy: Path, spec: ModelSpec) -> None:
    (copy / CONFIG_FILE).write_text(config)
    with pytest.raises(CorruptAdapter, match=CONFIG_FILE):
        read(ref(copy), spec)


def test_all_linear_names_the_seven(spec: ModelSpec, strong_adapters: dict[str, Path], tmp_path: Path) -> None:
    """PEFT writes the names out when it saves; a config written by hand may say it in one word."""
    folder = strong_adapters["strong-r8-all"]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    set_config(tmp_path, target_modules="all-linear")
    assert torch.equal(read(ref(tmp_path), spec).data, read(ref(folder), spec).data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "1"),
        ("r", None),
        ("r", True),
        ("r", 1.0),
        ("lora_alpha", "7"),
        ("lora_alpha", float("inf")),
        ("lora_alpha", float("nan")),
        ("use_rslora", "no"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"(": 1}),
        ("rank_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", 7),
        ("target_modules", "("),
        ("target_modules", [1]),
        ("exclude_modules", 5),
        ("layers_to_transform", "1"),
        ("layers_pattern", ["("]),
    ],
)
def test_a_field_that_cannot_be_followed_is_named(name: str, value: Any, copy: Path, spec: ModelSpec) -> None:
    """By an error of the engine, at once: whoever adds a request must be able to tell it from a bug."""
    set_config(copy, **{name: value})
    for read_some in (read, inspect_adapter):
        with pytest.raises(CorruptAdapter, match=rf"^{name}=.*{CONFIG_FILE} is not "):
            read_some(ref(copy), spec)


def test_missing_weights_are_corrupt_and_missing_folders_unknown(copy: Path, spec: ModelSpec) -> None:
    (copy / WEIGHTS_FILE).unlink()
    with pytest.raises(CorruptAdapter, match=WEIGHTS_FILE):
        read(ref(copy), spec)
    with pytest.raises(UnknownAdapter):
        read(ref(copy / "nowhere"), spec)


def write_manifest(folder: Path) -> str:
    """Write a store's manifest and return the directory's digest."""
    files = [
        {"path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "bytes": 0}
        for name in (CONFIG_FILE, WEIGHTS_FILE)
    ]
    content = json.dumps({"v": 1, "kind": "adapter", "meta": {}, "files": files}).encode()
    (folder / "manifest.json").write_bytes(content)
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_a_stored_adapter_is_held_against_its_manifest(copy: Path, spec: ModelSpec) -> None:
    digest = write_manifest(copy)
    assert read(AdapterRef(digest, str(copy)), spec).digest == digest
    with pytest.raises(CorruptAdapter, match="does not hash"):
        read(AdapterRef("sha256:" + "0" * 64, str(copy)), spec)
    set_tensors(copy, set_value(Q0_A, 3.0))
    with pytest.raises(CorruptAdapter, match=f"{WEIGHTS_FILE} has changed since it was stored"):
        read(AdapterRef(digest, str(copy)), spec)


def test_a_refusal_evicts_nothing(copy: Path, spec: ModelSpec, strong_adapters: dict[str, Path]) -> None:
    """The pool is full to the byte when an unknown, a corrupt and an unsupported adapter are asked for."""
    resident = ref(strong_adapters["strong-r1-qv"])
    num_bytes = read(resident, spec).num_bytes
    pool = AdapterPool(
        HostTier(lambda adapter: read(adapter, spec), budget_bytes=num_bytes),
        num_layers=spec.num_layers,
        budget_bytes=num_bytes,
        max_adapters=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.load(resident)
    unsupported = AdapterRef("sha256:unsupported", str(copy))
    set_config(copy, use_dora=True)
    for bad in (AdapterRef("sha256:unknown", "nowhere"), unsupported, AdapterRef("sha256:corrupt", str(copy / ".."))):
        with pytest.raises(EngineError):
            pool.acquire(bad)
        pool.check_integrity()
        assert pool.stats()["adapters_resident"] == [resident.digest]
    assert pool.stats()["adapter_evictions"] == 0


def test_memory_is_true_rank(spec: ModelSpec, strong_adapters: dict[str, Path]) -> None:
    """An adapter takes exactly the bytes of its own A and B: no padding to a common rank."""
    for folder in strong_adapters.values():
        num_values = sum(tensor.numel() for tensor in load_file(folder / WEIGHTS_FILE).values())
        assert read(ref(folder), spec).num_bytes == 4 * num_values


def test_the_layout_is_the_kernels_layout(spec: ModelSpec, strong_adapters: dict[str, Path]) -> None:
    """Every A and scaled B^T at its offset, layer after layer; A rows of linears with one input are neighbours."""
    for folder in strong_adapters.values():
        packed, tensors = read(ref(folder), spec), load_file(folder / WEIGHTS_FILE)
        scaling = 2.0  # build_tiny_adapter: alpha = 2 * rank
        end = 0
        for layer in range(spec.num_layers):
            for group in GROUPS.values():
                sides: dict[str, list[torch.Tensor]] = {"A": [], "B": []}
                for linear in group:
                    block = "self_attn" if linear in ATTENTION else "mlp"
                    name = f"base_model.model.model.layers.{layer}.{block}.{linear}"
                    a, b = (tensors.get(f"{name}.lora_{side}.weight") for side in "AB")
                    a_start, b_start, rank = packed.table[layer, MODULES.index(linear)].tolist()
                    assert rank == (0 if a is None else len(a))
                    if a is not None and b is not None:
                        assert torch.equal(packed.data[a_start : a_start + a.numel()].view_as(a), a)
                        assert torch.equal(packed.data[b_start : b_start + b.numel()].view(rank, -1), b.t() * scaling)
                        sides["A"].append(a)
                        sides["B"].append(b.t() * scaling)
                expected = torch.cat([part.flatten() for part in sides["A"] + sides["B"]] or [torch.empty(0)])
                assert torch.equal(packed.data[end : end + len(expected)], expected)
                end += len(expected)
            assert packed.layer_ends[layer] == end
        assert end == packed.data.numel()
