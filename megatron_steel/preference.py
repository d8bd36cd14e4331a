"""Training on preferences (DPO and its family, KTO) and rewards (GRPO): parse, check, build, run, close.

Started with ``torchrun --nproc-per-node N -m megatron_steel.preference ...`` or, for one process, ``python -m``.
Exit codes: 0 finished or stopped cleanly after saving, 2 user error, 1 anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_steel.config.check_chat import check_chat
from megatron_steel.config.check_preference import check_preference
from megatron_steel.config.load import parse, user_errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run one training on preferences; returns the exit code."""
    with user_errors():
        config = parse(sys.argv[1:] if argv is None else argv, "megatron_steel.preference")
        # Heavy imports come after the command line is known to be good, so --help and errors answer at once.
        check_chat(config)
        check_preference(config)
        from megatron_steel.runtime import cpu, deterministic

        if config.training.deterministic_mode:
            deterministic.make_deterministic()
        cpu.install()
        from megatron_steel.train.prepare_preference import prepare_preference

        prepared = prepare_preference(config)
    from megatron_steel.train.run import run

    return run(prepared)


if __name__ == "__main__":
    sys.exit(main())
