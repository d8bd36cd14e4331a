"""Messages of the libraries below us that say nothing to the user, each with the reason why it may go.

A row names one message of one module; everything else still gets through.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Message:
    """One message that is dropped."""

    module: str
    """Module that issues it (regular expression for warnings, logger name for log records)."""
    start: str
    """How it begins, verbatim."""
    why: str
    """Why the user does not need it."""
    category: type[Warning] = UserWarning
    """Class of a warning."""


_OWN_LAYERS = "our own layer backends and their log line say which norm and optimizer run"

WARNINGS: tuple[Message, ...] = (
    Message(
        r"megatron\.core\.",
        "Transformer Engine and Apex are not installed. Falling back to",
        "neither is needed: the plain loops and torch's AdamW compute the same",
    ),
    Message(r"megatron\.core\.", "Apex is not installed. Falling back to Torch Norm", _OWN_LAYERS),
    Message(
        r"megatron\.core\.optimizer\.optimizer",
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed.",
        "the optimizer only looks whether its shard of a parameter has a gradient",
    ),
    Message(
        r"megatron\.core\.tensor_parallel\.layers",
        "When using async grad allreduce it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        "environment.py sets it on a GPU, and on the host there are no connections",
    ),
    Message(
        r"megatron\.core\.tensor_parallel\.layers",
        "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS",
        "environment.py sets it on a GPU, and on the host there are no connections",
    ),
    Message(
        r"megatron\.core\.transformer\.transformer_config",
        "full scope is deprecated.",
        "it is megatron-core's own default that is deprecated",
    ),
    Message(
        r"megatron\.core\.dist_checkpointing\.",
        "`load_state_dict` is deprecated and will be removed in future versions.",
        "megatron-core 0.16.1 calls it, and torch 2.13 still has it",
        FutureWarning,
    ),
    Message(
        r"torch\.distributed\.",
        "Please use DTensor instead and we are deprecating ShardedTensor.",
        "megatron-core 0.16.1 saves ShardedTensor, and torch 2.13 still has it",
        FutureWarning,
    ),
    Message(
        r"torch\.distributed\.",
        "`torch.distributed.reduce_scatter_tensor` is deprecated.",
        "megatron-core 0.16.1 calls it, and torch 2.13 still has it",
        FutureWarning,
    ),
    Message(
        r"torch\.distributed\.",
        "`torch.distributed.all_gather_into_tensor` is deprecated.",
        "megatron-core 0.16.1 calls it, and torch 2.13 still has it",
        FutureWarning,
    ),
)

RECORDS: tuple[Message, ...] = (
    Message(
        "megatron.core.transformer.transformer_layer",
        "Unknown MLP type",
        "our feed-forward takes the default group, which is the tensor-parallel one",
    ),
    Message(
        "megatron.core.tensor_parallel.random",
        "CPU RNG state changed within GPU RNG context",
        "on the host they are one generator, so dropout changes it by design",
    ),
)


class DropMessage(logging.Filter):
    """Drops the records of a logger that begin with a given text."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a record unless it is the one to drop."""
        return not record.getMessage().startswith(self.start)


def install() -> None:
    """Drop the messages of :data:`WARNINGS` and :data:`RECORDS`; doing it twice changes nothing."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(message.start), message.category, message.module)
    for message in RECORDS:
        logger = logging.getLogger(message.module)
        if not any(isinstance(known, DropMessage) and known.start == message.start for known in logger.filters):
            logger.addFilter(DropMessage(message.start))
