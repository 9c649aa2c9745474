#!/bin/bash
# torchrun of one node, started by srun: node.sh RANKS_PER_NODE LOG_DIRECTORY
set -euo pipefail

# torchrun would end its ranks 30 s after SIGTERM, and die of SIGUSR1. Ranks get the signals from Slurm and set
# handlers of their own; everything in between inherits that they are ignored.
trap '' USR1 TERM

exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$1" \
  --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --signals-to-handle=SIGINT \
  --no-python bash slurm/rank.sh "$2" 2>"$2/torchrun-$SLURMD_NODENAME.log"
