"""Batches of answers that the trained model samples itself, with what they earn.

A sample of the ledger is a prompt; its answers are a group and are in one micro-batch. Which tokens are chosen depends
on the weights, the seed and the number of the sample: the same on every layout (but for rounding) and after a resume.

Shapes: M micro-batches, B prompts of one, K answers of a prompt, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_steel.config.preference_schema import PreferenceConfig
from megatron_steel.config.rampup import BatchSizes, batch_sizes
from megatron_steel.data.batch import Batch, Builder, Rollouts
from megatron_steel.data.loader import BatchLayout
from megatron_steel.data.order import Ledger
from megatron_steel.data.prompt_dataset import PromptDataset, answer_planes
from megatron_steel.evaluate.generate import Continuation, Sampling, continue_prompts
from megatron_steel.evaluate.rewards import Reward
from megatron_steel.model.build import Model
from megatron_steel.objective.group_policy import group_advantages
from megatron_steel.runtime.world import World
from megatron_steel.text.tokenizer import Tokenizer
from megatron_steel.train.prepare import Prepared

Place = tuple[PromptDataset, int]
"""A prompt: its data set, and its number there."""


@dataclass(kw_only=True)
class GroupSampler:
    """Samples answers, scores them and lays them out as micro-batches."""

    model: Model
    world: World
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    reward: Reward
    options: PreferenceConfig
    builder: Builder
    seed: int

    def sample(self, places: list[Place], numbers_MB: np.ndarray, sources_MB: np.ndarray) -> list[Batch]:
        """Micro-batches of B * K rows for the prompts at ``places``, M * B in order.

        numbers_MB: the number that each prompt's answers are drawn with; below 0 there is no prompt, and its place is
        only there to be sampled, so that all ranks work alike. Raises ``ValueError`` for a reward that is no number.
        """
        answers = continue_prompts(
            self.model,
            [dataset.prompts[window][0] for dataset, window in places],
            Sampling(
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.rl_default_temperature,
                seed=self.seed,
            ),
            self.stop_ids,
            self.world,
            self.options.grpo_group_size,
            np.maximum(numbers_MB, 0).ravel().tolist(),
        )
        per_batch, group = numbers_MB.shape[1], self.options.grpo_group_size
        present_MR = np.repeat(numbers_MB >= 0, group, axis=1)

        def fetch(microbatch: int, row: int) -> np.ndarray | None:
            prompt = microbatch * per_batch + row // group
            dataset, window = places[prompt]
            if not present_MR[microbatch, row]:
                return None
            return answer_planes(dataset.prompts[window][0], answers[prompt][row % group].with_stop)

        host = self.builder.read(fetch, present_MR.shape)
        batches = self.builder.build(host, np.repeat(sources_MB, group, axis=1), present_MR)
        rewards_PK = self.score(places, answers)
        stopped_PK = torch.tensor([[float(one.stop is not None) for one in row] for row in answers])
        for number, batch in enumerate(batches):
            rows = slice(number * per_batch, (number + 1) * per_batch)
            present_B = torch.from_numpy(present_MR[number]).float().to(self.world.device)
            batch.rollouts = self.rollouts(batch, rewards_PK[rows], stopped_PK[rows], present_B)
            batch.weight = float(present_MR[number].sum())
        return batches

    def score(self, places: list[Place], answers: list[list[Continuation]]) -> Tensor:
        """What each answer earns, float32 [M * B, K]: the response alone is looked at, not its prompt or end token.

        One rank of those with the same samples asks, for a reward that is not a function of its arguments.
        """
        rewards_PK = torch.zeros(len(answers), self.options.grpo_group_size)
        if self.builder.reads:
            for row, ((dataset, window), group) in enumerate(zip(places, answers, strict=True)):
                wanted = dataset.prompts[window][1]
                for column, one in enumerate(group):
                    rewards_PK[row, column] = self.reward(self.tokenizer.decode(one.tokens), wanted)
        rewards_PK = rewards_PK.to(self.world.device)
        if self.world.sample_group.size() > 1:
            torch.distributed.broadcast(rewards_PK, group=self.world.sample_group, group_src=0)
        return rewards_PK

    def rollouts(self, batch: Batch, rewards_BK: Tensor, stopped_BK: Tensor, present_R: Tensor) -> Rollouts:
        """What the loss needs of the answers of a micro-batch, R = B * K."""
        group = rewards_BK.shape[1]
        advantages_BK = group_advantages(rewards_BK, self.options.scale_advantages)
        # The deviation of equal rewards is to be 0, not a rounding error.
        equal_B1 = (rewards_BK == rewards_BK[:, :1]).all(1, keepdim=True)
        deviations_BK = rewards_BK.std(1, keepdim=True).masked_fill(equal_B1, 0.0).expand(-1, group)
        return Rollouts(
            advantages_B=advantages_BK.flatten() * present_R,
            rewards_B=rewards_BK.flatten() * present_R,
            deviations_B=deviations_BK.flatten() * present_R,
            stopped_B=stopped_BK.flatten().to(present_R.device) * present_R,
            counts_B=batch.loss_mask_BS.sum(-1),
        )


class RolloutLoader:
    """The micro-batches of optimizer steps, like TrainLoader, of prompts in the order of a ledger.

    layout: of prompts, of a step of the full size. Nothing is read ahead: answers are those of the newest weights.
    """

    def __init__(
        self,
        ledger: Ledger,
        datasets: Mapping[str, PromptDataset],
        layout: BatchLayout,
        sizes: BatchSizes,
        sampler: GroupSampler,
    ) -> None:
        self.ledger, self.sizes, self.sampler, self.builder = ledger, sizes, sampler, sampler.builder
        self._prompts = layout
        self.layout = replace(layout, micro_batch_size=layout.micro_batch_size * sampler.options.grpo_group_size)
        """Of rows."""
        self._datasets = [datasets.get(source.fingerprint) for source in ledger.sources]

    def step(self, first_sample: int) -> list[Batch]:
        """Return this rank's micro-batches of the step over prompts [first_sample, + its size)."""
        size = self.sizes.at(first_sample)
        per_pass = self._prompts.micro_batch_size * self._prompts.data_parallel_size
        offsets_MB = replace(self._prompts, num_microbatches=size // per_pass).offsets()
        source, _, window = self.ledger.samples(first_sample, first_sample + size)
        places = []
        for offset in offsets_MB.ravel():
            dataset = self._datasets[source[offset]]
            assert dataset is not None
            places.append((dataset, int(window[offset])))
        return self.sampler.sample(places, first_sample + offsets_MB, source[offsets_MB])

    def close(self) -> None:
        """Nothing is open."""

    def __enter__(self) -> RolloutLoader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class ValidRollouts:
    """Answers to the first prompts of a validation set, in their order; sampled anew, with equal draws, each time."""

    def __init__(
        self, dataset: PromptDataset, layout: BatchLayout, sampler: GroupSampler, max_samples: int | None
    ) -> None:
        self.dataset, self.layout, self.sampler = dataset, layout, sampler
        self.num_samples = len(dataset) if max_samples is None else min(len(dataset), max_samples)

    def __iter__(self) -> Iterator[list[Batch]]:
        for first in range(0, self.num_samples, self.layout.global_batch_size):
            windows_MB = first + self.layout.offsets()
            present_MB = windows_MB < self.num_samples
            places = [(self.dataset, int(window)) for window in np.where(present_MB, windows_MB, 0).ravel()]
            yield self.sampler.sample(places, np.where(present_MB, windows_MB, -1), np.full(windows_MB.shape, -1))


def open_rollouts(
    prepared: Prepared, model: Model, world: World, layout: BatchLayout, builder: Builder, valid_samples: int
) -> tuple[RolloutLoader, dict[str, ValidRollouts]]:
    """The loaders of a run on rewards."""
    assert prepared.reward is not None and prepared.template is not None
    config = prepared.config
    sampler = GroupSampler(
        model=model,
        world=world,
        tokenizer=prepared.tokenizer,
        stop_ids=prepared.template.stop_ids,
        reward=prepared.reward,
        options=config.preference,
        builder=builder,
        seed=config.data.seed,
    )
    prompts = {name: data for name, data in prepared.datasets.items() if isinstance(data, PromptDataset)}
    valid = {name: data for name, data in prepared.valid_sets.items() if isinstance(data, PromptDataset)}
    return (
        RolloutLoader(prepared.ledger, prompts, layout, batch_sizes(config.training), sampler),
        {name: ValidRollouts(data, layout, sampler, valid_samples) for name, data in valid.items()},
    )
