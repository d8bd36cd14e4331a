"""Seconds from data paths to the first batch: our ledger against megatron-core's blended dataset builder.

    python benchmarks/startup.py                                  # 100 prefixes, 5,000,000 documents
    python benchmarks/startup.py --documents 200000 --prefixes 20 # a quick look

Documents of random lengths are written once (the token files are sparse: their size is right, their blocks are not
allocated). Every timed run is a fresh process that has its imports behind it: open all data, build what the order
needs, read one global batch of 16 samples. The order is one epoch of all data, without weights. megatron-core is timed
cold (no index cache) and warm (its cache is there), with its defaults; ours without a cache, with an empty one, and
with that of an earlier process. Rounds alternate the sides. The gate: both sides find the same number of windows in
every prefix, and our batch is the same with and without a cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_steel.data.indexed import HEADER, MAGIC

SEQ_LENGTH, BATCH, SEED = 2048, 16, 1234
TOKEN_BYTES, UINT16_CODE = 2, 8


def write_data(folder: Path, documents: int, prefixes: int) -> list[str]:
    """Indexed datasets with log-normal document lengths (median 400 tokens); returns their prefixes."""
    random = np.random.default_rng(SEED)
    names = []
    for number in range(prefixes):
        count = documents // prefixes
        lengths = np.clip(random.lognormal(6.0, 1.0, count), 1, 100_000).astype(np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * TOKEN_BYTES
        prefix = str(folder / f"source{number:03d}")
        with open(f"{prefix}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, UINT16_CODE, count, count + 1))
            for part in (lengths, ends - lengths.astype(np.int64) * TOKEN_BYTES, np.arange(count + 1, dtype=np.int64)):
                stream.write(part.tobytes())
        with open(f"{prefix}.bin", "wb") as stream:
            stream.truncate(int(ends[-1]))
        # What our preprocessing leaves beside the data; without it files are scanned for foreign ids.
        Path(f"{prefix}.json").write_text(
            json.dumps({"tokenizer_fingerprint": "f" * 64, "bin_sha256": f"{number:064x}"})
        )
        names.append(prefix)
    return names


def ours(prefixes: list[str], cache: str | None) -> tuple[float, list[int], str]:
    """Seconds to the first batch, the windows of each prefix, and the sha256 of what the batch is read from."""
    import megatron.core.datasets.helpers_cpp  # noqa: F401  (a run has it loaded by then)
    import torch

    from megatron_steel.data.document_batches import BatchBuilder
    from megatron_steel.data.loader import BatchLayout, TrainLoader
    from megatron_steel.data.phases import Request, arrange
    from megatron_steel.data.sources import TokenizerFacts, open_sources

    began = time.perf_counter()
    data = open_sources(
        data_path=[],
        split="1",
        train_data_path=prefixes,
        valid_data_path=[],
        seq_length=SEQ_LENGTH,
        seed=SEED,
        tokenizer=TokenizerFacts("f" * 64, 65_000),
        cache_path=cache,
    )
    ledger, _ = arrange(Request(data.train, data.weighting, [], SEED, SEQ_LENGTH), None, 0, append=False)
    layout = BatchLayout(micro_batch_size=BATCH, num_microbatches=1, data_parallel_rank=0, data_parallel_size=1)
    builder = BatchBuilder(
        seq_length=SEQ_LENGTH, tensor_group=None, reads_data=True, device=torch.device("cpu"), eod_id=0
    )
    loader = TrainLoader(ledger, data.datasets, layout, builder)
    (batch,) = loader.step(0)
    seconds = time.perf_counter() - began
    assert batch.tokens_BS.shape == (BATCH, SEQ_LENGTH)
    loader.close()
    # All tokens are zeros here: compared is which documents they come from, and where windows begin in them.
    digest = hashlib.sha256()
    for source, _, window in zip(*ledger.samples(0, BATCH), strict=True):
        documents, starts = data.datasets[ledger.sources[source].fingerprint].prepare()
        bounds = starts[window : window + 2].astype(np.int64)
        digest.update(bounds.tobytes() + documents[bounds[0, 0] : bounds[1, 0] + 1].astype(np.int64).tobytes())
    return seconds, [spec.windows for spec in data.train], digest.hexdigest()


class IdsOnly:
    """What GPTDataset asks of a tokenizer."""

    eod, pad, vocab_size, unique_identifiers = 0, 1, 65_000, {"class": "IdsOnly"}


def theirs(prefixes: list[str], cache: str, samples: int) -> tuple[float, list[int], str]:
    """Seconds of megatron-core's builder to the first batch, and the windows of each prefix."""
    import torch
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    # The builder asks for its rank before it writes its cache.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    began = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=(prefixes, None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=IdsOnly(),  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()
    batch = [train[i]["tokens"] for i in range(BATCH)]
    seconds = time.perf_counter() - began
    assert len(batch) == BATCH and batch[0].shape == (SEQ_LENGTH,)
    windows = [int((dataset.dataset.sequence_lengths.sum() - 1) // SEQ_LENGTH) for dataset in train.datasets]
    return seconds, windows, ""


def timed(side: str, prefixes: list[str], cache: Path | None, samples: int) -> tuple[float, list[int], str]:
    """Run one side in a fresh process."""
    command = [sys.executable, __file__, "--side", side, "--samples", str(samples)]
    command += ["--cache", str(cache)] if cache else []
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": root}
    result = subprocess.run(
        command, input="\n".join(prefixes), capture_output=True, text=True, env=environment, check=False
    )
    if result.returncode:
        raise SystemExit(f"{side} failed:\n{result.stderr[-3000:]}")
    seconds, windows, digest = json.loads(result.stdout.splitlines()[-1])
    return seconds, windows, digest


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Gate, then rounds of both sides; returns what goes into the record."""
    labels = ("ours", "theirs cold", "theirs warm", "ours cold", "ours warm")
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    gate: list[int] = []
    batches: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, cache = Path(name), Path(name) / "cache"
        prefixes = write_data(folder, options.documents, options.prefixes)
        for _ in range(options.rounds):
            shutil.rmtree(cache, ignore_errors=True)
            for label in (*labels, "ours warm"):
                side, _, temperature = label.partition(" ")
                taken, windows, digest = timed(side, prefixes, cache / side if temperature else None, sum(gate))
                if side == "ours" and batches.setdefault(side, digest) != digest:
                    raise SystemExit("the cache changes the first batch; nothing is compared")
                seconds[label].append(taken)
                gate = gate or windows
                if windows != gate:
                    raise SystemExit("the two sides do not find the same windows; nothing is compared")
                print(f"{label}: {taken:.3f} s", flush=True)
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return {
        "documents": options.documents,
        "prefixes": options.prefixes,
        "seconds": seconds,
        "medians": medians,
        "ours / theirs cold": medians["ours"] / medians["theirs cold"],
        "ours warm / theirs warm": medians["ours warm"] / medians["theirs warm"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5_000_000)
    parser.add_argument("--prefixes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where the data is written (about 100 MB)")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        prefixes = sys.stdin.read().split("\n")
        print(
            json.dumps(
                ours(prefixes, options.cache)
                if options.side == "ours"
                else theirs(prefixes, options.cache, options.samples)
            )
        )
        return
    result = compare(options)
    print(json.dumps({key: value for key, value in result.items() if key != "seconds"}, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
