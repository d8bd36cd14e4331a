"""Convert between checkpoints and Hugging Face folders, in one CPU process for any TP x PP of the source.

    python tools/convert_hf.py import --hf DIR --save CKPT [--tensor-model-parallel-size N] [--dtype bf16]
    python tools/convert_hf.py export --load CKPT --hf DIR [--ckpt-step N] [--dtype bf16] [--max-shard-size 5GB]
    python tools/convert_hf.py verify --load CKPT --hf DIR [--ckpt-step N] [--trust-remote-code]
    python tools/convert_hf.py export-adapter --load CKPT --adapter DIR [--base NAME] [--ckpt-step N] [--dtype bf16]
    python tools/convert_hf.py import-adapter --hf DIR --adapter DIR --save CKPT [--dtype bf16]

export merges adapters (LoRA) into the weights; the last two take them apart from and to a folder of PEFT's.

Exit codes: 0 done (verify: the same model), 1 verify found a difference, 2 user error; nothing half-written is left.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from megatron_steel.checkpoint.files import find_checkpoint
from megatron_steel.config.load import user_errors
from tools.command_line import leave_on_sigterm

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("import", "Hugging Face folder -> checkpoint"),
        ("import-adapter", "Hugging Face folder and an adapter of it -> checkpoint"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
        command.add_argument("--save", type=Path, required=True, help="new directory for the checkpoint")
        command.add_argument("--tensor-model-parallel-size", type=int, default=1, help="pads the vocabulary for it")
    for name, text in (
        ("export", "checkpoint -> Hugging Face folder"),
        ("verify", "compare the weights and logits of a checkpoint and a Hugging Face folder"),
        ("export-adapter", "adapters of a checkpoint -> folder for PEFT"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--load", type=Path, required=True, help="checkpoint directory")
        command.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
        if name != "export-adapter":
            command.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    for name in ("import-adapter", "export-adapter"):
        commands.choices[name].add_argument("--adapter", type=Path, required=True, help="folder of PEFT's")
    commands.choices["export-adapter"].add_argument("--base", help="name of the model they were trained on, for PEFT")
    commands.choices["verify"].add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the folder carries"
    )
    commands.choices["export"].add_argument(
        "--max-shard-size", type=shard_bytes, default="5GB", metavar="SIZE", help="of a file, such as 900MB (5GB)"
    )
    for name in ("import", "export", "import-adapter", "export-adapter"):
        commands.choices[name].add_argument("--dtype", choices=DTYPES, help="precision to write; as it is stored")
    return parser


def shard_bytes(text: str) -> int:
    """Bytes of a size such as 5GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB|)", text)
    if found is None or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 900MB")
    return int(float(found[1]) * UNITS[found[2]])


def convert(options: argparse.Namespace, checkpoint: Path | None) -> int:
    """Run one conversion; ``checkpoint`` is the source of exports and verify. Returns the exit code."""
    # Heavy imports come after the cheap checks, so that most errors answer at once.
    if checkpoint is not None and options.command == "verify":
        return verify(options, checkpoint)
    import torch

    from megatron_steel.checkpoint import hf, peft

    dtype = None if options.dtype is None else getattr(torch, DTYPES[options.dtype])
    if options.command == "import-adapter":
        size = options.tensor_model_parallel_size
        print(f"wrote {peft.import_adapter(options.adapter, options.hf, options.save, size, dtype)}")
    elif checkpoint is None:
        print(f"wrote {hf.import_hf(options.hf, options.save, options.tensor_model_parallel_size, dtype)}")
    elif options.command == "export-adapter":
        peft.export_adapter(checkpoint, options.adapter, options.base, dtype)
        print(f"wrote {options.adapter}")
    else:
        hf.export_hf(checkpoint, options.hf, options.max_shard_size, dtype)
        print(f"wrote {options.hf}")
    return 0


def verify(options: argparse.Namespace, checkpoint: Path) -> int:
    """Compare both models; the exit code says whether they are the same."""
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint.verify import compare_with_hf
    from megatron_steel.runtime import world as runtime

    world = runtime.start()
    report = compare_with_hf(checkpoint, options.hf, world, trust_remote_code=options.trust_remote_code)
    print(report.one_line())
    runtime.stop(world, failed=False)
    return 0 if report.same else 1


def main(argv: list[str] | None = None) -> int:
    """Run one conversion; returns the exit code."""
    options = build_parser().parse_args(argv)
    leave_on_sigterm()
    with user_errors():
        if options.command not in ("export", "export-adapter") and not (options.hf / "config.json").is_file():
            raise ValueError(f"--hf {options.hf}: not a Hugging Face folder (it holds no config.json)")
        checkpoint = None
        if not options.command.startswith("import"):
            checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
            for line in warnings:
                print(f"warning: {line}", file=sys.stderr)
        try:
            return convert(options, checkpoint)
        except OSError as error:
            raise ValueError(f"{error.filename or options.command}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
