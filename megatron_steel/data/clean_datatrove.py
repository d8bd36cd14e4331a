"""The one file that names datatrove: its steps under our settings, and stages on its local and SLURM executors."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.executor.slurm import SlurmPipelineExecutor
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import (
    HashConfig,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.logging import logger

from megatron_steel.data.clean_settings import MinhashDedup, SlurmOptions
from megatron_steel.data.clean_text import Text

__all__ = ["Document", "PipelineStep", "Signature", "Stage", "minhash_stages", "run_local", "run_slurm"]

SHINGLES_AT_ONCE = 1024


@dataclass(frozen=True)
class Stage:
    """Steps that run as one datatrove pipeline, in this many tasks."""

    name: str
    steps: list[Any]
    tasks: int


class Signature(MinhashDedupSignature):
    """datatrove's MinHash signatures over our token n-grams, so that Chinese needs no word splitter."""

    def __init__(self, output_folder: str, settings: MinhashDedup) -> None:
        # The base class would load a word splitter (spacy for English) that is not used here.
        PipelineStep.__init__(self)
        self.output_folder = get_datafolder(output_folder)
        self.config = minhash_config(settings)
        self.num_hashes = self.config.num_buckets * self.config.hashes_per_bucket
        self._parameters = None
        self.skip_existing_sigs = False
        self.measured = Text("")

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        """Write the signatures of the task's documents."""
        super().run(self._watched(data), rank, world_size)

    def _watched(self, data: Iterator[Document]) -> Iterator[Document]:
        for document in data:
            # The filters have split this text already.
            self.measured = document.metadata["measured"]
            yield document

    def get_shingles(self, text: str) -> np.ndarray:
        """uint64 (N, 1) hashed token n-grams; none for a text of fewer tokens, which is then never a near duplicate."""
        assert self.measured.text is text, "signatures are made of what the filters measured"
        return np.unique(self.measured.token_ngrams(self.config.n_grams)).reshape(-1, 1)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Least hashes per bucket, a few thousand n-grams at a time: a book would take gigabytes at once."""
        parts = []
        for first in range(0, len(shingles), SHINGLES_AT_ONCE):
            parts.append(super().get_signature(shingles[first : first + SHINGLES_AT_ONCE]))
        return np.array(parts, dtype=np.uint64).min(axis=0).tolist()


def minhash_config(settings: MinhashDedup) -> MinhashConfig:
    """datatrove's form of the settings. Its hash function is not used; sha1 is the one that needs no package."""
    return MinhashConfig(
        n_grams=settings.n,
        num_buckets=settings.buckets,
        hashes_per_bucket=settings.hashes_per_bucket,
        seed=settings.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),
    )


def minhash_stages(folder: Path, settings: MinhashDedup) -> tuple[Signature, list[Stage]]:
    """The step that ends the first pipeline, and the stages that find clusters: ``folder/clusters/RANK.clusters``."""
    signatures, buckets, clusters = (str(folder / name) for name in ("signatures", "buckets", "clusters"))
    config = minhash_config(settings)
    pairs = MinhashDedupBuckets(signatures, buckets, config=config)
    groups = MinhashDedupCluster(buckets, clusters, config=config, save_cluster_id=True)
    return Signature(signatures, settings), [
        Stage("buckets", [pairs], settings.buckets),
        Stage("cluster", [groups], 1),
    ]


def run_local(work: Path, stages: list[Stage], workers: int) -> None:
    """One stage after the other, ``workers`` processes at a time; logs and completion marks go under ``work``."""
    # datatrove reports every task on stderr, and an error with its traceback; ours are one line.
    logger.disable("datatrove")
    for stage in stages:
        start = time.monotonic()
        executor = LocalPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            logging_dir=str(work / "logs" / stage.name),
            # Forked workers share the loaded libraries, the tables and the index of the contamination check.
            start_method="fork",
        )
        with contextlib.redirect_stdout(sys.stderr):
            executor.run()
        print(f"{stage.name}: {stage.tasks} tasks, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def run_slurm(work: Path, stages: list[Stage], workers: int, slurm: SlurmOptions) -> None:
    """Hand all stages to SLURM as job arrays, each after the one before. ``RuntimeError`` when sbatch refuses."""
    executor = None
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps,
            tasks=stage.tasks,
            workers=min(workers, stage.tasks),
            time=slurm.time,
            partition=slurm.partition,
            qos=slurm.qos,
            cpus_per_task=slurm.cpus_per_task,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            env_command=slurm.env_command,
            sbatch_args=dict(slurm.sbatch_args),
            job_name=f"clean-{stage.name}",
            logging_dir=str(work / "logs" / stage.name),
            depends=executor,
        )
    assert executor is not None
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"sbatch refused a job (exit code {error.returncode}), its reason is above; end those that it took before "
            "(squeue, scancel), then give the command again"
        ) from error
