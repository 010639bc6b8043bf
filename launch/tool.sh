#!/usr/bin/env bash
# A tool as a job, on one node and without GPUs:  sbatch launch/tool.sh preprocess_data --input ... --output ...
#SBATCH --job-name=tool
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SCRIPT=$0 # sbatch runs a copy, beside which there is no common.sh
[[ -f $(dirname "$0")/common.sh ]] || SCRIPT=$(scontrol show job "${SLURM_JOB_ID:--}" | sed -n 's|^ *Command=\(.*/launch/[^/]*\.sh\).*|\1|p' | head -n 1)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
tool "$@"
