#!/bin/bash
# A Hugging Face directory to a Megatron checkpoint, on one node without GPUs.
#   sbatch slurm/convert.sh HF_DIR OUT_DIR [options of nrt convert]
# Streams: memory is a few times the largest tensor, but --verify loads the model.
#SBATCH --job-name=nrt-convert
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# shellcheck source-path=SCRIPTDIR source=common.sh
source "${NRT_ROOT:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
nrt_once convert "$@"
