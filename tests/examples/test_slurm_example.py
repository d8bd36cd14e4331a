"""`examples/slurm/*.sbatch` with stand-ins for Slurm's commands: which steps run where, and how a job ends.

`bash tests/slurm.sh` runs the same on a real Slurm.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "examples" / "slurm"

# srun drops its own flags and runs the command once per node, as many as it is told.
SRUN = """#!/usr/bin/env bash
nodes=1 output=/dev/null
echo "srun $*" >> "$CALLS"
while [[ $1 == -* ]]; do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --container-*) shift ;;
  esac
  shift
done
for ((node = 0; node < nodes; node++)); do
  SLURM_PROCID=$node "$@" > "${output/\\%t/$node}" 2>&1 || exit $?
done
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && printf "first\\nsecond\\n" || echo "scontrol $*" >> "$CALLS"
"""
# A script of examples/: notes what it was called with; training can fail, or take until somebody asks it to stop.
SCRIPT = """#!/usr/bin/env bash
echo "script $STEPS node ${NODE_RANK:-} of $NNODES at $MASTER_ADDR:$MASTER_PORT with $*" >> "$CALLS"
[ "$STEPS" != "${FAILING:-}" ] || exit 1
if [ "$STEPS" = "${LONG:-}" ]; then
  [ "$STEPS" = data ] || kill -USR1 $$
  echo "alive $STEPS, where the shell of a node ignores USR1" >> "$CALLS"
  until [ -e "$CALLS.stop" ]; do sleep 0.05; done
fi
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes, whose commands write what they are called with to CALLS."""
    commands = tmp_path / "bin"
    commands.mkdir()
    stand_ins = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": '#!/usr/bin/env bash\necho "scancel $*" >> "$CALLS"; touch "$CALLS.stop"\n',
    }
    for name, text in stand_ins.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (tmp_path / "script.sh").write_text(SCRIPT)
    slurm = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[1-2]", "SUBMIT_DIR": str(ROOT)}
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))},
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "SLURM_CPUS_ON_NODE": "2", "PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
        "LOG_DIR": str(tmp_path / "logs"), "CONTAINER_IMAGE": "none", "CONTAINER_RUNTIME": "env",
    }  # fmt: skip


def start(job: dict[str, str], **more: str) -> subprocess.Popen[str]:
    """The shared part with our script, as an sbatch file would call it."""
    script = Path(job["CALLS"]).parent / "script.sh"
    # With an image nothing is installed here; what would run it is left out.
    body = f"source {SLURM}/_job.sh; choose_container() {{ WRAP=() SRUN_FLAGS=(); }}; run_job {script} --lr 1e-4"
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", body], env={**job, **more}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def calls(job: dict[str, str], kind: str) -> list[str]:
    """Lines that begin with a word, without it."""
    lines = Path(job["CALLS"]).read_text().splitlines()
    return [line.removeprefix(f"{kind} ") for line in lines if line.startswith(f"{kind} ")]


def test_data_once_then_training_on_each_node_then_the_export(job: dict[str, str]) -> None:
    process = start(job)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    at = "of 2 at first:20007 with --lr 1e-4"
    steps = ["data node  ", "train node 0 ", "train node 1 ", "export node  "]
    assert calls(job, "script") == [f"{step}{at}" for step in steps]
    assert all("--cpus-per-task=2" in call for call in calls(job, "srun"))
    assert sorted(path.name for path in Path(job["LOG_DIR"]).iterdir()) == ["node-0.0.log", "node-1.0.log"]
    assert not calls(job, "scontrol") and "ended with exit code 0" in out


def wait_until_alive(job: dict[str, str], process: subprocess.Popen[str]) -> None:
    """Until the step that takes long has begun."""
    deadline = time.monotonic() + 30
    while not (Path(job["CALLS"]).is_file() and calls(job, "alive")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("step", ["data", "train", "export"])
def test_a_failure_ends_the_job_and_is_not_queued_again(job: dict[str, str], step: str) -> None:
    process = start(job, FAILING=step)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 1 and "exit code 1" in out
    assert calls(job, "script")[-1].startswith(step) and not calls(job, "scontrol")


@pytest.mark.parametrize(
    ("restarts", "queued"), [("0", ["requeue 7"]), ("3", [])], ids=["first", "as-often-as-allowed"]
)
def test_a_signal_reaches_the_ranks_and_the_job_queues_again(
    job: dict[str, str], restarts: str, queued: list[str]
) -> None:
    process = start(job, LONG="train", SLURM_RESTART_COUNT=restarts, MAX_RESTARTS="3", SLURM_JOB_NUM_NODES="1")
    wait_until_alive(job, process)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert calls(job, "scancel") == ["--signal=USR1 7"] and calls(job, "scontrol") == queued
    assert not any(call.startswith("export") for call in calls(job, "script")), "it is not finished"
    assert "stopped; " in out and (Path(job["LOG_DIR"]) / f"node-0.{restarts}.log").is_file()


def test_a_signal_during_the_data_lets_it_end_and_queues_again(job: dict[str, str]) -> None:
    process = start(job, LONG="data")
    wait_until_alive(job, process)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    Path(job["CALLS"] + ".stop").touch()
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert not calls(job, "scancel") and calls(job, "scontrol") == ["requeue 7"]
    assert [call.split()[0] for call in calls(job, "script")] == ["data"]


@pytest.mark.parametrize(
    ("settings", "wrap", "flags"),
    [
        ({}, "", ""),
        ({"CONTAINER_IMAGE": "i.sqsh", "CONTAINER_MOUNTS": "/data:/data"}, "", "--container-image i.sqsh"),
        ({"CONTAINER_IMAGE": "i.sif", "CONTAINER_RUNTIME": "apptainer"}, "apptainer exec --nv", ""),
    ],
    ids=["bare", "pyxis", "apptainer"],
)
def test_containers(settings: dict[str, str], wrap: str, flags: str) -> None:
    body = f'set -euo pipefail; source {SLURM}/_job.sh; choose_container; echo "${{WRAP[*]-}}|${{SRUN_FLAGS[*]-}}"'
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CONTAINER_")}
    done = subprocess.run(
        ["bash", "-c", body], env={**clean, **settings}, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found_wrap, found_flags = done.stdout.strip().split("|")
    assert found_wrap.startswith(wrap) and found_flags.startswith(flags)
    assert bool(found_wrap) == bool(wrap) and bool(found_flags) == bool(flags)
    if settings:
        assert f"{ROOT}:{ROOT}" in done.stdout


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_job_files_ask_for_a_signal_and_call_a_script_that_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "#SBATCH --signal=B:USR1@" in text and "#SBATCH --requeue" in text and "--ntasks-per-node=1" in text
    script = re.search(r"^run_job (\S+)", text, re.MULTILINE)
    assert script is not None and (ROOT / script[1]).is_file()
    subprocess.run(["bash", "-n", str(path)], check=True)
