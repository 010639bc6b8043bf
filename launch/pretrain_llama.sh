#!/usr/bin/env bash
# Llama-3.2-1B, 75% sparse:  sbatch [--nodes=4 ...] launch/pretrain_llama.sh [RECIPE.yaml] [section.key=value ...]
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
SCRIPT=$0 # sbatch runs a copy, beside which there is no common.sh
[[ -f $(dirname "$0")/common.sh ]] || SCRIPT=$(scontrol show job "${SLURM_JOB_ID:--}" | sed -n 's|^ *Command=\(.*/launch/[^/]*\.sh\).*|\1|p' | head -n 1)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
pretrain llama_3_2_1b_s75 "$@"
