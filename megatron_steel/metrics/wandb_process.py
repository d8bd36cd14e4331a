"""Weights & Biases in a process of its own: reads rows from standard input and reports them.

Started by :class:`megatron_steel.metrics.sinks.WandbSink`. Whatever the service or its client does (no route, wrong
key, a hanging upload, a crash) happens here and not in the process that trains. The one argument holds the settings as
JSON, every line of the input is one row of scalars; the end of the input ends the run.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.parse
import urllib.request
from typing import Any, NoReturn

REACH_SECONDS = 3.0
INIT_SECONDS = 15.0
FINISH_SECONDS = 10.0
# Environment variable that tells an offline process why it is offline.
REASON = "STEEL_WANDB_OFFLINE_REASON"


def why_unreachable(url: str) -> str | None:
    """None when a connection to the service, or to the proxy in front of it, can be opened; else the reason."""
    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=REACH_SECONDS).close()
    except OSError as error:
        return f"{parts.hostname}:{port} cannot be reached ({error})"
    return None


def start(settings: dict[str, Any]) -> Any:
    """The run, online when that works and offline otherwise; ``WANDB_MODE`` decides when it is set."""
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    quiet = wandb.Settings(
        init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, x_stats_pid=settings["trainer_pid"]
    )
    options = {key: settings[key] for key in ("project", "name", "id", "dir", "config")}
    mode: Any = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        run = wandb.init(mode=mode, settings=quiet, **options)
        if reason := os.environ.get(REASON):
            say(f"offline: {reason}; upload later with: wandb sync {os.path.dirname(run.dir)}")
        return run
    if reason := why_unreachable(wandb.setup().settings.base_url):
        start_again_offline(reason)
    try:
        run = wandb.init(mode=mode, resume="allow", settings=quiet, **options)
    except (wandb.errors.Error, ValueError, OSError) as error:
        start_again_offline(str(error))
    say(f"reporting to {run.url}")
    return run


def start_again_offline(reason: str) -> NoReturn:
    """Replace this process by an offline one: after a failed start, the client holds the run id and refuses it."""
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    environment |= {"WANDB_MODE": "offline", REASON: " ".join(reason.split())}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def say(text: str) -> None:
    """One line for the user."""
    print(f"wandb: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Report standard input until it ends. Signals are for the trainer, which then closes the input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to every process of a job step
    run = start(json.loads(sys.argv[1]))
    # W&B drops rows whose own step goes back, as it does after a restart from an older checkpoint.
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    for line in sys.stdin:
        run.log(json.loads(line))
    run.finish()


if __name__ == "__main__":
    main()
