"""The parity matrix: 1 to 8 ranks, every layout ends each step with the numbers and weights of one process.

A layout is a row of :data:`LAYOUTS`: flags, and switches of the model it needs. Rows with the same switches share their
reference. The other tests of layouts (families, masks, precision) take the few layouts of ``tiny_run``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from pool import WorkerPool
from test_layouts import compare
from tiny_run import MIXTURE, OVERLAPPED, SHARDED, Trace, options, work_train, write_data

from megatron_steel.config.load import from_flat
from megatron_steel.config.pipeline import layers_by_stage

STEPS = 4
SIZES: dict[str, Any] = {
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 4,
    "micro_batch_size": 1,
    # The reference is further along than that after 4 steps: what a layout does wrong shows in its weights.
    "lr_warmup_iters": 1,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a model is spread, and what it needs to have for that."""

    flags: dict[str, Any]
    replicas: int = 1
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        sizes = (self.flags.get(f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline"))
        # Experts are spread over ranks that are counted here already.
        return math.prod(sizes) * self.flags.get("context_parallel_size", 1) * self.replicas


def tensor(size: int) -> dict[str, Any]:
    return {"tensor_model_parallel_size": size}


def context(size: int) -> dict[str, Any]:
    return {"context_parallel_size": size}


def pipeline(
    stages: int, chunk: int | None = None, first: int | None = None, last: int | None = None
) -> dict[str, Any]:
    flags = {"pipeline_model_parallel_size": stages, "num_layers_per_virtual_pipeline_stage": chunk}
    flags |= {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    return {name: value for name, value in flags.items() if value is not None}


def experts(spread: int, shared: int | None = None) -> dict[str, Any]:
    return {"expert_model_parallel_size": spread} | ({"expert_tensor_parallel_size": shared} if shared else {})


SEQUENCE = {"sequence_parallel": True}
DEALT = MIXTURE | {"moe_token_dispatcher_type": "allgather"}
UNTIED = {"untie_embeddings_and_output_weights": True}

LAYOUTS: dict[str, Row] = {
    "tp2": Row(flags=tensor(2)),
    "tp2-sp": Row(flags=tensor(2) | SEQUENCE),
    "tp4": Row(flags=tensor(4)),
    "tp4-sp": Row(flags=tensor(4) | SEQUENCE),
    "pp2": Row(flags=pipeline(2)),
    "pp2-interleaved-2": Row(flags=pipeline(2, chunk=2)),
    "pp2-interleaved-1": Row(flags=pipeline(2, chunk=1)),
    "pp2-first-3": Row(flags=pipeline(2, first=3)),
    "pp2-3-5": Row(flags=pipeline(2, first=3, last=5)),
    "pp3-3-last-1": Row(flags=pipeline(3, first=3, last=1)),
    "pp4": Row(flags=pipeline(4)),
    "pp4-interleaved": Row(flags=pipeline(4, chunk=1)),
    "pp4-last-2": Row(flags=pipeline(4, last=2)),
    "dp2": Row(flags={}, replicas=2),
    "dp2-overlapped-offload": Row(flags=OVERLAPPED | {"optimizer_cpu_offload": True}, replicas=2),
    "dp4-sharded": Row(flags=SHARDED, replicas=4),
    "dp4-overlapped": Row(flags=OVERLAPPED, replicas=4),
    "dp8-overlapped": Row(flags=OVERLAPPED, replicas=8),
    "tp2-dp2-overlapped": Row(flags=tensor(2) | OVERLAPPED, replicas=2),
    "tp2-sp-dp2-sharded": Row(flags=tensor(2) | SEQUENCE | SHARDED, replicas=2),
    "tp2-sp-pp2": Row(flags=tensor(2) | SEQUENCE | pipeline(2)),
    "tp2-pp2-interleaved": Row(flags=tensor(2) | pipeline(2, chunk=2)),
    "tp2-sp-pp3-first-2-last-3": Row(flags=tensor(2) | SEQUENCE | pipeline(3, first=2, last=3)),
    "pp2-dp2-overlapped": Row(flags=pipeline(2) | OVERLAPPED, replicas=2),
    "pp2-interleaved-dp2-overlapped": Row(flags=pipeline(2, chunk=2) | OVERLAPPED, replicas=2),
    "pp2-first-5-dp3": Row(flags=pipeline(2, first=5) | SHARDED, replicas=3, model={"global_batch_size": 6}),
    "tp2-sp-pp2-dp2-overlapped": Row(flags=tensor(2) | SEQUENCE | pipeline(2) | OVERLAPPED, replicas=2),
    "tp2-pp2-interleaved-dp2-overlapped": Row(
        flags=tensor(2) | SEQUENCE | pipeline(2, chunk=2) | OVERLAPPED, replicas=2
    ),
    "tp4-sp-pp2-first-3": Row(flags=tensor(4) | SEQUENCE | pipeline(2, first=3)),
    "tp2-pp4": Row(flags=tensor(2) | pipeline(4)),
    "pp4-dp2-sharded": Row(flags=pipeline(4) | SHARDED, replicas=2),
    "cp4-tp2-sp": Row(flags=context(4) | tensor(2) | SEQUENCE),
    "cp2-tp2-sp-pp2-interleaved": Row(flags=context(2) | tensor(2) | SEQUENCE | pipeline(2, chunk=2)),
    "cp2-pp2-dp2-overlapped": Row(flags=context(2) | pipeline(2) | OVERLAPPED, replicas=2),
    "cp2-pp2-first-5": Row(flags=context(2) | pipeline(2, first=5)),
    "ep2": Row(flags=experts(2), replicas=2, model=MIXTURE),
    "ep8-overlapped": Row(flags=experts(8) | OVERLAPPED, replicas=8, model=MIXTURE),
    "tp2-sp-etp1": Row(flags=tensor(2) | SEQUENCE | experts(1, 1), model=MIXTURE),
    "tp2-sp-ep2-etp1": Row(flags=tensor(2) | SEQUENCE | experts(2, 1), model=MIXTURE),
    "tp2-sp-ep2-dp2-overlapped": Row(flags=tensor(2) | SEQUENCE | experts(2) | OVERLAPPED, replicas=2, model=MIXTURE),
    "tp2-sp-ep4-etp1-pp2-interleaved-dp2": Row(
        flags=tensor(2) | SEQUENCE | experts(4, 1) | pipeline(2, chunk=2) | OVERLAPPED, replicas=2, model=MIXTURE
    ),
    "tp2-sp-ep2-etp4": Row(flags=tensor(2) | SEQUENCE | experts(2, 4) | SHARDED, replicas=4, model=DEALT),
    "ep2-pp2": Row(flags=experts(2) | pipeline(2), replicas=2, model=MIXTURE),
    "cp2-ep2": Row(flags=context(2) | experts(2), model=MIXTURE),
    "cp2-tp2-sp-ep4-etp2-dp2-allgather": Row(
        flags=context(2) | tensor(2) | SEQUENCE | experts(4) | OVERLAPPED, replicas=2, model=DEALT
    ),
    "tp2-untied": Row(flags=tensor(2) | SEQUENCE, model=UNTIED),
    "pp2-last-3-untied": Row(flags=pipeline(2, last=3), model=UNTIED),
    "tp2-pp2-dp2-untied": Row(flags=tensor(2) | pipeline(2) | OVERLAPPED, replicas=2, model=UNTIED),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(pool: WorkerPool, prefix: str) -> Callable[[dict[str, Any]], list[Trace]]:
    """One process with these switches of the model; once for each."""
    known: dict[str, list[Trace]] = {}

    def train(model: dict[str, Any]) -> list[Trace]:
        key = str(sorted(model.items()))
        if key not in known:
            known[key] = pool.run(1, work_train, options(prefix, SIZES, model), STEPS, join=False)
        return known[key]

    return train


@pytest.mark.parametrize("name", sorted(LAYOUTS, key=lambda name: LAYOUTS[name].ranks))
def test_layout_trains_the_model_of_one_process(
    pool: WorkerPool, prefix: str, reference: Callable[[dict[str, Any]], list[Trace]], name: str
) -> None:
    row = LAYOUTS[name]
    wanted = reference(row.model)
    assert wanted[0].losses[-1] < wanted[0].losses[0]
    flat = options(prefix, SIZES, row.model, row.flags)
    compare(pool.run(row.ranks, work_train, flat, STEPS, join=False, timeout=120), wanted)


def test_uneven_stages_hold_what_they_are_given(pool: WorkerPool, prefix: str) -> None:
    """Weights lie on the stages that the configuration names, not only somewhere."""
    for name in ("pp3-3-last-1", "pp4-last-2", "pp2-first-3"):
        flat = options(prefix, SIZES, LAYOUTS[name].flags)
        wanted = layers_by_stage(from_flat(flat))
        traces = pool.run(LAYOUTS[name].ranks, work_train, flat, 0, join=False)
        for trace, layers in zip(traces, wanted, strict=True):
            held = {int(weight.split(".")[2]) for weight in trace.weights if weight.startswith("decoder.layers.")}
            assert held == set(layers), name
