#!/bin/bash
# A checkpoint to a Hugging Face directory for release, on one node without GPUs.
#   sbatch slurm/export.sh CHECKPOINT_DIR|RUN_DIR OUT_DIR [options of nrt export]
# Of a run directory the latest checkpoint is taken. Streams: memory is a few times the largest tensor, but
# --verify loads the model.
#SBATCH --job-name=nrt-export
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
(($# >= 2)) || die "export.sh: give CHECKPOINT_DIR or RUN_DIR, and OUT_DIR"
checkpoint=$1
if [[ -f $1/checkpoints/latest ]]; then
  checkpoint=$1/checkpoints/$(<"$1/checkpoints/latest")
fi
nrt_once export "$checkpoint" "${@:2}"
