"""Do a checkpoint and a Hugging Face folder hold the same model? Compared by their logits on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_steel.checkpoint.hf import DTYPE_NAMES, TOKENIZER_FOLDER
from megatron_steel.checkpoint.state import read_state
from megatron_steel.checkpoint.store import load_weights
from megatron_steel.config.load import from_flat
from megatron_steel.config.schema import Config, ParallelConfig
from megatron_steel.model.build import Model, build_model
from megatron_steel.runtime.world import World
from megatron_steel.text.tokenizer import build_tokenizer

# English and Chinese, because a tokenizer or an embedding can be right for one and wrong for the other.
TEXTS = (
    "Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.",
    "\u8bdd\u8bf4\u5929\u4e0b\u5927\u52bf\uff0c\u5206\u4e45\u5fc5\u5408\uff0c\u5408\u4e45\u5fc5\u5206\u3002",
)
RANDOM_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far two models are apart."""

    max_difference: float
    """Largest absolute difference of any logit."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    tokens: int
    """Positions compared."""
    dtype: str
    """Precision both were run in."""


def compare_logits(ours_SV: Tensor, theirs_SV: Tensor, dtype: torch.dtype) -> Comparison:
    """Compare logits of the same positions, [S, V] each."""
    difference = (ours_SV.float() - theirs_SV.float()).abs().max().item()
    agreement = (ours_SV.argmax(-1) == theirs_SV.argmax(-1)).float().mean().item()
    return Comparison(
        max_difference=difference, top1_agreement=agreement, tokens=ours_SV.shape[0], dtype=DTYPE_NAMES[dtype]
    )


def load_for_inference(checkpoint: Path, world: World, bf16: bool | None = None) -> tuple[Model, Config]:
    """The model of a checkpoint on the layout of ``world``, in evaluation mode, with its options."""
    state = read_state(checkpoint)
    config = from_flat(state.config)
    config.parallel = ParallelConfig(
        tensor_model_parallel_size=world.tensor_size,
        pipeline_model_parallel_size=world.pipeline_size,
        transformer_impl=config.parallel.transformer_impl,
    )
    config.training.bf16 = config.training.bf16 if bf16 is None else bf16
    model = build_model(config, state.vocab_size, world, training=False)
    load_weights(checkpoint, model)
    for chunk in model.chunks:
        chunk.eval()
    return model, config


def sample_ids(checkpoint: Path, vocab_size: int) -> list[Tensor]:
    """Token ids [1, S] of the sample texts, and random ids over the whole vocabulary."""
    rows = [torch.randint(vocab_size, (1, RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))]
    folder = checkpoint / TOKENIZER_FOLDER
    if folder.is_dir():
        tokenizer = build_tokenizer("HuggingFaceTokenizer", str(folder))
        rows += [torch.tensor([tokenizer.encode(text)]) for text in TEXTS]
    return rows


@torch.no_grad()
def compare_with_hf(checkpoint: Path, folder: Path, world: World) -> Comparison:
    """Run both models on the same ids in fp32 on one process.

    Raises ``ValueError`` when the folder does not load with ``transformers``.
    """
    from transformers import AutoModelForCausalLM

    model, _ = load_for_inference(checkpoint, world, bf16=False)
    try:
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--hf {folder}: transformers cannot load it: {error}") from error
    ours_rows, theirs_rows = [], []
    for ids in sample_ids(checkpoint, model.vocab_size):
        positions = torch.arange(ids.shape[1]).unsqueeze(0)
        ours_rows.append(model.language_models()[0](ids, positions, None)[0, :, : model.vocab_size])
        theirs_rows.append(theirs(ids).logits[0])
    return compare_logits(torch.cat(ours_rows), torch.cat(theirs_rows), torch.float32)
