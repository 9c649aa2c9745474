#!/bin/bash
# One rank, started by torchrun: rank.sh LOG_DIRECTORY
# Writes its output to rank-NNNN.log, the first rank's also to the job's, and an exit code that is not 0 with the
# node's name to rank-NNNN.exit, for torchrun turns every code into 1.
set -uo pipefail

readonly UNFINISHED=75
name=$1/rank-$(printf '%04d' "$RANK")

if ((RANK == 0)); then
  python -m nrt_megatron train "$1/recipe.yaml" 2>&1 | tee "$name.log"
else
  python -m nrt_megatron train "$1/recipe.yaml" >"$name.log" 2>&1
fi
code=${PIPESTATUS[0]}
((code == 0)) && exit 0
echo "$code $SLURMD_NODENAME" >"$name.exit"
((code == UNFINISHED)) && exit 0 # nothing went wrong: torchrun need not end the others
exit "$code"
