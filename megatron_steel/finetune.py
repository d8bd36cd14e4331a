"""Supervised finetuning on conversations: parse, check, build, run, close.

Started with ``torchrun --nproc-per-node N -m megatron_steel.finetune ...`` or, for one process, ``python -m``.
Exit codes: 0 finished or stopped cleanly after saving, 2 user error, 1 anything else.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from megatron_steel.config.check_chat import check_chat
from megatron_steel.config.check_preference import refuse_preference
from megatron_steel.config.load import parse, user_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run one finetune; returns the exit code."""
    with user_errors():
        config = parse(sys.argv[1:] if argv is None else argv, "megatron_steel.finetune")
        # Heavy imports come after the command line is known to be good, so --help and errors answer at once.
        refuse_preference(config, "megatron_steel.finetune")
        check_chat(config)
        from megatron_steel.runtime import cpu, deterministic

        if config.training.deterministic_mode:
            deterministic.make_deterministic()
        cpu.install()
        from megatron_steel.train.prepare_chat import inspect, prepare_chat

        if config.chat.inspect:
            if os.environ.get("RANK", "0") == "0":
                inspect(config)
            return 0
        prepared = prepare_chat(config)
    from megatron_steel.train.run import run

    return run(prepared)


if __name__ == "__main__":
    sys.exit(main())
