#!/usr/bin/env bash
# Scores of a run on a task:  sbatch launch/evaluate.sh TASK RUN [options of tools/evaluate.py]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SCRIPT=$0 # sbatch runs a copy, beside which there is no common.sh
[[ -f $(dirname "$0")/common.sh ]] || SCRIPT=$(scontrol show job "${SLURM_JOB_ID:--}" | sed -n 's|^ *Command=\(.*/launch/[^/]*\.sh\).*|\1|p' | head -n 1)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
evaluate "$@"
