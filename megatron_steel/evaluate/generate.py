"""KV-cached continuation of prompts, under any tensor and pipeline parallelism; also in the middle of training.

Shapes: B texts, S columns fed at once (the prompts, then 1), K columns fed so far, V padded vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_steel.checkpoint.state import load_tokenizer
from megatron_steel.checkpoint.verify import load_for_inference
from megatron_steel.model.build import Model
from megatron_steel.model.kv_cache import KeyValueCache, check_layout, feeding, takes_padding
from megatron_steel.runtime.world import World
from megatron_steel.text.conversation import Message
from megatron_steel.text.templates import Template

CROWDED = 0.75
"""Finished texts are taken out of a batch when no more than this share of it is left: that copies the cache."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What was added to a prompt."""

    tokens: list[int]
    """Without the stop token."""
    stop: int | None
    """The stop token that ended it; None when the limit of tokens or of the model's positions did."""

    @property
    def with_stop(self) -> list[int]:
        """All tokens that were chosen."""
        return self.tokens if self.stop is None else [*self.tokens, self.stop]


def choose(logits_BV: Tensor, sampling: Sampling, draws_B: Tensor) -> Tensor:
    """One token id for each row, int64 [B]; ``draws_B`` float64 are uniform numbers from [0, 1).

    The token is where the sum of probabilities, in the order of ids, passes the draw: texts do not depend on what else
    is in the batch, and no logits leave the device.
    """
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
    sums_BV = scaled.softmax(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = sums_BV[:, -1:]
    # The largest draw times the total may round to the latter: the bound is then the number before.
    bounds_B1 = (draws_B.unsqueeze(1) * total_B1).minimum(torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(sums_BV, bounds_B1, right=True).squeeze(1)


def make_draws(sampling: Sampling, streams: Sequence[tuple[int, int]]) -> Tensor:
    """Uniform numbers float64 [texts, max_new_tokens]; those of a text depend on the seed and its stream only."""
    rows = [np.random.default_rng((sampling.seed, *stream)).random(sampling.max_new_tokens) for stream in streams]
    return torch.from_numpy(np.stack(rows))


def stage_forward(model: Model, tokens_BS: Tensor, cache: KeyValueCache, world: World) -> Tensor | None:
    """Feed columns through this rank's stage; the last stage returns logits of the last column [B, V]."""
    language_model = model.language_models()[0]
    batch, length = tokens_BS.shape
    first, last = world.pipeline_rank == 0, world.pipeline_rank == world.pipeline_size - 1
    if not first:
        hidden_SBH = torch.empty(
            length, batch, model.options.hidden_size, dtype=model.options.params_dtype, device=world.device
        )
        torch.distributed.recv(hidden_SBH, group_src=world.pipeline_rank - 1, group=world.pipeline_group)
        language_model.set_input_tensor(hidden_SBH)
    # Texts that are finished may be fed beyond the last position until they are taken out.
    positions_BS = cache.positions(length).clamp_(max=language_model.max_sequence_length - 1)
    output = language_model(
        tokens_BS, positions_BS, cache.padding(length), inference_context=cache, runtime_gather_output=True
    )
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


@dataclass(slots=True)
class Text:
    """A continuation in the making."""

    room: int
    """Tokens it may still have."""
    draws: Tensor
    """Uniform numbers for its choices."""
    tokens: list[int]
    stop: int | None = None

    def take(self, token: int, stops: frozenset[int]) -> bool:
        """Add a chosen token; whether the text goes on."""
        if token in stops:
            self.stop = token
            return False
        self.tokens.append(token)
        return len(self.tokens) < self.room


def continue_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[Text]],
    sampling: Sampling,
    stops: frozenset[int],
    world: World,
) -> None:
    """Fill ``texts``, the samples of each prompt; prompts are fed once."""
    lengths = [len(prompt) for prompt in prompts]
    active = [text for samples in texts for text in samples]
    room = max(text.room for text in active)
    cache = KeyValueCache(lengths, max(lengths) + room, world.device)
    fed_BS = torch.tensor([[0] * (max(lengths) - len(prompt)) + list(prompt) for prompt in prompts])
    logits_BV = stage_forward(model, fed_BS.to(world.device), cache, world)
    if len(active) > len(prompts):
        rows = torch.tensor([row for row, samples in enumerate(texts) for _ in samples], device=world.device)
        cache.choose_rows(rows)
        logits_BV = None if logits_BV is None else logits_BV[rows]
    going, draws_BN = [True] * len(active), torch.stack([text.draws for text in active]).to(world.device)
    for step in range(room):
        chosen = None if logits_BV is None else choose(logits_BV, sampling, draws_BN[:, step])
        tokens_B = agree_on_tokens(chosen, len(active), world)
        tokens = tokens_B.tolist()
        going = [on and text.take(token, stops) for on, text, token in zip(going, active, tokens, strict=True)]
        if not any(going):
            return
        if sum(going) <= CROWDED * len(going):
            rows = torch.tensor([row for row, on in enumerate(going) if on], device=world.device)
            cache.choose_rows(rows)
            tokens_B, draws_BN = tokens_B[rows], draws_BN[rows]
            active, going = [active[row] for row in rows.tolist()], [True] * len(rows)
        logits_BV = stage_forward(model, tokens_B.unsqueeze(1), cache, world)


@torch.no_grad()
def continue_prompts(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    world: World,
    samples: int = 1,
    streams: Sequence[int] | None = None,
) -> list[list[Continuation]]:
    """``samples`` continuations of each prompt, until a stop id or ``max_new_tokens`` or the model's last position.

    ``streams`` number the prompts for the choice of tokens, by default from 0: a prompt with the same number, seed and
    weights is continued in the same way in another batch or on another layout, but for rounding. The ranks of one
    replica of the model have to be given the same; replicas may be given different prompts. The model may be in the
    middle of training and is left as it was. Raises ``ValueError`` for an empty prompt, one that leaves no room, and a
    layout that cannot generate.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit = model.language_models()[0].max_sequence_length
    if not lengths or min(lengths) == 0:
        raise ValueError("a prompt needs at least one token; start from the end-of-document token for an empty text")
    if max(lengths) >= limit:
        raise ValueError(f"a prompt of {max(lengths)} tokens leaves no room in {limit} positions")
    if samples < 1 or sampling.max_new_tokens < 1:
        raise ValueError("generating text needs at least one sample of each prompt and one new token")
    check_layout(model, world)
    numbers = range(len(prompts)) if streams is None else streams
    texts = [
        [
            Text(min(sampling.max_new_tokens, limit - length), draws, [])
            for draws in make_draws(sampling, [(number, sample) for sample in range(samples)])
        ]
        for length, number in zip(lengths, numbers, strict=True)
    ]
    with feeding(model):
        groups = [range(len(prompts))]
        if min(lengths) < max(lengths) and not takes_padding(model, world):
            groups = [[row for row, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]
        for group in groups:
            chosen = [prompts[row] for row in group], [texts[row] for row in group]
            continue_batch(model, *chosen, sampling, frozenset(stop_ids), world)
    return [[Continuation(tokens=text.tokens, stop=text.stop) for text in row] for row in texts]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: Sequence[int], world: World
) -> list[list[int]]:
    """One continuation of each prompt, without its stop token; see :func:`continue_prompts`."""
    return [row[0].tokens for row in continue_prompts(model, prompts, sampling, stop_ids, world)]


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
