# shellcheck shell=bash
# Shared by all batch scripts: settings, checks before ranks start, the start of ranks, and requeueing by exit code.
# docs/slurm.md is the manual. launch/site.sh, which git ignores, holds the settings of a site.
set -uo pipefail

SPDF_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export SPDF_ROOT
# This checkout's package, whatever an environment or a container has installed.
export PYTHONPATH=$SPDF_ROOT${PYTHONPATH:+:$PYTHONPATH}
die() { echo "${ME:-launch}: $1" >&2; exit "${2:-2}"; }
[[ $SPDF_ROOT != *:* ]] || die "the path of the checkout, $SPDF_ROOT, has a colon, which ends a directory in PYTHONPATH; move the checkout"
# shellcheck source=/dev/null
[[ ! -f $SPDF_ROOT/launch/site.sh ]] || source "$SPDF_ROOT/launch/site.sh"

# ---- Settings. Export them before sbatch, or set them in launch/site.sh.
if [[ -z ${SPDF_PYTHON:-} ]]; then # the interpreter, as the ranks see it
  if [[ -z ${SPDF_CONTAINER:-} && -x $SPDF_ROOT/.venv/bin/python ]]; then SPDF_PYTHON=$SPDF_ROOT/.venv/bin/python; else SPDF_PYTHON=python3; fi
fi
command -v "$SPDF_PYTHON" >/dev/null || [[ -n ${SPDF_CONTAINER:-} ]] || die "there is no Python at $SPDF_PYTHON; export SPDF_PYTHON=<the interpreter the project is installed for>"
SPDF_DEVICE=${SPDF_DEVICE:-gpu}       # cpu: no GPUs, over gloo, to try things out
SPDF_CONTAINER=${SPDF_CONTAINER:-}    # *.sif: Apptainer; anything else: an image for Pyxis/Enroot; empty: none
SPDF_MOUNTS=${SPDF_MOUNTS:-}          # further directories in the container, comma-separated: /data,/scratch
SPDF_EXIT_GRACE_SECONDS=${SPDF_EXIT_GRACE_SECONDS:-30} # from the end of the first rank until the others are killed
SPDF_SRUN=${SPDF_SRUN:-}              # further options of srun, such as --cpu-bind=verbose --mpi=none

INTERACTIVE_STEP=4294967290 # number of the step that salloc opens, SLURM_INTERACTIVE_STEP in slurm.h

network() { # sets up NCCL and gloo. NCCL finds InfiniBand by itself; set a variable only if it chooses wrongly
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron-Core's overlap relies on launch order
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1} # a failed collective ends its rank
  export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} # collectives remembered when one times out
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # INFO prints the interfaces and protocols it takes
  # export NCCL_SOCKET_IFNAME=ib0   # interface of NCCL's bootstrap; with a wrong one, ranks hang or are refused
  # export GLOO_SOCKET_IFNAME=ib0   # the same for gloo, over which ranks agree on checkpoints
  # export NCCL_IB_HCA=mlx5         # InfiniBand adapters to use, if some are for storage
  # export NCCL_IB_TIMEOUT=22       # 4.096 us x 2^22 = 17 s for a reply; raise it on large or busy fabrics
  # export NCCL_NET_GDR_LEVEL=PHB   # largest distance of GPU and adapter for GPUDirect RDMA
  # export NCCL_IB_DISABLE=1        # sockets only, to find out if the fabric is at fault
}

# ---- Entry points, one for each script.

pretrain() { # RECIPE ARGUMENT...: pre-trains; a first argument that ends in .yaml replaces the recipe
  local recipe=$1
  shift
  begin "$@"
  [[ ${ARGUMENTS[0]:-} != *.yaml ]] || { recipe=${ARGUMENTS[0]}; ARGUMENTS=("${ARGUMENTS[@]:1}"); }
  recipe_file recipe "$recipe" pretrain
  weaker parallel.data=auto "${ARGUMENTS[@]}"
  train pretrain.py "$recipe" "${WEAKER[@]}" "${ARGUMENTS[@]}"
}

finetune() { # TASK RUN OVERRIDE...: fine-tunes a run on a task, which is a name under configs/finetune or a .yaml file
  begin "$@"
  local task=${ARGUMENTS[0]:-} run=${ARGUMENTS[1]:-}
  [[ -n $task && -n $run && $run != *=* ]] || die "which task and which run? write: sbatch launch/finetune.sh TASK RUN [section.key=value ...], TASK one of $(tasks)"
  local recipe
  recipe_file recipe "$task" finetune
  weaker parallel.data=auto "${ARGUMENTS[@]:2}"
  train finetune.py "$recipe" "checkpoint=$run" "${WEAKER[@]}" "${ARGUMENTS[@]:2}"
}

finetune_sweep() { # TASK RUN OVERRIDE...: runs one combination of the recipe's `sweep:` in each element of the job array
  begin "$@"
  local task=${ARGUMENTS[0]:-} run=${ARGUMENTS[1]:-} recipe trial sweep
  [[ -n $task && -n $run && $run != *=* ]] || die "which task and which run? write: sbatch --array=0-11 launch/finetune_sweep.sh TASK RUN [section.key=value ...], TASK one of $(tasks)"
  recipe_file recipe "$task" finetune
  weaker parallel.data=auto "${ARGUMENTS[@]:2}"
  sweep=("$recipe" "checkpoint=$run" "${WEAKER[@]}" "${ARGUMENTS[@]:2}")
  words_of trial once "$SPDF_PYTHON" "$SPDF_ROOT/tools/sweep.py" "${sweep[@]}" --index "${SLURM_ARRAY_TASK_ID:-0}" --words
  AFTERWARDS=("$SPDF_PYTHON" "$SPDF_ROOT/tools/sweep.py" "${sweep[@]}" --select)
  train finetune.py "$recipe" "${trial[@]}"
}

weaker() { # WORD OVERRIDE...: sets WEAKER to the override WORD, or to nothing where another gives its key
  local word
  WEAKER=("$1")
  for word in "${@:2}"; do [[ $word != "${1%%=*}"=* ]] || WEAKER=(); done
}

evaluate() { # TASK RUN OPTION...: scores the best checkpoint of a run on a task's test split, with options of tools/evaluate.py
  begin "$@"
  local task=${ARGUMENTS[0]:-} run=${ARGUMENTS[1]:-}
  [[ -n $task && -n $run ]] || die "which task and which run? write: sbatch launch/evaluate.sh TASK RUN [options of tools/evaluate.py]"
  as_path run "$run"
  work "$SPDF_PYTHON" "$SPDF_ROOT/tools/evaluate.py" "$run" --task="$task" "${ARGUMENTS[@]:2}"
}

tool() { # NAME OPTION...: runs one of tools/*.py in one process without GPUs
  SPDF_DEVICE=cpu
  begin "$@"
  [[ -f $SPDF_ROOT/tools/${ARGUMENTS[0]:-}.py ]] || die "which tool? write: sbatch launch/tool.sh NAME [its options], NAME one of $(cd "$SPDF_ROOT/tools" && echo [a-z]*.py | sed 's/\.py//g')"
  NODES=1 TASKS=1
  work "$SPDF_PYTHON" "$SPDF_ROOT/tools/${ARGUMENTS[0]}.py" "${ARGUMENTS[@]:1}"
}

# ---- Course of a job.

begin() { # ARGUMENT...: parses the arguments, and checks job, GPUs, head node and port
  ME=launch/$(basename "$SCRIPT")
  DRY=0 STOPPING=0 CODE=0 ARGUMENTS=() SBATCH_ARGUMENTS=() AFTERWARDS=()
  local argument
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY=1 ;;
      --nodes=* | --ntasks=* | --ntasks-per-node=* | --array=*) if [[ -z ${SLURM_JOB_ID:-} ]]; then SBATCH_ARGUMENTS+=("$argument"); else ARGUMENTS+=("$argument"); fi ;;
      *) ARGUMENTS+=("$argument") ;;
    esac
  done
  if ((DRY)); then
    NODES=$(option nodes 1) TASKS=$(option ntasks $(($(option nodes 1) * $(option ntasks-per-node 1))))
    return
  fi
  JOB=${SLURM_ARRAY_TASK_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} JOB=${JOB:-${SLURM_JOB_ID:-}} # an array's last element has the array's id
  [[ -n $JOB ]] || die "not in a Slurm job; submit it: sbatch $ME ${*@Q}, or look at what it would do: $ME ${*@Q} --dry-run"
  ((${SLURM_HET_SIZE:-1} == 1)) || die "job $JOB is heterogeneous ($SLURM_HET_SIZE components), and ranks would start in its first component only; submit a job without ':', whose nodes are alike"
  # the variables of a step also reach a job that is submitted in it
  [[ -z ${SLURM_STEP_ID:-} || $SLURM_STEP_ID = "$INTERACTIVE_STEP" ]] || ! scontrol show step "$SLURM_JOB_ID.$SLURM_STEP_ID" >/dev/null 2>&1 ||
    die "this shell is step $SLURM_STEP_ID of job $JOB (srun --pty) and holds its CPUs, so that ranks would wait for them for ever; submit with sbatch $ME, or start it in the shell that salloc opens"
  NODES=${SLURM_JOB_NUM_NODES:-1}
  TASKS=${SLURM_NTASKS:-$((NODES * ${SLURM_NTASKS_PER_NODE:-1}))} # --ntasks-per-node is a limit where both are given
  [[ $SPDF_DEVICE = cpu || -z ${SLURMD_NODENAME:-} ]] || timeout 60 nvidia-smi -L >/dev/null 2>&1 || # salloc's shell may be on the login node
    die "$(hostname) has no GPU (nvidia-smi -L finds none within 60 s); ask for some with --gpus-per-node, or export SPDF_DEVICE=cpu to try things out"
  [[ $SPDF_DEVICE != cpu ]] || export CUDA_VISIBLE_DEVICES=
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
  network
  export MASTER_ADDR=${MASTER_ADDR:-$(head_node)} MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
  getent ahosts "${MASTER_ADDR:-.}" >/dev/null ||
    die "the head node '${MASTER_ADDR}' cannot be resolved on $(hostname); export MASTER_ADDR=<a name or address of the first node that all nodes know>"
  ! { : <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT"; } 2>/dev/null ||
    die "port $MASTER_PORT of the head node $MASTER_ADDR is taken; export MASTER_PORT=<a free port>"
  trap 'stop USR1' USR1
  trap 'stop TERM' TERM
  echo "== job $JOB on ${SLURM_JOB_NODELIST:-?}, $TASKS ranks, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"
}

train() { # SCRIPT RECIPE OVERRIDE...: checks in one process, starts the ranks, and requeues or ends by their exit code
  COMMAND=("$SPDF_PYTHON" "$SPDF_ROOT/$1" "${@:2}")
  if ((DRY)); then
    RANK=0 WORLD_SIZE=$TASKS LOCAL_RANK=0 "${COMMAND[@]}" --dry-run || exit $?
    show_command
    exit 0
  fi
  local run
  RANK=0 WORLD_SIZE=$TASKS LOCAL_RANK=0 words_of run once "${COMMAND[@]}" --preflight
  if ((STOPPING)); then CODE=75; else step "${COMMAND[@]}"; fi
  case $CODE in
    0) ((${#AFTERWARDS[@]} == 0)) || once "${AFTERWARDS[@]}" || CODE=$? ;;
    2) echo "$ME: bad input, see above; the job is not started again" >&2 ;;
    3) echo "$ME: stopped by a guard, see above; the job is not started again" >&2 ;;
    75) requeue "the run was asked to stop and has saved" ;;
    *) ((STOPPING)) && requeue "the run was asked to stop and ended with exit code $CODE"
      requeue "the run ended with exit code $CODE" "${run[0]}" ;;
  esac
  exit "$CODE"
}

work() { # COMMAND...: runs a command other than training, and requeues it if it was stopped ahead of the time limit
  COMMAND=("$@")
  if ((DRY)); then show_command; exit 0; fi
  step "${COMMAND[@]}"
  ((CODE == 0 || ! STOPPING)) || requeue "stopped with exit code $CODE"
  exit "$CODE"
}

requeue() { # REASON [RUN]: puts the job back into the queue, unless it was canceled or the run makes no progress
  [[ -z ${2:-} ]] || once "$SPDF_PYTHON" -m megatron_spdf.resilience.restarts "$2" || exit 3
  local state
  state=$(scontrol show job "$JOB" 2>/dev/null | sed -n 's/^ *JobState=\([A-Z]*\).*/\1/p' | head -n 1)
  [[ $state = RUNNING ]] || { echo "$ME: $1; the job is $state, so it is not started again" >&2; exit "$CODE"; }
  echo "== $1; back into the queue, $(date -Is)"
  scontrol requeue "$JOB" || die "$1, but the job cannot be requeued (scontrol, see above); submit it again: it goes on where it was" 1
  sleep 60 # Slurm ends this shell
  exit "$CODE"
}

# ---- Helpers.

step() { # COMMAND...: starts one process for each GPU, and sets $CODE to their exit code
  local flags=(--nodes="$NODES" --ntasks="$TASKS" --distribution=block --kill-on-bad-exit=0 --wait="$SPDF_EXIT_GRACE_SECONDS" --label) child
  [[ $SPDF_EXIT_GRACE_SECONDS -gt 0 ]] || flags+=(--kill-on-bad-exit=1)
  [[ -z ${SLURM_CPUS_PER_TASK:-} ]] || flags+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # since 22.05 srun does not inherit it
  contain flags "$@"
  # shellcheck disable=SC2086 # a list of options
  srun "${flags[@]}" $SPDF_SRUN "${CONTAINED[@]}" &
  child=$! CHILD=$!
  while wait "$child"; CODE=$?; kill -0 "$child" 2>/dev/null; do :; done # a trapped signal ends wait before srun ends
  CHILD=
}

stop() { # SIGNAL: asks the ranks to save and end. srun forwards USR1 to all of them, but ends the step on TERM
  STOPPING=1
  echo "== got $1, $(date -Is)"
  [[ -z ${CHILD:-} ]] || kill -USR1 "$CHILD" 2>/dev/null
}

once() { # COMMAND...: runs one process on this node, in the container if there is one
  local flags=(--nodes=1 --ntasks=1 --overlap)
  [[ -z ${SLURMD_NODENAME:-} ]] || flags+=(--nodelist="$SLURMD_NODENAME") # which need not be the host's name
  contain flags "$@"
  if [[ -n $SPDF_CONTAINER && $SPDF_CONTAINER != *.sif ]]; then srun "${flags[@]}" "${CONTAINED[@]}"; else "${CONTAINED[@]}"; fi
}

contain() { # NAME_OF_FLAGS COMMAND...: sets $CONTAINED to the command in its container, and adds flags for srun
  local -n srun_flags=$1
  local mounts=$SPDF_ROOT,$PWD${SPDF_MOUNTS:+,$SPDF_MOUNTS} each=() mount
  shift
  [[ -z $SPDF_CONTAINER || $SPDF_ROOT$PWD != *[,:]* ]] || die "neither $SPDF_ROOT nor $PWD can be mounted in a container, since one has a comma or a colon; choose another directory"
  CONTAINED=("$@")
  if [[ $SPDF_CONTAINER = *.sif ]]; then
    [[ $SPDF_DEVICE = cpu ]] || each+=(--nv) # the node's driver libraries
    IFS=, read -ra mount <<<"$mounts"
    CONTAINED=(apptainer exec "${each[@]}" "${mount[@]/#/--bind=}" --pwd "$PWD" "$SPDF_CONTAINER" "$@")
  elif [[ -n $SPDF_CONTAINER ]]; then
    IFS=, read -ra mount <<<"$mounts"
    mounts=$(printf '%s\n' "${mount[@]}" | awk '!seen[$0]++ { printf "%s%s", comma, /:/ ? $0 : $0 ":" $0; comma = "," }')
    srun_flags+=(--container-image="$SPDF_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD" --no-container-mount-home)
  fi
}

words_of() { # NAME COMMAND...: sets the array NAME to the words that a command prints, see print_words in megatron_spdf/command_line.py
  local -n into=$1
  local word reader code
  into=()
  while IFS= read -r -d '' word; do into+=("$word"); done < <("${@:2}")
  reader=$!
  while wait "$reader"; code=$?; kill -0 "$reader" 2>/dev/null; do :; done
  ((code == 0)) || exit "$code"
  into=("${into[@]:1}") # before the first NUL stands what libraries print
}

head_node() { # prints the first node's name, or where this host cannot resolve it, an address that Slurm has
  local node known
  node=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1)
  for known in "$node" $(scontrol show node "$node" 2>/dev/null | sed -n 's/.*\bNodeAddr=\([^ ]*\) *NodeHostName=\([^ ]*\).*/\1 \2/p'); do
    ! getent ahosts "${known:-.}" >/dev/null || { echo "$known"; return; }
  done
  echo "$node"
}

as_path() { # NAME PATH: sets the variable NAME to the path, so that no program takes it for an option
  local -n path=$1
  path=$2
  [[ $path != -* ]] || path=./$path
}

option() { # NAME DEFAULT: prints an option of sbatch for a dry run, from the command line or the script's #SBATCH lines
  local argument value
  value=$(sed -n "s/^#SBATCH --$1=\([0-9]*\).*/\1/p" "$SCRIPT" | tail -n 1)
  for argument in "${SBATCH_ARGUMENTS[@]}"; do [[ $argument != "--$1="* ]] || value=${argument#*=}; done
  echo "${value:-$2}"
}

show_command() { # prints the command of a dry run
  echo "command: sbatch ${SBATCH_ARGUMENTS[*]@Q} $ME ${ARGUMENTS[*]@Q}"
  echo "which runs on $NODES nodes: srun --ntasks=$TASKS ${COMMAND[*]@Q}"
}

recipe_file() { # VARIABLE NAME KIND: sets the variable to the path of a recipe, a .yaml file or a name under configs/KIND
  [[ $2 = *.yaml || -f $SPDF_ROOT/configs/$3/$2.yaml ]] || die "there is no recipe '$2'; choose one of $(tasks "$3"), or give a .yaml file"
  if [[ $2 = *.yaml ]]; then as_path "$1" "$2"; else as_path "$1" "$SPDF_ROOT/configs/$3/$2.yaml"; fi
}

tasks() { # [KIND]: prints the names under configs/KIND, of tasks by default
  (cd "$SPDF_ROOT/configs/${1:-finetune}" && echo *.yaml | sed 's/\.yaml//g')
}
