"""The rotary embedding: frequencies of every kind of scaling, computed step by step as transformers computes them.

Shapes: S positions, R rotated channels of a head.
"""

from __future__ import annotations

import functools
import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_steel.config.family import head_width
from megatron_steel.config.schema import ModelConfig
from megatron_steel.runtime import device


def plain_frequencies(base: float | Tensor, channels: int) -> Tensor:
    """base^(-2i / R) for i < R / 2, fp32 (Su et al. 2021, section 3.2.2)."""
    return 1.0 / (base ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels))


def llama3_frequencies(size: ModelConfig, channels: int) -> Tensor:
    """Slow frequencies divided by the factor, fast ones kept, a straight line between (Llama 3.1's release)."""
    plain, original = plain_frequencies(size.rotary_base, channels), size.rope_original_max_position_embeddings
    low, high, factor = size.rope_low_freq_factor, size.rope_high_freq_factor, size.rope_scaling_factor
    wavelength = 2 * math.pi / plain
    slow, fast = wavelength > original / low, wavelength < original / high
    scaled = torch.where(slow, plain / factor, plain)
    share = (original / wavelength - low) / (high - low)
    between = (1 - share) * scaled / factor + share * scaled
    return torch.where(fast | slow, scaled, between)


def yarn_frequencies(size: ModelConfig, channels: int) -> Tensor:
    """Divided by the factor below one number of turns, kept above another (Peng et al. 2023, arXiv:2309.00071, 3.2)."""

    def channel(turns: float) -> float:
        """The channel that turns this often over the original length."""
        length = size.rope_original_max_position_embeddings / (turns * 2 * math.pi)
        return channels * math.log(length) / (2 * math.log(size.rotary_base))

    begin, end = channel(size.rope_beta_fast), channel(size.rope_beta_slow)
    if size.rope_truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, channels - 1)
    end += 0.001 if begin == end else 0.0
    kept = 1 - ((torch.arange(channels // 2, dtype=torch.float32) - begin) / (end - begin)).clamp(0, 1)
    periods = size.rotary_base ** (torch.arange(0, channels, 2).float() / channels)
    return 1.0 / (size.rope_scaling_factor * periods) * (1 - kept) + 1.0 / periods * kept


def dynamic_frequencies(size: ModelConfig, channels: int, length: int) -> Tensor:
    """A larger base beyond the declared length, so that the slowest frequency is divided by what exceeds it."""
    longest, factor = size.max_position_embeddings, size.rope_scaling_factor
    if length <= longest:
        return plain_frequencies(size.rotary_base, channels)
    # transformers has the length in a tensor there, so that all of this is in fp32.
    excess = factor * torch.tensor(length) / longest - (factor - 1)
    return plain_frequencies(size.rotary_base * excess ** (channels / (channels - 2)), channels)


def frequencies(size: ModelConfig, length: int) -> Tensor:
    """Angle per position of each pair of channels, fp32 [R / 2]; ``length`` of the sequence matters to dynamic only."""
    channels = int(head_width(size) * size.rotary_percent)
    kind = size.rope_scaling_type if size.use_rope_scaling else "default"
    if kind == "llama3":
        return llama3_frequencies(size, channels)
    if kind == "yarn":
        return yarn_frequencies(size, channels)
    if kind == "dynamic":
        return dynamic_frequencies(size, channels, length)
    plain = plain_frequencies(size.rotary_base, channels)
    return plain / size.rope_scaling_factor if kind == "linear" else plain


def attention_factor(size: ModelConfig) -> float:
    """What cosine and sine are multiplied with: 1 but for YaRN (arXiv:2309.00071, 3.4)."""
    if not size.use_rope_scaling or size.rope_scaling_type != "yarn":
        return 1.0
    if size.rope_attention_factor is not None:
        return size.rope_attention_factor

    def scale(coefficient: float) -> float:
        factor = size.rope_scaling_factor
        return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0

    if size.rope_mscale and size.rope_mscale_all_dim:
        return scale(size.rope_mscale) / scale(size.rope_mscale_all_dim)
    return scale(1.0)


class RotaryTable(RotaryEmbedding):
    """megatron-core's rotary embedding with our frequencies; each rank has the whole table.

    Where layers with a window have a base of their own, both tables lie side by side in the last axis.
    """

    def __init__(self, size: ModelConfig) -> None:
        """No parameters are created."""
        super().__init__(head_width(size), size.rotary_percent, use_cpu_initialization=True)
        self.size = size

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [S, 1, 1, R] of ``max_seq_len`` positions from ``offset`` on, or [S, 1, 1, 2R] with a second base."""
        positions = torch.arange(offset, offset + max_seq_len, dtype=torch.float32, device=device.device())
        tables = [frequencies(self.size, offset + max_seq_len)]
        if self.size.rotary_base_local is not None:
            tables.append(plain_frequencies(self.size.rotary_base_local, head_width(self.size)))
        angles = [torch.outer(positions, device.upload(table, positions.device)) for table in tables]
        return torch.cat([half for each in angles for half in (each, each)], -1)[:, None, None, :]


@functools.lru_cache(maxsize=4)
def table_of(angles: Tensor, local: bool) -> Tensor:
    """One of the two tables that lie side by side; remembered so that all layers get the same tensor."""
    return angles.chunk(2, -1)[int(local)].contiguous()


def add_rotary_table(model: GPTModel, size: ModelConfig) -> None:
    """Give a model our table instead of megatron-core's, whose only scaling is Llama 3.1's."""
    if size.position_embedding_type != "rope" or size.multi_latent_attention:
        return
    model.rotary_pos_emb = RotaryTable(size)
    if (factor := attention_factor(size)) != 1.0:
        # megatron-core's attention reads these for the factor of cosine and sine: 0.1 * mscale * log(scale) + 1.
        model.config.yarn_rotary_scaling_factor = math.e
        model.config.yarn_mscale = 10 * (factor - 1.0)
        model.config.yarn_mscale_all_dim = 0.0
