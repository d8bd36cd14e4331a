# Sourced by examples/slurm/*.sbatch, in the repository root on the first node of the allocation:
#   run_job SCRIPT [flags]   runs a script of examples/ over all nodes, and says how the job ends
#
# The script's steps are taken apart: `data` here, `train` on every node at once, `export` here. One torchrun per node
# meets the others at MASTER_ADDR:MASTER_PORT. Shortly before the time limit Slurm sends SIGUSR1 to this shell alone
# (#SBATCH --signal=B:USR1@SECONDS), which passes it on to the ranks: they save and end, and the job goes back into the
# queue. Started again, it goes on from what it saved (--auto-resume in the scripts).
# Settings (environment variables), next to those of the script:
#   MASTER_ADDR MASTER_PORT   where ranks meet; the first node, and a port of the job's own
#   LOG_DIR                   logs of each node (logs/JOB): node-NUMBER.RESTARTS.log
#   MAX_RESTARTS              do not go back into the queue more often than this (100)
#   CONTAINER_IMAGE           run inside this image: with pyxis (srun --container-image), or
#   CONTAINER_RUNTIME         apptainer or singularity: run the image with it instead
#   CONTAINER_MOUNTS          HOST:CONTAINER,... ; the repository is always there, under the same path

say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID}: $*"; }

# Fills WRAP (words before a command of a node) and SRUN_FLAGS.
choose_container() {
  WRAP=() SRUN_FLAGS=()
  [ -n "${CONTAINER_IMAGE:-}" ] || return 0
  local mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  if [ -n "${CONTAINER_RUNTIME:-}" ]; then
    WRAP=("$CONTAINER_RUNTIME" exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER_IMAGE")
  else
    SRUN_FLAGS=(--container-image "$CONTAINER_IMAGE" --container-mounts "$mounts" --container-workdir "$PWD")
  fi
  # What is installed is inside the image; nothing is installed here.
  export STEEL_PYTHON=${STEEL_PYTHON:-python3}
}

# The ranks save and end; torchrun and the shells around it ignore the signal (see on_each_node). The other steps would
# die of it: they end in their own time.
pass_signal_on() {
  STOPPED=yes
  [ "$STEP" = train ] || { say "SIGUSR1 during $STEP, which goes on"; return 0; }
  say "SIGUSR1: asking the ranks to save"
  scancel --signal=USR1 "$SLURM_JOB_ID"
}

# Runs a command as a job step in the background, so that this shell can take a signal meanwhile.
step() {
  # Without --cpus-per-task a task may use one core, whatever the job has.
  srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" ${SRUN_FLAGS[@]+"${SRUN_FLAGS[@]}"} "$@" &
  local pid=$! status=0
  # A signal ends the first wait, with a status above 128, while the step goes on.
  wait "$pid" || status=$?
  while [ "$status" -gt 128 ] && kill -0 "$pid" 2>/dev/null; do
    status=0
    wait "$pid" || status=$?
  done
  return "$status"
}

on_first_node() { step --nodes=1 --ntasks=1 "$@"; }

# One shell per node that ignores SIGUSR1, as torchrun behind it then does; ranks set a handler of their own.
on_each_node() {
  step --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 --output="$LOG_DIR/node-%t.$RESTARTS.log" \
    bash -c 'trap "" USR1; export NODE_RANK=$SLURM_PROCID; exec "$@"' node "$@"
}

run_job() {
  local script=$1 status=0
  shift
  export NNODES=$SLURM_JOB_NUM_NODES
  export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  RESTARTS=${SLURM_RESTART_COUNT:-0} LOG_DIR=${LOG_DIR:-logs/$SLURM_JOB_ID} STOPPED=no
  mkdir -p "$LOG_DIR"
  choose_container
  # Made once, and not by every node at the same time.
  [ -n "${CONTAINER_IMAGE:-}" ] || source examples/_environment.sh
  STEP=data
  trap pass_signal_on USR1
  say "$NNODES node(s), meeting at $MASTER_ADDR:$MASTER_PORT, restart $RESTARTS, logs in $LOG_DIR"
  STEPS=data on_first_node ${WRAP[@]+"${WRAP[@]}"} bash "$script" "$@" || status=$?
  if [ "$status" -eq 0 ] && [ "$STOPPED" = no ]; then
    STEP=train
    STEPS=train on_each_node ${WRAP[@]+"${WRAP[@]}"} bash "$script" "$@" || status=$?
  fi
  [ "$status" -eq 0 ] || { say "failed with exit code $status; see $LOG_DIR"; return "$status"; }
  if [ "$STOPPED" = yes ]; then
    [ "$RESTARTS" -lt "${MAX_RESTARTS:-100}" ] || { say "stopped; MAX_RESTARTS is reached, submit again to go on"; return 0; }
    say "stopped; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    return 0
  fi
  STEP=export
  STEPS=export on_first_node ${WRAP[@]+"${WRAP[@]}"} bash "$script" "$@" || status=$?
  say "ended with exit code $status"
  return "$status"
}
