#!/bin/bash
# Native Reasoning Training of Llama-3.1-70B on 16 nodes of 8 GPUs.
#   sbatch slurm/nrt_70b.sh [RECIPE] [key=value ...]
# sbatch's own options go before the script's name and override the lines below, e.g. --nodes=32 --time=12:00:00.
# The run is asked to stop 30 minutes before its time limit, for a step and a checkpoint; with another limit, or steps
# that `nrt plan` says are longer, give --signal=B:USR1@SECONDS as well.
# Container, virtual environment and exit codes: slurm/common.sh.
#SBATCH --job-name=nrt-70b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# shellcheck source-path=SCRIPTDIR source=common.sh
source "${NRT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
nrt_train recipes/nrt-llama3.1-70b-16n8g-tp8pp4-fp8.yaml "$@"
