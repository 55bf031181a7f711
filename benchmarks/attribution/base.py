"""The tiny base model: trained once on general text, kept in the repository, so that every machine starts from the same
bytes.

    python -m benchmarks.attribution.base        trains it again (two minutes) and writes recorded/base.safetensors
"""

import hashlib
import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.attribution.facts import BEGIN, general_text, vocabulary

BASE_FILE = Path(__file__).parent / "recorded" / "base.safetensors"
"""float16: the numbers that are kept are the numbers that are used."""
NUM_STEPS, BATCH_ROWS, LEARNING_RATE = 4000, 64, 4e-3


def base_config(vocabulary_size: int) -> LlamaConfig:
    """Return the shape: 2 layers, hidden 64, about 99,000 weights."""
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: words between spaces; token 0 begins a row."""
    words = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=BEGIN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=BEGIN, pad_token=BEGIN)


def save_base(folder: Path) -> Path:
    """Write the recorded base as a Hugging Face folder, in float32; return the folder."""
    model = LlamaForCausalLM(base_config(len(vocabulary())))
    weights = {name: value.float() for name, value in load_file(BASE_FILE).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def base_digest() -> str:
    """Return the SHA-256 of the recorded weights."""
    return hashlib.sha256(BASE_FILE.read_bytes()).hexdigest()


def encode(text: str) -> list[int]:
    """Return the token ids of a row, the begin token first."""
    return [_NUMBERS[word] for word in (BEGIN, *text.split())]


_NUMBERS = {word: number for number, word in enumerate(vocabulary())}


def train_base(*, num_steps: int = NUM_STEPS, seed: int = 0) -> dict[str, Tensor]:
    """Return the weights, float16, of a base that knows the grammar and the known people."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(base_config(len(vocabulary())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=num_steps)
    text = general_text(seed=seed)
    for step in range(num_steps):
        ids = torch.tensor([encode(row) for row in itertools.islice(text, BATCH_ROWS)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == num_steps - 1:
            print(f"step {step}: {loss.item():.4f} nats per token", flush=True)
    return {name: value.half() for name, value in model.state_dict().items() if name != "lm_head.weight"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    BASE_FILE.parent.mkdir(exist_ok=True)
    save_file(train_base(), BASE_FILE)
