"""Rules of context parallelism, run by config/check.py."""

from __future__ import annotations

from megatron_steel.config.families.steel import is_soft
from megatron_steel.config.schema import Config


def check_context(config: Config) -> None:
    """Samples must be divisible, and only attention may mix their tokens; raises ``ValueError`` like check.py."""
    parallel, ranks = config.parallel, config.parallel.context_parallel_size
    if ranks == 1:
        return
    flag = f"--context-parallel-size {ranks}"
    shares = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    multiple, length = 2 * ranks * shares, config.training.seq_length
    if length % multiple:
        why = f"2 x {flag}" + f" x --tensor-model-parallel-size {shares}" * (shares > 1)
        raise ValueError(
            f"--seq-length {length} is not divisible by {why}; use {max(1, length // multiple) * multiple}"
        )
    if parallel.transformer_impl == "local":
        raise ValueError(f"--transformer-impl local has no {flag}; use --transformer-impl torch")
    if is_soft(config.size):
        raise ValueError(f"{flag} does not go with --ffn-type {config.size.ffn_type}, which mixes tokens of a sample")
    if config.size.multi_latent_attention and packs(config):
        raise ValueError(
            f"{flag} with --multi-latent-attention takes no --reset-attention-mask or --reset-position-ids; "
            f"leave out one of them"
        )
    check_context_backend(config, parallel.transformer_impl)


def check_context_backend(config: Config, backend: str) -> None:
    """``ValueError`` where Transformer Engine's context parallelism would compute something else, or nothing."""
    if config.parallel.context_parallel_size == 1 or backend != "transformer_engine":
        return
    for given, what in ((packs(config), "packed documents"), (config.size.window_size, "--window-size")):
        if given:
            raise ValueError(
                f"--context-parallel-size with {what} does not go with Transformer Engine; use --transformer-impl torch"
            )


def packs(config: Config) -> bool:
    """Whether several documents or conversations lie in a row and are told apart."""
    chats = bool(config.chat.train_data) and config.chat.packing
    return chats or config.data.reset_attention_mask or config.data.reset_position_ids
