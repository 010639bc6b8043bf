#!/usr/bin/env bash
# A sweep, one run for each array element:  sbatch --array=0-11 launch/finetune_sweep.sh TASK RUN [section.key=value ...]
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --array=0-11
#SBATCH --output=%x-%A_%a.out
SCRIPT=$0 # sbatch runs a copy, beside which there is no common.sh
[[ -f $(dirname "$0")/common.sh ]] || SCRIPT=$(scontrol show job "${SLURM_JOB_ID:--}" | sed -n 's|^ *Command=\(.*/launch/[^/]*\.sh\).*|\1|p' | head -n 1)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
finetune_sweep "$@"
