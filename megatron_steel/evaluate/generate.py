"""KV-cached continuation of prompts, under any tensor and pipeline parallelism.

Shapes: B prompts, S positions fed at once (the prompt, then 1), V padded vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_steel.checkpoint.state import load_tokenizer
from megatron_steel.checkpoint.verify import load_for_inference
from megatron_steel.model.build import Model
from megatron_steel.runtime.world import World
from megatron_steel.text.conversation import Message
from megatron_steel.text.templates import Template


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    """Tokens added at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Choose among this many most likely tokens; 0 for all."""
    top_p: float = 1.0
    """Choose among the fewest tokens whose probabilities reach this sum (Holtzman et al. 2020)."""
    seed: int = 0
    """Seed of the choices."""


def choose(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id for each row, int64 [B]."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    scaled = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = scaled.topk(sampling.top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = scaled.sort(descending=True)
        probabilities = ordered.softmax(-1)
        # A token stays when the sum before it has not reached top_p: the first one always stays.
        cut = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        scaled = scaled.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    return torch.multinomial(scaled.softmax(-1).cpu(), 1, generator=generator).squeeze(-1).to(logits_BV.device)


def stage_forward(model: Model, tokens_BS: Tensor, cache: StaticInferenceContext, world: World) -> Tensor | None:
    """Feed positions through this rank's stage; the last stage returns logits of the last position [B, V]."""
    language_model = model.language_models()[0]
    batch, length = tokens_BS.shape
    first, last = world.pipeline_rank == 0, world.pipeline_rank == world.pipeline_size - 1
    if not first:
        hidden_SBH = torch.empty(
            length, batch, model.options.hidden_size, dtype=model.options.params_dtype, device=world.device
        )
        torch.distributed.recv(hidden_SBH, group_src=world.pipeline_rank - 1, group=world.pipeline_group)
        language_model.set_input_tensor(hidden_SBH)
    positions = cache.sequence_len_offset + torch.arange(length, device=world.device).expand(batch, -1)
    output = language_model(tokens_BS, positions, None, inference_context=cache, runtime_gather_output=True)
    cache.sequence_len_offset += length
    if not last:
        torch.distributed.send(output.contiguous(), group_dst=world.pipeline_rank + 1, group=world.pipeline_group)
        return None
    return output[:, -1, : model.vocab_size]


def agree_on_tokens(tokens_B: Tensor | None, batch: int, world: World) -> Tensor:
    """The last stage's choice on every rank that shares this replica of the model, int64 [B].

    Logits are equal to the bit on the tensor-parallel ranks (they are gathered), so only stages have to be told.
    """
    if world.pipeline_size == 1:
        assert tokens_B is not None
        return tokens_B
    if tokens_B is None:
        tokens_B = torch.empty(batch, dtype=torch.int64, device=world.device)
    torch.distributed.broadcast(tokens_B, group_src=world.pipeline_size - 1, group=world.pipeline_group)
    return tokens_B


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    world: World,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until a stop id (which is not returned) or ``max_new_tokens``.

    Prompts of different lengths share a batch: all are fed up to the shortest one's end, then one position at a time,
    where longer prompts keep their own tokens. ``on_token`` sees each new column of ids. Raises ``ValueError`` for an
    empty prompt or more positions than the model is declared for.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit = model.language_models()[0].max_sequence_length
    if not lengths or min(lengths) == 0:
        raise ValueError("a prompt needs at least one token; start from the end-of-document token for an empty text")
    total = min(max(lengths) + sampling.max_new_tokens, limit)
    if max(lengths) >= limit:
        raise ValueError(f"a prompt of {max(lengths)} tokens leaves no room in {limit} positions")
    for chunk in model.chunks:
        chunk.eval()
    batch = len(prompts)
    tokens = torch.zeros(batch, total, dtype=torch.int64, device=world.device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    ends = torch.tensor(lengths, device=world.device)
    generator = torch.Generator().manual_seed(sampling.seed)
    stops = torch.tensor(list(stop_ids), dtype=torch.int64, device=world.device)
    cache = StaticInferenceContext(batch, total)
    done = torch.zeros(batch, dtype=torch.bool, device=world.device)
    final = torch.full((batch,), total, device=world.device)
    fed = 0
    for position in range(min(lengths), total):
        logits_BV = stage_forward(model, tokens[:, fed:position], cache, world)
        fed = position
        chosen = agree_on_tokens(None if logits_BV is None else choose(logits_BV, sampling, generator), batch, world)
        chosen = torch.where(position < ends, tokens[:, position], chosen)
        tokens[:, position] = chosen
        if on_token is not None:
            on_token(chosen)
        stopped = (position >= ends) & ((chosen.unsqueeze(1) == stops).any(1)) & ~done
        final = torch.where(stopped, position, final)
        too_long = (position - ends + 1 >= sampling.max_new_tokens) & ~done & ~stopped
        final = torch.where(too_long, position + 1, final)
        done |= stopped | too_long
        if bool(done.all()):
            break
    return [tokens[row, lengths[row] : int(final[row])].tolist() for row in range(batch)]


class TextGenerator:
    """Texts in, texts out, with the model and the tokenizer of a checkpoint."""

    def __init__(self, checkpoint: Path, world: World) -> None:
        """Load on the layout of ``world``; ``ValueError`` when the checkpoint holds no tokenizer."""
        self.world = world
        self.tokenizer = load_tokenizer(checkpoint)
        self.model, _ = load_for_inference(checkpoint, world)

    def complete(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The continuation of each prompt; an empty prompt starts a new document."""
        stops = [] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]
        ids = [self.tokenizer.encode(prompt) or [self.tokenizer.eod_id] for prompt in prompts]
        return [self.tokenizer.decode(row) for row in generate(self.model, ids, sampling, stops, self.world)]

    def reply(self, talks: Sequence[Sequence[Message]], template: Template, sampling: Sampling) -> list[str]:
        """The next answer of each conversation, as the template writes them."""
        ids = [template.encode_prompt(messages) for messages in talks]
        return [
            self.tokenizer.decode(row) for row in generate(self.model, ids, sampling, template.stop_ids, self.world)
        ]
