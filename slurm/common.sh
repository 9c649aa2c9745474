# shellcheck shell=bash
# What the job scripts share; sourced by them. Submit from the repository's root, or set NRT_ROOT to it.
#
# The environment of the ranks, by variable:
#   NRT_CONTAINER         image for pyxis/enroot; a squashfs file, for four steps start from it
#   NRT_CONTAINER_MOUNTS  what it sees besides the repository, e.g. /data,/scratch:/scratch
#   NRT_VENV              without a container: a virtual environment; default .venv, else the python on PATH
#   NRT_MASTER_PORT       port of the first node where ranks meet; default: drawn from the job's id
# NCCL, CUDA and other variables reach the ranks as they are set at submission.
#
# Exit codes of a rank and of a job: 0 the run is complete; 75 it was asked to stop, has checkpointed and is not
# complete; 2 a mistake of the user; anything else a failure. Only 75 requeues the job here; Slurm does by itself
# when a node dies. A run continues from its last checkpoint, so submitting the same command again is always right.

set -euo pipefail

readonly USER_MISTAKE=2 UNFINISHED=75
NRT_ROOT=$(realpath "${NRT_ROOT:-$SLURM_SUBMIT_DIR}")
export NRT_ROOT PYTHONPATH="$NRT_ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
cd "$NRT_ROOT"

stop_asked='' # the signal, once there was one
container=()

say() { echo "nrt: $*"; }
die() {
  echo "nrt: $*" >&2
  exit "$USER_MISTAKE"
}

# Makes `python` and `torchrun` those of the ranks.
use_environment() {
  if [[ -n ${NRT_CONTAINER:-} ]]; then
    local mounts="$NRT_ROOT:$NRT_ROOT${NRT_CONTAINER_MOUNTS:+,$NRT_CONTAINER_MOUNTS}"
    container=("--container-image=$NRT_CONTAINER" "--container-mounts=$mounts" "--container-workdir=$NRT_ROOT")
    return
  fi
  local venv=${NRT_VENV:-$NRT_ROOT/.venv}
  if [[ -x $venv/bin/python ]]; then
    export PATH="$venv/bin:$PATH"
  elif [[ -n ${NRT_VENV:-} ]]; then
    die "NRT_VENV=$NRT_VENV: no bin/python there; set it to a virtual environment, or unset it for .venv"
  elif ! command -v torchrun >/dev/null; then
    die "no .venv in $NRT_ROOT and no torchrun on PATH; run make setup, or set NRT_VENV or NRT_CONTAINER"
  fi
}

# One process in the ranks' environment, on the first node.
once() {
  if ((${#container[@]})); then
    srun --nodes=1 --ntasks=1 --cpu-bind=none "${container[@]}" "$@"
  else
    "$@"
  fi
}

# A scalar of the resolved recipe: recipe_value KEY, or recipe_value SECTION KEY.
recipe_value() {
  awk -v section="${2:+$1}" -v key="${2:-$1}:" '
    /^[^ ]/ { inside = ($1 == section ":") }
    (section == "" ? /^[^ ]/ : inside) && $1 == key {
      sub(/^[^:]*: */, ""); gsub(/^["'\'']|["'\'']$/, ""); print; exit
    }
  ' <<<"$resolved"
}

# GPUs that this job has on each node; where Slurm does not manage GPUs, what the driver shows.
gpus_per_node() {
  if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
    echo "$SLURM_GPUS_ON_NODE"
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus | grep --count '^GPU' || true
  else
    echo 0
  fi
}

# Sets ranks_per_node. The recipe says nodes and GPUs; an allocation of another size ends the job here.
check_allocation() {
  local nodes gpus ranks have_gpus
  nodes=$(recipe_value cluster num_nodes) gpus=$(recipe_value cluster gpus_per_node) have_gpus=$(gpus_per_node)
  if ((nodes != SLURM_JOB_NUM_NODES)); then
    die "cluster.num_nodes=$nodes, but the job has $SLURM_JOB_NUM_NODES nodes;" \
      "submit with sbatch --nodes=$nodes, or set cluster.num_nodes=$SLURM_JOB_NUM_NODES"
  elif ((gpus == 0)); then
    ranks=$(recipe_value cluster cpu_ranks)
    ((ranks % nodes == 0)) || die "cluster.cpu_ranks=$ranks: does not divide over $nodes nodes; set a multiple of $nodes"
    ((have_gpus == 0)) || say "the recipe runs on CPUs: $have_gpus GPUs on each node stay idle"
    ranks_per_node=$((ranks / nodes))
  elif ((gpus != have_gpus)); then
    die "cluster.gpus_per_node=$gpus, but the job has $have_gpus GPUs on a node;" \
      "set cluster.gpus_per_node=$have_gpus, or submit to nodes with $gpus"
  else
    ranks_per_node=$gpus
  fi
}

# What a later reader needs to know about this attempt. No variable that may hold a secret.
environment_facts() {
  echo "date: $(date --iso-8601=seconds)"
  echo "job: $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, nodes $SLURM_JOB_NODELIST"
  echo "commit: $(git rev-parse HEAD 2>/dev/null || echo unknown)"
  git status --short --untracked-files=no 2>/dev/null | sed 's/^/changed since: /'
  echo "container: ${NRT_CONTAINER:-none}"
  command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
  env | grep -E '^(NCCL|GLOO|CUDA|NVTE|TORCH|OMP|UCX|FI|NRT|SLURM_JOB|SLURM_GPUS)_[A-Z0-9_]*=' | sort
  once python -c '
import platform
from importlib.metadata import distributions
print("python:", platform.python_version())
print(*sorted({f"{d.name}=={d.version}" for d in distributions()}, key=str.lower), sep="\n")'
}

# `nrt_train DEFAULT_RECIPE [RECIPE] [key=value ...]`: the whole job.
nrt_train() {
  local recipe=$1 resolved ranks_per_node logs
  shift
  if [[ ${1:-} == *.y?(a)ml && $1 != *=* ]]; then
    recipe=$1
    shift
  fi
  trap 'ask_to_stop USR1' USR1
  trap 'ask_to_stop TERM' TERM
  use_environment
  resolved=$(once python -m nrt_megatron train "$recipe" "$@" --dry-run)
  check_allocation
  logs=$(realpath -m "$(recipe_value run_dir)")/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  mkdir -p "$logs"
  say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $SLURM_JOB_NUM_NODES nodes x $ranks_per_node ranks, $recipe $*"
  say "one log per rank and the environment in $logs"
  echo "$resolved" | tee "$logs/recipe.yaml"
  environment_facts >"$logs/environment.txt" || say "some facts of the environment are missing; going on"
  once python -m nrt_megatron plan "$logs/recipe.yaml" 2>&1 | tee "$logs/plan.txt" || say "nrt plan failed; going on"
  if [[ -z $stop_asked ]]; then
    run_ranks "$logs"
  fi
  conclude "$logs"
}

# Passes the signal on to the ranks, again and again until they have ended: one that is still starting is deaf. All of
# it is one process group, so that `conclude` ends a call that is under way too: scancel repeats by itself what a job
# that is completing refuses, and would stop the ranks of the next start.
ask_to_stop() {
  [[ -z $stop_asked ]] || return 0
  stop_asked=$1
  say "SIG$1: the ranks are asked to checkpoint and stop"
  # shellcheck disable=SC2016 # the loop expands its own
  setsid bash -c 'while :; do timeout --foreground 5 scancel --signal=USR1 "$SLURM_JOB_ID"; sleep 5; done' &>/dev/null &
  asking=$!
}

# One torchrun per node; sets srun_code.
run_ranks() {
  local step
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  MASTER_PORT=${NRT_MASTER_PORT:-$((15000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 15000))}
  export MASTER_ADDR MASTER_PORT
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    --cpu-bind=none "${container[@]}" bash slurm/node.sh "$ranks_per_node" "$1" &
  step=$!
  while kill -0 "$step" 2>/dev/null; do
    wait "$step" || true # returns as well when a signal is trapped
  done
  srun_code=0
  wait "$step" || srun_code=$? # bash remembers how it ended
}

# Ends the job with what became of its ranks.
conclude() {
  local logs=$1 code=${srun_code:-0}
  [[ -z ${asking:-} ]] || kill -KILL -- "-$asking" 2>/dev/null || true
  report_failures "$logs"
  if a_rank_ended_with "$USER_MISTAKE" "$logs"; then
    exit "$USER_MISTAKE"
  elif [[ -n $stop_asked && -z ${srun_code:-} ]]; then # before ranks were started
    requeue
  elif a_rank_ended_with "$UNFINISHED" "$logs" && [[ -n $stop_asked || $code == 0 ]]; then
    requeue # also when others failed: ranks that are starting leave at once, and their peers miss them
  elif ((code)); then
    say "failed: srun ended with exit code $code; logs in $logs"
    exit 1
  fi
  say "complete"
  exit 0
}

a_rank_ended_with() { grep -qs "^$1 " "$2"/rank-*.exit; }

# One line for each rank that failed, and the end of the first one's log. A rank's end is "CODE NODE" in its
# .exit file, without which torchrun or srun knows more.
report_failures() {
  local file code node first=''
  for file in "$1"/rank-*.exit; do
    [[ -e $file ]] || continue
    read -r code node <"$file"
    ((code != UNFINISHED)) || continue
    say "$(basename "$file" .exit) on $node ended with exit code $code"
    first=${first:-${file%.exit}.log}
  done
  if [[ -n $first ]]; then
    tail --lines=30 "$first" || true
  elif ((${srun_code:-0})); then
    tail --lines=10 "$1"/torchrun-*.log || true
  fi
}

# The job again, in the queue under its own id. Not when it is being cancelled or requeued already.
requeue() {
  local state
  state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo unknown)
  if [[ $state != RUNNING ]]; then
    say "unfinished; the job is $state and left alone"
  elif scontrol requeue "$SLURM_JOB_ID"; then
    say "unfinished; requeued"
  else
    say "unfinished; could not requeue: submit the same command again to continue"
  fi
  exit "$UNFINISHED"
}

# `nrt_once COMMAND ARGUMENT...`: a job of one process.
nrt_once() {
  use_environment
  say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST: nrt $*"
  once python -m nrt_megatron "$@"
}
