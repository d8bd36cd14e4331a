"""Training on plain megatron-core: its GPT model of local layers, its data parallelism and optimizer, random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_steel.config.schema import Config
from megatron_steel.model.families import transformer_config
from megatron_steel.runtime import device


class PlainTraining:
    """A model and its optimizer; :meth:`step` trains on a batch of random tokens that is there already."""

    def __init__(self, config: Config, vocabulary: int, micro_batches: int) -> None:
        options: TransformerConfig = transformer_config(config)
        options.finalize_model_grads_func = finalize_model_grads
        # The product draws weights by itself, after building.
        options.perform_initialization = True
        draw = partial(torch.nn.init.normal_, std=0.02)
        options.init_method = options.embedding_init_method = options.output_layer_init_method = draw
        size, self.length, self.rows = config.size, config.training.seq_length, config.training.micro_batch_size
        model: Any = GPTModel(
            options,
            get_gpt_layer_local_spec(normalization=size.normalization),
            vocabulary,
            self.length,
            share_embeddings_and_output_weights=not size.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=int(size.rotary_base),
        ).to(device.device())
        if config.training.bf16:
            model = Float16Module(options, model)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
        self.model = DistributedDataParallel(options, settings, model)
        kind = torch.bfloat16 if config.training.bf16 else torch.float32
        rates = OptimizerConfig(lr=1e-4, clip_grad=1.0, bf16=config.training.bf16, params_dtype=kind)
        self.optimizer = get_megatron_optimizer(rates, [self.model])
        rows = torch.randint(vocabulary, (micro_batches, self.rows, self.length + 1), device=device.device())
        self.batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows]
        self.positions = torch.arange(self.length, device=device.device()).expand(self.rows, -1)
        hidden = torch.ones(self.length, self.length, dtype=torch.bool, device=device.device()).triu(1)
        self.mask = hidden[None, None]

    def forward(self, iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Any]:
        """One micro-batch."""
        tokens, labels = next(iterator)
        return model(tokens, self.positions, self.mask, labels=labels), partial(self.loss, labels.numel())

    def loss(self, count: int, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The mean over the tokens of the step."""
        total = losses.float().sum()
        steps = len(self.batches)
        return total / (count * steps), torch.zeros((), dtype=torch.int), {"loss": total.detach() / count}

    def step(self) -> float:
        """Gradients and update; the mean loss, which the host waits for as Megatron-LM's loop does."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = get_forward_backward_func()(
            forward_step_func=self.forward,
            data_iterator=iter(self.batches),
            model=self.model,
            num_microbatches=len(self.batches),
            seq_length=self.length,
            micro_batch_size=self.rows,
            forward_only=False,
        )
        self.optimizer.step()
        return float(sum(output["loss"] for output in outputs) / len(outputs))
