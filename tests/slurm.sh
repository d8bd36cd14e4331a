#!/usr/bin/env bash
# A real Slurm on this one machine, with two emulated nodes: examples/slurm/pretrain_1b.sbatch over 2 nodes x 1 CPU rank
# is asked to stop in the middle, saves, goes back into the queue and ends with the weights of a run nobody disturbed.
#
#   bash tests/slurm.sh [FOLDER]      as root, on Debian or Ubuntu; a few minutes; not part of tests/run.sh
#
# What is missing (slurmctld slurmd slurm-client munge) is installed with apt-get; what is started is stopped at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$(id -u)" -eq 0 ] || { echo "error: Slurm's daemons need root; start this as root" >&2; exit 2; }
source examples/_environment.sh
FOLDER=$(realpath -m "${1:-$(mktemp -d)}")
HOST=$(hostname -s)

install_slurm() {
  command -v slurmctld slurmd sbatch munged > /dev/null && return
  echo "--- installing Slurm"
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
}

write_configuration() {
  mkdir -p "$FOLDER"/{etc,state,spool/n1,spool/n2,log}
  chown slurm: "$FOLDER/state"
  chmod 755 "$FOLDER"
  chmod 777 "$FOLDER/log"
  cat > "$FOLDER/etc/slurm.conf" << CONF
ClusterName=steel
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=slurm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmctldPort=16817
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.%n.pid
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
NodeName=n[1-2] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=[16821-16822] CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
  echo 'CgroupAutomount=no' > "$FOLDER/etc/cgroup.conf"
}

start_slurm() {
  export SLURM_CONF=$FOLDER/etc/slurm.conf
  install -d -o munge -g munge -m 755 /run/munge
  if ! munge -n > /dev/null 2>&1; then
    runuser -u munge -- /usr/sbin/munged
    STARTED_MUNGE=yes
  fi
  slurmctld -f "$SLURM_CONF"
  slurmd -f "$SLURM_CONF" -N n1
  slurmd -f "$SLURM_CONF" -N n2
  wait_for 60 "two idle nodes" nodes_idle
}

stop_slurm() {
  local file
  for file in "$FOLDER"/slurmd.*.pid "$FOLDER/slurmctld.pid" ${STARTED_MUNGE:+/run/munge/munged.pid}; do
    [ ! -s "$file" ] || kill "$(cat "$file")" 2> /dev/null || true
  done
}

nodes_idle() { [ "$(sinfo -h -N -o %t | grep -c '^idle$')" -eq 2 ]; }
state_of() { scontrol show job "$1" | grep -o 'JobState=[A-Z]*' | cut -d= -f2; }
in_state() { [[ " $2 " == *" $(state_of "$1") "* ]]; }
has_row() { grep -q "\"iteration\": $2," "$1/checkpoints/metrics.jsonl" 2> /dev/null; }

# wait_for SECONDS WHAT COMMAND...
wait_for() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || { echo "error: waited in vain for $what; logs in $FOLDER" >&2; exit 1; }
    sleep 0.5
  done
}

# Both nodes are this machine, so ranks meet at an address of its own; nothing is saved but when the job is asked to.
submit() {
  OUTPUT_DIR=$1 MASTER_ADDR=127.0.0.1 RANKS_PER_NODE=1 LOG_DIR=$1/logs OMP_NUM_THREADS=1 \
    TRAIN_ITERS=60 SAVE_INTERVAL=1000 EVAL_INTERVAL=1000 LOG_INTERVAL=5 GPUS_PER_NODE=0 \
    sbatch --parsable --nodes 2 --time 30 --output "$1.out" examples/slurm/pretrain_1b.sbatch --seed 7
}

compare() {
  "$PYTHON" - "$1" "$2" << 'PY'
import sys
from pathlib import Path

import torch

from megatron_steel.checkpoint.dcp_read import StoredTensors
from megatron_steel.checkpoint.files import find_checkpoint

left, right = (StoredTensors(find_checkpoint(Path(folder) / "checkpoints", None)[0]) for folder in sys.argv[1:])
assert left.tensors.keys() == right.tensors.keys()
names = [name for name in left.tensors if name.startswith(("embedding.", "decoder.", "output_layer."))]
wrong = [name for name in names if not torch.equal(left.read(name), right.read(name))]
print(f"{len(names)} tensors of weights compared, {len(wrong)} differ {wrong[:3]}")
sys.exit(bool(wrong))
PY
}

install_slurm
trap stop_slurm EXIT
write_configuration
start_slurm
echo "--- a run nobody disturbs"
WHOLE=$(submit "$FOLDER/whole")
wait_for 600 "the first job" in_state "$WHOLE" "COMPLETED FAILED"
tail -n 2 "$FOLDER/whole.out"
in_state "$WHOLE" COMPLETED
echo "--- a run that is asked to stop"
STOPPED=$(submit "$FOLDER/stopped")
wait_for 300 "iteration 20" has_row "$FOLDER/stopped" 20
scancel --batch --signal=USR1 "$STOPPED"
wait_for 120 "the job to be in the queue again" in_state "$STOPPED" "PENDING"
scontrol update job "$STOPPED" StartTime=now
wait_for 600 "the second job" in_state "$STOPPED" "COMPLETED FAILED"
cat "$FOLDER/stopped.out"
in_state "$STOPPED" COMPLETED
grep -q "restart 1" "$FOLDER/stopped.out"
[ "$(find "$FOLDER/stopped/checkpoints" -maxdepth 1 -name 'iter_*' | wc -l)" -eq 2 ] # one of them from the middle
compare "$FOLDER/whole" "$FOLDER/stopped"
echo "--- done: stopped, queued again and finished with the same weights"
