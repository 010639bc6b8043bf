#!/usr/bin/env bash
# All of SPDF as a chain of jobs, each started after the success of the one before. Run it on the login node:
#
#   launch/spdf.sh [--name=value ...] RECIPE TASK[,TASK...] [argument ...]
#
#   preprocess.input='pile/*.jsonl.zst' preprocess.output=data/pile ...   options of tools/preprocess_data.py;
#                                      without any, the recipe's data must exist
#   section.key=value                  override of the pre-training recipe
#   finetune.section.key=value         override of every task's recipe; TASK.section.key=value of one
#   score.beams=4                      options of tools/evaluate.py
#   --dry-run                          print the commands, submit nothing
#
#   --nodes=N                          for pre-training; batches of fine-tuning fill one node
#
# Other --name=value go to sbatch, for the jobs with GPUs. Runs are named OUTPUT and OUTPUT_TASK, the report
# OUTPUT_report.html.
SCRIPT=$0
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
ME=launch/$(basename "$SCRIPT") DRY=0 JOB=''

submit() { # NAME DEPENDENCIES SBATCH_OPTION... SCRIPT ARGUMENT...: submits a job after jobs a:b:c, or none, and sets $JOB to its id
  local what=$1 after=${2:+--dependency=afterok:$2} options=()
  shift 2
  while [[ $1 = --* ]]; do options+=("$1"); shift; done
  local command=(sbatch --parsable ${after:+"$after" --kill-on-invalid-dep=yes} --job-name="${what// /_}" "${options[@]}" "$SPDF_ROOT/launch/$1" "${@:2}")
  if ((DRY)); then
    JOB="<$what>"
    echo "${command[*]@Q}"
    return
  fi
  JOB=$("${command[@]}") || die "sbatch refused the job '$what', see above; cancel those that are waiting: scancel <ids above>" 1
  JOB=${JOB%%;*}
  echo "$JOB $what${2:+: $*}"
}

tuning_words() { # TASK: sets $tuning to the overrides of its recipe, of which those of the task are stronger than those of all
  local argument one=()
  for argument in "${arguments[@]:2}"; do [[ $argument != "$1".*=* ]] || one+=("${argument#"$1".}"); done
  tuning=("output=${run}_$1")
  for argument in "${finetuning[@]}"; do
    weaker "$argument" "${one[@]}"
    tuning+=("${WEAKER[@]}")
  done
  tuning+=("${one[@]}")
}

gpu_options=() nodes=() arguments=() prepare=() scoring=() finetuning=()
for argument in "$@"; do
  case $argument in
    --dry-run) DRY=1 ;;
    --nodes=*) nodes=("$argument") ;;
    --*=*) gpu_options+=("$argument") ;;
    preprocess.*=*) argument=${argument#preprocess.}; prepare+=("--$argument") ;;
    score.*=*) argument=${argument#score.}; scoring+=("--$argument") ;;
    finetune.*=*) finetuning+=("${argument#finetune.}") ;;
    *) arguments+=("$argument") ;;
  esac
done
[[ ${arguments[0]:-=} != *=* && ${arguments[1]:-=} != *=* ]] ||
  die "which recipe and which tasks? write: $ME RECIPE TASK[,TASK...] [section.key=value ...]; recipes are $(tasks pretrain), tasks $(tasks)"
recipe_file recipe "${arguments[0]}" pretrain
IFS=, read -ra tasks <<<"${arguments[1]}"
for task in "${tasks[@]}"; do
  [[ $task != *.yaml ]] || die "in a chain, TASK is a name under configs/finetune, which names runs and scores, and not a file such as $task; choose from $(tasks)"
  recipe_file found "$task" finetune
done

own=() # overrides of the pre-training recipe
for argument in "${arguments[@]:2}"; do
  for task in "${tasks[@]}"; do [[ $argument != "$task".*=* ]] || continue 2; done
  own+=("$argument")
done
words=() found='' tuning=()
RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 words_of words "$SPDF_PYTHON" "$SPDF_ROOT/pretrain.py" "$recipe" "${own[@]}" --print-output
as_path run "${words[0]}"
for task in "${tasks[@]}"; do # before anything is submitted
  recipe_file found "$task" finetune
  tuning_words "$task"
  RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 words_of words "$SPDF_PYTHON" "$SPDF_ROOT/finetune.py" "$found" "checkpoint=$run" "${tuning[@]}" --print-output
done
case $(basename "$recipe") in
  gpt3_xl*) script=pretrain_gpt3xl.sh ;;
  gpt3_6b7*) script=pretrain_gpt3_6b7.sh ;;
  llama*) script=pretrain_llama.sh ;;
  *) script=pretrain_gpt2small.sh ;;
esac

((${#prepare[@]} == 0)) || submit preprocess '' tool.sh preprocess_data "${prepare[@]}"
submit pretrain "$JOB" "${gpu_options[@]}" "${nodes[@]}" "$script" "$recipe" "${own[@]}"
pretrained=$JOB runs=("$run") scored=''
for task in "${tasks[@]}"; do
  tuning_words "$task"
  submit "finetune $task" "$pretrained" "${gpu_options[@]}" finetune.sh "$task" "$run" "${tuning[@]}"
  submit "evaluate $task" "$JOB" "${gpu_options[@]}" evaluate.sh "$task" "${run}_$task" "${scoring[@]}"
  scored+=${scored:+:}$JOB runs+=("${run}_$task")
done
submit report "$scored" tool.sh report "${runs[@]}" --output="${run}_report.html"
