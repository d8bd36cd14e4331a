"""Tiny random models of every family made by transformers, and what our engine computes with them on any layout.

The functions that start with ``work_`` run on the ranks of the pool (``join=False``: they start their own world).
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from megatron_steel.checkpoint.modeling.open_llama.configuration_open_llama import OpenLlamaConfig
from megatron_steel.checkpoint.modeling.open_llama.modeling_open_llama import OpenLlamaForCausalLM
from megatron_steel.checkpoint.modeling.steel.configuration_steel import SteelConfig
from megatron_steel.checkpoint.modeling.steel.modeling_steel import SteelForCausalLM
from megatron_steel.runtime import world as runtime
from megatron_steel.runtime.world import World

# 4 query heads over 2 key/value heads of width 20 (not 48 / 4); 100 and 133 rows pad to 128 and 256, the former to 256
# on two tensor-parallel ranks.
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 128,
    "vocab_size": 100,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Scalings that begin within the texts.
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
MSCALE_ROPE = {**YARN_ROPE, "mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 4, "truncate": False}
SHORT_LLAMA3 = {"low_freq_factor": 1.5, "high_freq_factor": 3.0, "original_max_position_embeddings": 16}
# Caps low enough to bend most scores and logits.
GEMMA3: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA2 = {"sliding_window": 8, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}
# Windows are shorter than texts and continuations, so that both cross them.
WINDOW = {"sliding_window": 8, "use_sliding_window": True}
# Heads of 16 channels, 4 of which are rotated.
NEOX = {
    "hidden_size": 64,
    "head_dim": None,
    "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.25},
    "attention_dropout": 0.0,
}
# 88 / 4 = 22 channels of each of 4 experts.
STEEL: dict[str, Any] = {
    "tie_word_embeddings": False, "mlp_type": "senet", "mlp_div_ratio": 4, "n_experts": 4, "slots_per_expert": 2,
}  # fmt: skip
# Experts of these forms get vectors of length 1, or sums over many tokens: their weights make up for it, or nothing of
# what they compute would be seen, or nothing else.
EXPERT_FACTORS = {"softmoe_v2": 0.35, "softmoe_v3": 4.0, "softmoe_causal": 4.0}
AutoConfig.register("steel", SteelConfig)
AutoModelForCausalLM.register(SteelConfig, SteelForCausalLM)
AutoConfig.register("open-llama", OpenLlamaConfig)
AutoModelForCausalLM.register(OpenLlamaConfig, OpenLlamaForCausalLM)
QWEN_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
# Latent attention: 14 channels of a head without position, 6 with, 10 of values.
LATENT = {
    "moe_intermediate_size": 24, "kv_lora_rank": 22, "qk_nope_head_dim": 14, "qk_rope_head_dim": 6, "v_head_dim": 10,
    "num_key_value_heads": 4, "head_dim": 6,
}  # fmt: skip
# Scales already inside a text of 40 tokens.
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": PLAIN_ROPE}),
    "llama-untied": (LlamaConfig, {"tie_word_embeddings": False, "vocab_size": 133, "num_key_value_heads": 4}),
    "llama-rope": (LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {**PLAIN_ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": (LlamaConfig, {"rope_parameters": {**PLAIN_ROPE, "rope_type": "dynamic", "factor": 3.0}}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": YARN_ROPE}),
    "qwen2-yarn": (Qwen2Config, {**WINDOW, "max_window_layers": 2, "rope_parameters": MSCALE_ROPE}),
    "qwen2-llama3": (Qwen2Config, {"rope_parameters": {**LLAMA3_ROPE, **SHORT_LLAMA3}}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True, "vocab_size": 133}),
    "qwen2-untied": (Qwen2Config, {"tie_word_embeddings": False, "rope_parameters": {**PLAIN_ROPE, "rope_theta": 1e6}}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "vocab_size": 133}),
    "mistral": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-window": (MistralConfig, {"tie_word_embeddings": False, "sliding_window": 8}),
    "qwen2-window": (Qwen2Config, {**WINDOW, "tie_word_embeddings": True, "max_window_layers": 2}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1, 1]}),
    "smollm3-window": (SmolLM3Config, {**WINDOW, "no_rope_layers": [1, 1, 0, 0], "tie_word_embeddings": False}),
    "gpt-neox": (GPTNeoXConfig, {**NEOX, "vocab_size": 133}),
    "gpt-neox-serial": (GPTNeoXConfig, {**NEOX, "use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "deepseek-v3": (
        DeepseekV3Config,
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 28,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "rope_parameters": YARN,
        },
    ),
    "deepseek-v2-lite": (
        DeepseekV2Config,
        {
            **LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.6},
            "vocab_size": 133,
        },
    ),
    "deepseek-v2": (
        DeepseekV2Config,
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 28,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.5,
            "topk_method": "group_limited_greedy",
        },
    ),
    "gpt-neox-yarn": (
        GPTNeoXConfig,
        {**NEOX, "head_dim": 16, "rope_parameters": {**YARN_ROPE, "partial_rotary_factor": 0.25}},
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}),
    "qwen3-moe": (Qwen3MoeConfig, {**QWEN_MOE, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe-mixed": (Qwen3MoeConfig, {**QWEN_MOE, "mlp_only_layers": [1], "vocab_size": 133, **WINDOW}),
    "olmo2": (Olmo2Config, {"vocab_size": 133, "rms_norm_eps": 1e-5}),
    "gemma2": (Gemma2Config, {**GEMMA2, "vocab_size": 133, "query_pre_attn_scalar": 30}),
    "gemma2-plain": (
        Gemma2Config,
        {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": False},
    ),
    "gemma3": (Gemma3TextConfig, {**GEMMA3, "vocab_size": 133, "query_pre_attn_scalar": 30}),
    "gemma3-linear": (
        Gemma3TextConfig,
        {
            "sliding_window": 8,
            "rope_theta": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
            "sliding_window_pattern": 3,
        },
    ),
    # Heads whose number is a power of two, and others.
    "bloom": (BloomConfig, {"layer_norm_epsilon": 1e-4}),
    "bloom-six": (BloomConfig, {"num_attention_heads": 6, "vocab_size": 133, "tie_word_embeddings": False}),
    "gpt2": (GPT2Config, {"n_inner": 88, "head_dim": None, "vocab_size": 133}),
    "open-llama": (OpenLlamaConfig, {"rms_norm_eps": 1e-6}),
    "open-llama-v2": (
        OpenLlamaConfig,
        {"use_stable_embedding": False, "shared_input_output_embedding": False, "vocab_size": 133},
    ),
    "steel": (SteelConfig, {**STEEL, "FFN_type": "softmoe_causal"}),
    "steel-swiglu": (SteelConfig, {**STEEL, "FFN_type": "softmoe_causal", "mlp_type": "raw", "slots_per_expert": 1}),
    "steel-v1": (SteelConfig, {**STEEL, "FFN_type": "softmoe_v1"}),
    "steel-dense": (SteelConfig, {**STEEL, "mlp_div_ratio": 2}),
}
NAMES = tuple(CONFIGS)
LAYOUTS: dict[str, tuple[int, int]] = {"1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2-pp2": (2, 2)}
PROMPT_LENGTHS = (3, 9, 5)
NEW_TOKENS = 32
TEXT_LENGTH = 40


def make_model(name: str, **more: Any) -> PreTrainedModel:
    """A model in which no weight has the value it would be initialised to: norms are not 1, biases not 0.

    ``more`` goes into its configuration.
    """
    kind, changes = CONFIGS[name]
    values = {**SIZES, **changes, **more}
    model = AutoModelForCausalLM.from_config(kind(**values)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if ".mlp.experts." in path:
                noise *= EXPERT_FACTORS.get(getattr(model.config, "FFN_type", ""), 1.0)
            if path.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "norm" in path or ".ln_" in path:
                # Gemma's weights are stored less 1.
                parameter.copy_((0.0 if model.config.model_type.startswith("gemma") else 1.0) + 0.3 * noise)
            else:
                # GPT-2 multiplies its matrices from the right.
                inputs = parameter.shape[0 if ".c_" in path else -1]
                parameter.copy_(noise * inputs**-0.5)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def text_ids(vocab_size: int) -> Tensor:
    """Two rows of ids that hold the first and the last row of the vocabulary, [2, TEXT_LENGTH]."""
    ids = torch.randint(vocab_size, (2, TEXT_LENGTH), generator=torch.Generator().manual_seed(1))
    ids[0, 3], ids[1, 5] = 0, vocab_size - 1
    return ids


def prompts(vocab_size: int) -> list[list[int]]:
    """Prompts of different lengths."""
    ids = text_ids(vocab_size)[0].tolist()
    return [ids[:length] for length in PROMPT_LENGTHS]


@dataclass(kw_only=True)
class Findings:
    """What a library computes with one model."""

    logits: np.ndarray
    """[2, TEXT_LENGTH, V] float32."""
    loss: float
    """Mean over the text's next tokens."""
    generated: list[list[int]] = field(default_factory=list)
    """Greedy continuations of the prompts."""
    leak: float = 0.0
    """Largest change of a logit when only a later token changes; of our engine only."""
    reach: float = 0.0
    """The same for logits of the token itself."""


@torch.no_grad()
def findings_of_transformers(model: PreTrainedModel) -> Findings:
    """The truth: transformers in fp32, each prompt on its own."""
    ids = text_ids(model.config.vocab_size)
    output = model(ids, labels=ids)
    generated = []
    for prompt in prompts(model.config.vocab_size):
        row = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        generated.append(row[0, len(prompt) :].tolist())
    return Findings(logits=output.logits.numpy(), loss=output.loss.item(), generated=generated)


@torch.no_grad()
def pipeline_logits(model: Any, ids_BS: Tensor, world: World) -> Tensor | None:
    """Logits [B, S, V] of a whole text on the last pipeline stage, None on the others."""
    module = model.language_models()[0]
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    if world.pipeline_rank > 0:
        hidden_SBH = torch.empty(ids_BS.shape[1], ids_BS.shape[0], model.options.hidden_size)
        torch.distributed.recv(hidden_SBH, group_src=world.pipeline_rank - 1, group=world.pipeline_group)
        module.set_input_tensor(hidden_SBH)
    output = module(ids_BS, positions_BS, None, runtime_gather_output=True)
    if world.pipeline_rank < world.pipeline_size - 1:
        torch.distributed.send(output.contiguous(), group_dst=world.pipeline_rank + 1, group=world.pipeline_group)
        return None
    return output[..., : model.vocab_size]


def engine_loss(model: Any, ids_BS: Tensor, world: World) -> float:
    """The loss the engine reports for a batch, through its schedules and its reduction."""
    from megatron_steel.data.batch import Batch
    from megatron_steel.objective.language import run_micro_batches
    from megatron_steel.train.step import sum_losses

    batches = []
    for row_S in ids_BS.split(1):
        tokens_BS = row_S[:, :-1].contiguous()
        batch = Batch(
            tokens_BS=tokens_BS,
            labels_BS=row_S[:, 1:].contiguous(),
            loss_mask_BS=torch.ones(tokens_BS.shape),
            position_ids_BS=torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS),
            sources_B=np.zeros(1, np.int64),
            valid_tokens=tokens_BS.numel(),
        )
        batches.append(batch)
    count = sum(batch.valid_tokens for batch in batches)
    outputs = run_micro_batches(model, batches, count, forward_only=True)
    total, tokens, _ = sum_losses(world, outputs, batches, 1)[0].tolist()
    return total / tokens


def work_findings(checkpoints: dict[str, str], layout: tuple[int, int]) -> dict[str, Findings]:
    """What our engine computes with checkpoints on a layout (tensor-parallel size, pipeline-parallel size)."""
    from megatron_steel.checkpoint.verify import load_for_inference
    from megatron_steel.evaluate.generate import Sampling, generate

    world = runtime.start(tensor_model_parallel_size=layout[0], pipeline_model_parallel_size=layout[1])
    found = {}
    for name, checkpoint in checkpoints.items():
        model, _ = load_for_inference(Path(checkpoint), world, bf16=False)
        ids_BS = text_ids(model.vocab_size)
        logits = runtime.gather_objects(world, pipeline_logits(model, ids_BS, world))[-1]
        loss = engine_loss(model, ids_BS, world)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0)
        generated = generate(model, prompts(model.vocab_size), sampling, [], world)
        ids_BS[:, -1] = (ids_BS[:, -1] + 1) % model.vocab_size
        changed = runtime.gather_objects(world, pipeline_logits(model, ids_BS, world))[-1]
        difference_S = (changed - logits).abs().amax((0, 2))
        leak, reach = difference_S[:-1].max().item(), difference_S[-1].item()
        found[name] = Findings(logits=logits.numpy(), loss=loss, generated=generated, leak=leak, reach=reach)
    return found


def work_import(folders: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Import {name: (Hugging Face folder, checkpoint root)}; returns {name: checkpoint}."""
    from megatron_steel.checkpoint.hf import import_hf

    runtime.start()
    return {name: str(import_hf(Path(folder), Path(root))) for name, (folder, root) in folders.items()}


def work_export(folders: dict[str, tuple[str, str]], shard_bytes: int) -> None:
    """Export {name: (checkpoint, Hugging Face folder)}."""
    from megatron_steel.checkpoint.hf import export_hf

    runtime.start()
    for checkpoint, folder in folders.values():
        export_hf(Path(checkpoint), Path(folder), shard_bytes)


def work_convert(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of tools/convert_hf.py, in a process that has its imports behind it."""
    from tools.convert_hf import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), err.getvalue()
