#!/usr/bin/env bash
# The whole of SPDF as a chain of jobs, each after the success of the one before; on the login node:
#
#   launch/spdf.sh [--name=value ...] RECIPE TASK[,TASK...] [words ...]
#
#   preprocess.input='pile/*.jsonl.zst' preprocess.output=data/pile ...   options of tools/preprocess_data.py;
#                                      without any, the recipe's data are there already
#   section.key=value                  of the pre-training recipe
#   finetune.section.key=value         of every task's recipe; TASK.section.key=value of one
#   score.beams=4                      options of tools/evaluate.py
#   --dry-run                          print the commands, submit nothing
#
#   --nodes=N                          of pre-training; batches of fine-tuning fill one node
#
# Other --name=value go to sbatch, for the jobs with GPUs. The runs are OUTPUT, OUTPUT_TASK; the report OUTPUT_report.html.
SCRIPT=$0
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$SCRIPT")/common.sh"
ME=launch/$(basename "$SCRIPT") DRY=0 JOB=''

submit() { # WHAT DEPENDENCIES SBATCH_OPTION... SCRIPT WORD...: $JOB is the job's id; dependencies are a:b:c, or empty
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

gpu_options=() nodes=() words=() prepare=() scoring=() finetuning=()
for word in "$@"; do
  case $word in
    --dry-run) DRY=1 ;;
    --nodes=*) nodes=("$word") ;;
    --*=*) gpu_options+=("$word") ;;
    preprocess.*=*) word=${word#preprocess.}; prepare+=("--${word%%=*}" "${word#*=}") ;;
    score.*=*) word=${word#score.}; scoring+=("--${word%%=*}" "${word#*=}") ;;
    finetune.*=*) finetuning+=("${word#finetune.}") ;;
    *) words+=("$word") ;;
  esac
done
[[ ${words[0]:-=} != *=* && ${words[1]:-=} != *=* ]] ||
  die "which recipe and which tasks? write: $ME RECIPE TASK[,TASK...] [words ...]; recipes are $(tasks pretrain), tasks $(tasks)"
recipe=$(recipe_file "${words[0]}" pretrain) || exit $?
IFS=, read -ra tasks <<<"${words[1]}"
for task in "${tasks[@]}"; do recipe_file "$task" finetune >/dev/null || exit $?; done

own=() # words of the pre-training recipe
for word in "${words[@]:2}"; do
  for task in "${tasks[@]}"; do [[ $word != "$task".*=* ]] || continue 2; done
  own+=("$word")
done
shown=$(RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 "$SPDF_PYTHON" "$SPDF_ROOT/pretrain.py" "$recipe" "${own[@]}" --dry-run) || exit $?
run=$(sed -n '1s/^output: //p' <<<"$shown")
case $(basename "$recipe") in
  gpt3_xl*) script=pretrain_gpt3xl.sh ;;
  gpt3_6b7*) script=pretrain_gpt3_6b7.sh ;;
  *) script=pretrain_gpt2small.sh ;;
esac

((${#prepare[@]} == 0)) || submit preprocess '' tool.sh preprocess_data "${prepare[@]}"
submit pretrain "$JOB" "${gpu_options[@]}" "${nodes[@]}" "$script" "$recipe" "${own[@]}"
pretrained=$JOB runs=("$run") scored=''
for task in "${tasks[@]}"; do
  own=()
  for word in "${words[@]:2}"; do [[ $word != "$task".*=* ]] || own+=("${word#"$task".}"); done
  submit "finetune $task" "$pretrained" "${gpu_options[@]}" finetune.sh "$task" "$run" "output=${run}_$task" "${finetuning[@]}" "${own[@]}"
  submit "evaluate $task" "$JOB" "${gpu_options[@]}" evaluate.sh "$task" "${run}_$task" "${scoring[@]}"
  scored+=${scored:+:}$JOB runs+=("${run}_$task")
done
submit report "$scored" tool.sh report "${runs[@]}" --output "${run}_report.html"
