"""A tiny model in a Hugging Face folder, and conversations of many lengths to finetune it on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[2] / "examples" / "data" / "tokenizer"
WORDS = "the sea a river of stone light and water runs down hill to town where people sing old songs at night".split()
SEQ_LENGTH = 64


def write_model(folder: Path, **changes: Any) -> str:
    """A random Llama with the bundled tokenizer; returns the folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_chats(path: Path, rows: int, seed: int = 0, longest: int = 5) -> str:
    """Conversations of one to three rounds, a third with a system turn; returns the path."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    lines = []
    for number in range(rows):
        messages = [{"role": "system", "content": text()}] if number % 3 == 0 else []
        for _ in range(rng.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_pairs(path: Path, rows: int, seed: int = 0, judged: bool = False) -> str:
    """Prompts with a chosen and a rejected answer, or one that is judged; returns the path."""
    rng = random.Random(seed)

    def text(longest: int = 5) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    lines = []
    for number in range(rows):
        prompt = [{"role": "system", "content": text()}] if number % 3 == 0 else []
        prompt.append({"role": "user", "content": text()})
        good, bad = ([{"role": "assistant", "content": text(9)}] for _ in range(2))
        row = {"completion": good, "label": number % 3 != 1} if judged else {"chosen": good, "rejected": bad}
        lines.append(json.dumps({"prompt": prompt, **row}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def write_prompts(path: Path, rows: int, seed: int = 0) -> str:
    """Prompts of several lengths, as text or turns, with a number as the answer; returns the path."""
    rng, lines = random.Random(seed), []
    for number in range(rows):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
        turns = [{"role": "system", "content": text}, {"role": "user", "content": text}]
        lines.append(json.dumps({"prompt": text if number % 2 else turns, "answer": number}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def fickle_reward(response: str, answer: int) -> float:
    """Another number for nearly every other response: what was sampled is seen in it."""
    return (sum(response.encode()) + 7 * answer) % 11 / 10


def chat_options(model: str, data: str, **changes: Any) -> dict[str, Any]:
    """Flat options of a finetune."""
    return {
        "pretrained_checkpoint": model,
        "train_data": [data],
        "chat_template": "chatml",
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 4,
        "lr": 2e-3,
        # Adam makes steps of equal size from gradients that are nothing but rounding, where eps is smaller still.
        "adam_eps": 1e-5,
        "max_epochs_per_source": 20.0,
        "make_vocab_size_divisible_by": 16,
        **changes,
    }
