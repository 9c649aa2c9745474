#!/bin/bash
# Submits a whole release as a chain of jobs, each after the success of the one before: convert, train, export.
#   slurm/release.sh HF_DIR WORK_DIR [RECIPE] [key=value ...]
# From the repository's root, as with sbatch.
# WORK_DIR gets base/ (the converted model), run/ (the run directory) and release/ (for the Hugging Face hub).
# A model that is converted already is not converted again, so the same command continues a broken chain.
#   NRT_JOB   the training script, default slurm/nrt_70b.sh
# Account, partition and the like: Slurm's own variables (SBATCH_ACCOUNT, SBATCH_PARTITION, ...).
set -euo pipefail

if (($# < 2)); then
  sed -n 's/^# *\(slurm\/release.sh .*\)/usage: \1/p' "$0" >&2
  exit 2
fi
hf_dir=$(realpath "$1") work=$(realpath -m "$2")
shift 2

submit() { sbatch --parsable --kill-on-invalid-dep=yes "$@"; }

after=()
if [[ ! -e $work/base/meta.json ]]; then
  convert=$(submit slurm/convert.sh "$hf_dir" "$work/base")
  after=("--dependency=afterok:${convert%;*}")
fi
train=$(submit "${after[@]}" "${NRT_JOB:-slurm/nrt_70b.sh}" "$@" "policy.model.path=$work/base" "run_dir=$work/run")
export_=$(submit "--dependency=afterok:${train%;*}" slurm/export.sh "$work/run" "$work/release")
echo "convert ${convert:-done}, train $train, export $export_; the release will be in $work/release"
