"""Clean a corpus with the filters of a YAML file: filters, exact and MinHash deduplication, contamination check.

python tools/clean_data.py --input FILE|DIR|GLOB ... --config examples/clean.yaml --output FOLDER --workers N

writes FOLDER/part-NNNNN.jsonl[.zst], manifest.json and report.json. The same command again continues an interrupted
run. Exit codes: 0 done, 2 user error, 1 anything else. Needs the extra: pip install "megatron_steel[clean]".
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout this file belongs to

from tools.command_line import Parser, run_tool


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(__doc__)
    add, cores = parser.add_argument, os.cpu_count() or 1
    add("--input", nargs="+", required=True, help="files, directories of them, or glob patterns")
    add("--config", type=Path, required=True, help="YAML file with the filters")
    add("--output", type=Path, required=True, help="new folder for the result")
    add("--report", type=Path, help="also write the report to this JSON file")
    add("--dry-run", action="store_true", help="only report: nothing is written but --report")
    add("--executor", choices=("local", "slurm"), default="local", help="processes here, or SLURM job arrays")
    add("--tasks", type=int, default=cores, help="parts of the work; the result does not depend on it")
    add("--workers", type=int, default=cores, help="tasks at the same time")
    add("--max-lines-per-file", type=int, default=1_000_000, help="lines of a part file")
    add("--compression", choices=("none", "zstd"), default="none", help="zstd: part files are .jsonl.zst")
    add("--max-bad-lines", type=int, default=0, help="unreadable lines to accept; they are listed in bad_lines.jsonl")
    add("--examples", type=int, default=3, help="examples of dropped and changed documents per filter in the report")
    add("--slurm-partition", default="", help="partition")
    add("--slurm-time", default="24:00:00", help="time limit of a job")
    add("--slurm-qos", default="normal", help="quality of service")
    add("--slurm-cpus-per-task", type=int, default=1, help="cores of a job")
    add("--slurm-mem-per-cpu-gb", type=int, default=4, help="GB of memory per core")
    add("--slurm-env-command", help="shell command that activates the Python environment in a job")
    add("--slurm-sbatch", nargs="*", default=[], metavar="KEY=VALUE", help="further #SBATCH options")
    return parser


def run(argv: list[str]) -> None:
    """Parse, clean, and print the report as a table."""
    args = build_parser().parse(argv)
    # datatrove imports huggingface_hub for remote folders; none is used, and nothing is to be sent.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    from megatron_steel.data.clean import CleanOptions, clean, format_report
    from megatron_steel.data.clean_settings import SlurmOptions

    pairs = [item.partition("=") for item in args.slurm_sbatch]
    slurm = SlurmOptions(
        partition=args.slurm_partition,
        time=args.slurm_time,
        qos=args.slurm_qos,
        cpus_per_task=args.slurm_cpus_per_task,
        mem_per_cpu_gb=args.slurm_mem_per_cpu_gb,
        env_command=args.slurm_env_command,
        sbatch_args={key: value for key, _, value in pairs},
    )
    names = ("input", "config", "output", "report", "dry_run", "executor", "tasks", "workers", "max_lines_per_file")
    names += ("compression", "max_bad_lines", "examples")
    try:
        report = clean(CleanOptions(slurm=slurm, **{name: getattr(args, name) for name in names}))
    except ModuleNotFoundError as error:
        name = str(error.name).split(".")[0]
        raise RuntimeError(f'{name} is not installed; pip install "megatron_steel[clean]"') from error
    if report is not None:
        print(format_report(report))


if __name__ == "__main__":
    run_tool(run, "the same command continues")
