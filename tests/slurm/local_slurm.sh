#!/usr/bin/env bash
# A throw-away Slurm cluster on one machine: no systemd, no docker, root only.
#   local_slurm.sh start [N]          N nodes (default 2), node1..nodeN; prints the export line
#   local_slurm.sh stop | status | env
#   local_slurm.sh kill-node NODE     power failure: every process of that node dies at once
#   local_slurm.sh start-node NODE    boots it again
# Needs: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps
# Modes: ns   = each node has its own network, host name, pid space, /dev/shm (needs CAP_SYS_ADMIN)
#        flat = all slurmd on 127.0.0.1, one port each (no namespaces)
# shellcheck disable=SC2015,SC2016,SC2086 # A && B || die is meant; IN_NODE expands inside; a list of pids
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin LC_ALL=C
DIR=${LOCAL_SLURM_DIR:-/tmp/local_slurm}
MODE=${LOCAL_SLURM_MODE:-auto}            # auto | ns | flat
CPUS=${LOCAL_SLURM_CPUS:-64}              # declared per node, may exceed the real ones
MEM=${LOCAL_SLURM_MEM:-512000}            # MiB, declared
GPUS=${LOCAL_SLURM_GPUS:-8}               # pretend gres/gpu per node; 0 = none
GPU_TYPE=${LOCAL_SLURM_GPU_TYPE:-h200}    # so that both gpu:8 and gpu:h200:8 are granted
FEATURES=${LOCAL_SLURM_FEATURES:-}        # for --constraint
PARTS=${LOCAL_SLURM_PARTITIONS:-debug}    # comma list, the first is the default
DBD=${LOCAL_SLURM_DBD:-0}                 # 1 = slurmdbd + mariadb, for sacct
NODE_DOWN_S=${LOCAL_SLURM_NODE_DOWN_S:-5} # SlurmdTimeout
REQUEUE_S=${LOCAL_SLURM_REQUEUE_S:-5}     # cred_expire = the wait of a requeued job (default 120)
OWNER=${LOCAL_SLURM_OWNER:-}              # process with which the cluster stops, however that ends; empty: with none
die() { echo "local_slurm: $*" >&2; exit 1; }
[[ $EUID = 0 ]] || die "run as root"
DIR=$(realpath -m "$DIR"); ((${#DIR} <= 48)) || die "state directory path too long for unix sockets: $DIR"
H=$(printf %s "$DIR" | cksum | cut -d' ' -f1)
P=$(printf 'ls%06x' $((H % 16777216)))    # prefix of every netns / link name of this cluster
NET=10.$((200 + H % 50)).$((H / 50 % 256))
export SLURM_CONF=$DIR/slurm.conf

# ---- processes: remembered as "pid starttime", so a reused pid is never signalled
birth() { local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1; set -- ${s##*) }; [[ $1 != [ZX] ]] && echo "${20}"; }
pid_of() { local p b; read -r p b 2>/dev/null <"$DIR/run/$1.pid" || return 1; [[ $(birth "$p") = "$b" ]] && echo "$p"; }
spawn() { # NAME CMD...: background, own session, no inherited fds of ours
  local name=$1; shift; pid_of "$name" >/dev/null && return 0
  setsid "$@" </dev/null >>"$DIR/log/$name.out" 2>&1 9>&- &
  local p=$! b; disown; b=$(birth $p) || die "$name died at once, see $DIR/log/$name.out"
  echo "$p $b" >"$DIR/run/$name.pid"; }
end() { # NAME [SECONDS of patience]: TERM, then KILL
  local p i; p=$(pid_of "$1") || { rm -f "$DIR/run/$1.pid"; return 0; }
  if [[ ${2:-5} != 0 ]]; then # unshare ignores TERM: hand it to the one inside
    [[ $(cat /proc/"$p"/comm) = unshare ]] && i=$(ps -o pid= --ppid "$p") || i=$p
    kill -TERM $i 2>/dev/null || :
  fi
  for ((i = 0; i < ${2:-5} * 20; i++)); do pid_of "$1" >/dev/null || break; sleep .05; done
  p=$(pid_of "$1") && { kill -KILL "$p" 2>/dev/null || :; }
  for ((i = 0; i < 40; i++)); do pid_of "$1" >/dev/null || break; sleep .05; done
  rm -f "$DIR/run/$1.pid"; }
any_alive() { local f; for f in "$DIR"/run/*.pid; do [[ -e $f ]] && pid_of "$(basename "$f" .pid)" >/dev/null && return 0; done; return 1; }
until_ok() { local s=$1 i; shift; for ((i = 0; i < s * 10; i++)); do "$@" >/dev/null 2>&1 && return 0; sleep .1; done; return 1; }
sweep() { # [NODE]: flat mode, what outlived slurmd: its step daemons (known by the log they hold) and their tasks (by environment)
  local d p; for d in /proc/[0-9]*; do p=${d#/proc/}; [[ $p != "$$" && $p != "$BASHPID" ]] || continue
    if [[ $(readlink "$d/exe" 2>/dev/null) = */slurmstepd* ]]; then
      readlink "$d"/fd/* 2>/dev/null | grep -qE "^$DIR/log/slurmd\.${1:-node[0-9]+}\.log\$" || continue
    else
      [[ $({ tr '\0' '\n' <"$d/environ"; } 2>/dev/null | grep -cxE "SLURM_CONF=$DIR/slurm\.conf|SLURMD_NODENAME=${1:-node[0-9]+}") = 2 ]] || continue
    fi
    kill -KILL "$p" 2>/dev/null || :; done; }

# ---- places
ns_ok() { unshare --net --uts --pid --mount --fork --mount-proc true 2>/dev/null &&
  ip netns add "${P}t" 2>/dev/null && ip link add "${P}t0" type veth peer name "${P}t1" netns "${P}t" 2>/dev/null; local r=$?
  ip netns del "${P}t" 2>/dev/null || :; return $r; }
IN_NODE='hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/resolv.conf" /etc/resolv.conf; mount -t tmpfs tmpfs /dev/shm; shift 2
  "$@" & s=$!; trap "kill -TERM $s" TERM INT; while kill -0 $s 2>/dev/null; do wait $s; done'
inside() { # NAME HOST CMD... -> spawn CMD in that place; in ns mode its death takes all its children along
  local name=$1 host=$2; shift 2
  if [[ $MODE = flat ]]; then spawn "$name" "$@"
  else spawn "$name" ip netns exec "$P$host" unshare --uts --mount --pid --fork --kill-child --mount-proc \
    bash -c "$IN_NODE" "$host" "$host" "$DIR" "$@"; fi; }
add_ns() { # HOST LAST_BYTE: a namespace plugged into the switch, which lives in "ctl" (clear of the host's firewall)
  ip netns add "$P$1"; ip -n "$P$1" link set lo up
  if [[ $1 = ctl ]]; then
    ip -n "$P$1" link add br0 type bridge; ip -n "$P$1" addr add "$NET.$2/24" dev br0; ip -n "$P$1" link set br0 up
    ip link add "${P}h" type veth peer name host netns "$P$1"
    ip addr add "$NET.254/24" dev "${P}h"; ip link set "${P}h" up; ip -n "$P$1" link set host master br0 up
  else
    ip link add "v$1" netns "${P}ctl" type veth peer name eth0 netns "$P$1"
    ip -n "$P$1" addr add "$NET.$2/24" dev eth0; ip -n "$P$1" link set eth0 up
    ip -n "${P}ctl" link set "v$1" master br0 up
  fi; }
hosts_block() { # flat mode only: node names must resolve on the host itself
  local t; t=$(grep -v "# local_slurm $P\$" /etc/hosts || :); printf '%s\n' "$t" >/etc/hosts
  local i; for ((i = 1; i <= ${1:-0}; i++)); do echo "127.0.0.1 node$i # local_slurm $P" >>/etc/hosts; done; }

free_port() { while ss -Hltn "sport = :$port" | grep -q .; do port=$((port + 1)); done; } # moves $port
write_conf() { # N
  local n=$1 i addr port ctlport=6817 ctlhost="ctl($NET.1)" gres='' p def=YES
  [[ $MODE = ns ]] || { port=$((21000 + H % 400 * 20)); free_port; ctlport=$port; ctlhost="$(hostname -s)(127.0.0.1)"; }
  echo "$MODE $n $DBD" >"$DIR/run/shape"
  # slurmd loads a cgroup plugin even when nothing asks for cgroups; v1's start-up touches nothing, v2's wants systemd
  [[ $(slurmd -V) = *\ 2[0-2].* ]] && p=cgroup/v1 || p=disabled; echo "CgroupPlugin=$p" >"$DIR/cgroup.conf"
  echo "# no name server" >"$DIR/resolv.conf"
  { echo "127.0.0.1 localhost"; echo "$NET.254 $(hostname)"; echo "$NET.1 ctl"
    for ((i = 1; i <= n; i++)); do echo "$NET.$((10 + i)) node$i"; done; } >"$DIR/hosts"
  if ((GPUS > 0)); then gres="Gres=gpu:$GPU_TYPE:$GPUS"
    mkdir -p "$DIR/gpu"; for ((i = 0; i < GPUS; i++)); do rm -f "$DIR/gpu/gpu$i"; mknod "$DIR/gpu/gpu$i" c 1 3; done # slurmd insists on a device
    echo "NodeName=node[1-$n] Name=gpu Type=$GPU_TYPE Flags=nvidia_gpu_env File=$DIR/gpu/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
  else : >"$DIR/gres.conf"; fi
  {
    cat <<C
ClusterName=local
SlurmctldHost=$ctlhost
SlurmctldPort=$ctlport
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/sock,cred_expire=$REQUEUE_S
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.own
SlurmdPidFile=$DIR/run/slurmd.%n.own
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEM / CPUS))
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=0,batch_sched_delay=0
SlurmdTimeout=$NODE_DOWN_S
SlurmctldTimeout=30
ReturnToService=2
KillWait=5
JobRequeue=1
MinJobAge=86400
MailProg=/bin/true
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
C
    ((GPUS > 0)) && echo GresTypes=gpu
    if [[ $DBD = 1 ]]; then echo "AccountingStorageType=accounting_storage/slurmdbd"
      echo "AccountingStorageHost=$NET.1"; echo "AccountingStoragePass=$DIR/munge/sock"; echo "AccountingStorageTRES=gres/gpu"
    fi
    for ((i = 1; i <= n; i++)); do
      if [[ $MODE = ns ]]; then addr=$NET.$((10 + i)) port=6818; else addr=127.0.0.1; port=$((port + 1)); free_port; fi
      echo "NodeName=node$i NodeHostname=node$i NodeAddr=$addr Port=$port CPUs=$CPUS Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres ${FEATURES:+Features=$FEATURES} State=UNKNOWN"
    done
    for p in ${PARTS//,/ }; do echo "PartitionName=$p Nodes=ALL Default=$def MaxTime=INFINITE State=UP"; def=NO; done
  } >"$DIR/slurm.conf"; }

all_up() { local n=$1 s; s=$(timeout 3 sinfo -hN -p "${PARTS%%,*}" -o '%N %t' 2>/dev/null | sort -u) &&
  [[ $(grep -cE ' (idle|mix|alloc|comp)$' <<<"$s") = "$n" ]]; }

start_dbd() {
  [[ $MODE = ns ]] || die "LOCAL_SLURM_DBD=1 needs ns mode"
  [[ -x /usr/sbin/mariadbd && -x /usr/sbin/slurmdbd ]] || die "apt-get install --no-install-recommends slurmdbd mariadb-server-core"
  local my=(--no-defaults --datadir="$DIR/db" --user=root)
  mkdir -p "$DIR/db" # no system tables needed: grants are off, and 3306 is on the loopback of "ctl" alone
  inside mariadbd ctl mariadbd "${my[@]}" --socket="$DIR/run/db.sock" --pid-file="$DIR/run/db.own" --skip-grant-tables \
    --skip-networking=0 --bind-address=127.0.0.1 --innodb-buffer-pool-size=128M --innodb-lock-wait-timeout=900
  until_ok 15 ip netns exec "${P}ctl" bash -c ': </dev/tcp/127.0.0.1/3306' || die "mariadbd: see $DIR/log/mariadbd.out"
  install -m 600 /dev/null "$DIR/slurmdbd.conf"
  cat >"$DIR/slurmdbd.conf" <<C
DbdHost=ctl
DbdAddr=$NET.1
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/sock
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.own
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=root
StorageLoc=slurm_acct
C
  inside slurmdbd ctl slurmdbd -D
  until_ok 15 bash -c ": </dev/tcp/$NET.1/6819" || die "slurmdbd: see $DIR/log/slurmdbd.log"
  sacctmgr -n list cluster format=cluster | grep -qw local || sacctmgr -iQ add cluster local >/dev/null; }

start_node() { inside "$1" "$1" slurmd -D -N "$1" -f "$DIR/slurm.conf"; }

cmd_start() {
  local n=${1:-2} old='' i t0=$SECONDS
  [[ $n =~ ^[1-9][0-9]?$ ]] || die "how many nodes? got '$n'"
  for i in slurmctld slurmd sbatch munged ip ss; do command -v $i >/dev/null || die "$i is missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge iproute2 procps"; done
  if any_alive; then read -r MODE old DBD <"$DIR/run/shape"
    [[ $old = "$n" ]] || die "already running with $old nodes; stop it first"
  else cmd_stop quiet
    [[ $MODE != auto ]] || { if ns_ok; then MODE=ns; else MODE=flat; fi; }
    rm -rf "$DIR"/{state,spool,log,db}; mkdir -p "$DIR"/{run,log,state,spool,munge}; chmod 755 "$DIR" "$DIR"/*/
    trap '[[ $? = 0 ]] || { echo "local_slurm: start failed, cleaning up (logs stay in '"$DIR"'/log)" >&2; cmd_stop quiet; }' EXIT
    [[ $MODE = flat || -z $(ip -4 route show to match "$NET.1" | sed /^default/d) ]] || die "$NET.0/24 is taken; choose another LOCAL_SLURM_DIR"
    write_conf "$n"
    if [[ $MODE = ns ]]; then add_ns ctl 1; for ((i = 1; i <= n; i++)); do add_ns "node$i" $((10 + i)); done
    else hosts_block "$n"; fi
  fi
  if ! pid_of munged >/dev/null; then
    rm -f "$DIR"/munge/sock*
    (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
    spawn munged munged -F --force --num-threads=4 --key-file="$DIR/munge/key" --socket="$DIR/munge/sock" \
      --pid-file="$DIR/munge/own" --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/seed"
  fi
  until_ok 5 munge --socket="$DIR/munge/sock" -n || die "munged: see $DIR/log/munged.*"
  [[ $DBD != 1 ]] || start_dbd
  inside slurmctld ctl slurmctld -D -f "$DIR/slurm.conf"
  for ((i = 1; i <= n; i++)); do start_node "node$i"; done
  until_ok 20 all_up "$n" || { sinfo -N -l >&2 || :; die "nodes did not come up, see $DIR/log"; }
  [[ -z $OWNER ]] || spawn watch bash "$(realpath "$0")" stop-after "$OWNER" "$(birth "$OWNER")"
  trap - EXIT
  echo "local_slurm: $n nodes up in $((SECONDS - t0)) s ($MODE mode, $DIR)" >&2
  cmd_env; }

cmd_stop() {
  local f n; [[ -d $DIR/run ]] || return 0
  end watch 0
  if [[ -e $DIR/run/shape ]]; then read -r MODE _ <"$DIR/run/shape"; fi
  end slurmctld 5
  for f in "$DIR"/run/node*.pid; do [[ -e $f ]] || continue; n=$(basename "$f" .pid); end "$n" "$([[ $MODE = ns ]] && echo 0 || echo 3)"; done
  [[ $MODE = ns ]] || sweep
  end slurmdbd 5; end mariadbd 10; end munged 3
  for f in /run/netns/"$P"*; do [[ -e $f ]] && ip netns del "${f##*/}"; done
  ip link del "${P}h" 2>/dev/null || :
  ! grep -q "# local_slurm $P\$" /etc/hosts || hosts_block 0
  rm -f "$DIR"/run/* "$DIR"/munge/sock*
  [[ ${1:-} = quiet ]] || echo "local_slurm: stopped ($DIR)" >&2; }

cmd_status() {
  local f n rc=0; [[ -e $DIR/run/shape ]] || { echo "not running ($DIR)"; return 3; }
  for f in "$DIR"/run/*.pid; do n=$(basename "$f" .pid); pid_of "$n" >/dev/null && echo "$n: pid $(pid_of "$n")" || { echo "$n: dead"; rc=1; }; done
  timeout 5 sinfo -N -o '%8N %10P %6t %4c %8m %14G %E' || rc=1; return $rc; }
cmd_env() { echo "export SLURM_CONF=$DIR/slurm.conf"; }

if [[ ${1:-} = stop-after ]]; then # PID BIRTH: of `start`
  while [[ $(birth "$2") = "$3" ]]; do sleep 1; done
  rm -f "$DIR/run/watch.pid" # so that stop does not end this shell
  set -- stop
fi
mkdir -p "$DIR"
[[ -e $DIR/.local_slurm || -z $(ls -A "$DIR") ]] || die "$DIR holds other things; give an empty or new directory"
: >"$DIR/.local_slurm"; exec 9>"$DIR/lock"; flock -w 60 9 || die "another local_slurm.sh holds $DIR/lock"
case ${1:-} in
  start) shift; cmd_start "$@" ;;
  stop) cmd_stop ;;
  status) cmd_status ;;
  env) cmd_env ;;
  kill-node) [[ -e $DIR/run/${2:?node}.pid ]] || die "no such node: $2"; read -r MODE _ <"$DIR/run/shape"
    end "$2" 0; [[ $MODE = ns ]] || sweep "$2" ;;
  start-node) read -r MODE _ <"$DIR/run/shape"; [[ -d $DIR/spool ]] && grep -q "^NodeName=${2:?node} " "$DIR/slurm.conf" || die "no such node: $2"
    start_node "$2" ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
