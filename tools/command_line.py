"""What a tool does around its own work: flags with a hint for a mistyped one, errors as one line, a clean stop.

And how the tools that run a model begin: flags of the checkpoint and its layout, warnings, the ranks.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from megatron_steel.runtime.world import World


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors as ``ValueError``, for :func:`run_tool` to print in one line."""

    def __init__(self, description: str | None, unsupported: Mapping[str, str] | None = None) -> None:
        """``unsupported`` are flags of other programs, each with what to do instead."""
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        self.unsupported = dict(unsupported or {})

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options; ``ValueError`` with the nearest flag for one that does not exist."""
        known = sorted(option for action in self._actions for option in action.option_strings)
        for item in argv:
            name = item.split("=", 1)[0]
            if name in self.unsupported:
                raise ValueError(f"{name}: {self.unsupported[name]}")
            if item.startswith("--") and name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(f"unknown flag {name}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return self.parse_args(argv)


def run_tool(work: Callable[[list[str]], None], interrupted: str) -> None:
    """Do ``work`` on the command line's flags.

    A user error (``ValueError``) is one line and exit code 2, another failure one line and exit code 1. On SIGTERM the
    process leaves through its normal clean-up; ``interrupted`` is what Ctrl-C says.
    """
    leave_on_sigterm()
    # A pool ends its forked workers with this signal: with our handler they would hang in it.
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    try:
        work(sys.argv[1:])
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
    except KeyboardInterrupt:
        print(f"error: interrupted; {interrupted}", file=sys.stderr)
        raise SystemExit(1) from None


def leave_on_sigterm() -> None:
    """Leave on SIGTERM like on Ctrl-C, with exit code 1, so that what is half-written is removed."""
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say which checkpoint, and over how many ranks it is split."""
    parser.add_argument("--load", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--ckpt-step", type=int, default=None, help="iteration; the newest when left out")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages")


def start_model_run(options: argparse.Namespace) -> tuple[Path, World]:
    """The checkpoint that the flags name, after warnings about what was passed over, and this rank's world."""
    from megatron_steel.runtime import cpu

    cpu.install()
    from megatron_steel.checkpoint.files import find_checkpoint
    from megatron_steel.runtime import world as runtime

    checkpoint, warnings = find_checkpoint(options.load, options.ckpt_step)
    world = runtime.start(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    for line in warnings if world.rank == 0 else ():
        print(f"warning: {line}", file=sys.stderr)
    return checkpoint, world
