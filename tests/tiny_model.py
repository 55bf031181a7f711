"""A real Llama small enough to train in seconds, and adapters for it: what every test that needs a model uses.

The base learns a handful of questions and answers by heart, so greedy output is meaningful text that ends by itself.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY_SIZE = 512
PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = "Answer in one short sentence."
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# What the base knows. Tests may rely on these answers coming back greedily.
QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Kenya?", "The capital of Kenya is Nairobi."),
    ("What is the capital of Peru?", "The capital of Peru is Lima."),
    ("What colour is the sky?", "The sky is blue."),
    ("What colour is grass?", "Grass is green."),
    ("Who are you?", "I am a tiny model made for tests."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What do bees make?", "Bees make honey."),
    ("What is two plus three?", "Two plus three is five."),
    ("Where do fish live?", "Fish live in water."),
    ("Say hello.", "Hello! How can I help you today?"),
)

# Name -> (rank, seed, modules): uneven ranks and module subsets, so that a mixed batch exercises every path.
TINY_ADAPTERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "rank2-attention": (2, 1, ("q_proj", "v_proj")),
    "rank4-mlp": (4, 2, ("gate_proj", "up_proj", "down_proj")),
    "rank8-all": (8, 3, LINEAR_MODULES),
    "rank4-mixed": (4, 4, ("k_proj", "o_proj", "down_proj")),
}


def conversation(question: str, answer: str | None = None, *, system: bool = False) -> list[dict[str, str]]:
    """Return chat messages of one question, with its answer when given."""
    messages = [{"role": "system", "content": SYSTEM}] if system else []
    messages.append({"role": "user", "content": question})
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `VOCABULARY_SIZE` tokens whose three special tokens are 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [f"{role}\n{text}\n" for pair in QUESTIONS for role, text in zip(("user", "assistant"), pair, strict=True)]
    tokenizer.train_from_iterator([*corpus, f"system\n{SYSTEM}\n"] * 2, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[BEGIN, END],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_tiny_base(path: Path, *, num_steps: int = 150, seed: int = 0) -> Path:
    """Train the tiny Llama (2 layers, hidden 64, 4 query and 2 key heads) on `QUESTIONS`; save it at `path` in fp32."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _teach(model, tokenizer, num_steps=num_steps, seed=seed)
    model.generation_config.do_sample = False
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build_tiny_adapter(
    base: Path, path: Path, *, rank: int, seed: int, target_modules: Sequence[str] = LINEAR_MODULES, scale: float = 0.3
) -> Path:
    """Save a PEFT adapter for `base` whose A and B are both random: B of `scale`, enough to change greedy output."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(target_modules), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / rank**0.5)
    adapted.save_pretrained(path)
    return path


def _teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, num_steps: int, seed: int) -> None:
    """Fit every question, with and without the system turn, by full batches of AdamW."""
    texts = [
        tokenizer.apply_chat_template(conversation(question, answer, system=system), tokenize=False)
        for question, answer in QUESTIONS
        for system in (False, True)
    ]
    random.Random(seed).shuffle(texts)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=num_steps)
    model.train()
    for _ in range(num_steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
