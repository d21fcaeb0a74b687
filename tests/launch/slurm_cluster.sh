#!/usr/bin/env bash
# A SLURM cluster of two nodes on this machine, for tests. Needs root and Debian's slurm-wlm and munge. Everything of it
# lies below one folder and listens on three given ports: it touches no other SLURM and no file outside.
#   slurm_cluster.sh start FOLDER PORT PORT PORT | stop FOLDER
# Partitions: main (preempted by urgent, with a minute to end), urgent, small (one node, ten minutes).
set -euo pipefail
state=$2 host=$(hostname)
export SLURM_CONF=$state/slurm.conf
runs() { kill -0 "$1" 2>/dev/null && ! grep -q '^State:.Z' "/proc/$1/status"; } # where nobody reaps, the dead stay
case $1 in
start)
    mkdir -p "$state/ctld" "$state/munge"
    chmod 700 "$state/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$state/munge/key")
    munged --force --key-file="$state/munge/key" --socket="$state/munge/socket" --pid-file="$state/munge/pid" \
        --log-file="$state/munge/log" --seed-file="$state/munge/seed" 2>/dev/null
    # cred_expire also says how long a requeued job waits: two minutes by default
    cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$3
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
StateSaveLocation=$state/ctld
SlurmdSpoolDir=$state/slurmd.%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.%n.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.%n.log
ReturnToService=2
SlurmdTimeout=300
KillWait=5
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$4 CPUs=1 RealMemory=500 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$5 CPUs=1 RealMemory=500 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE PriorityTier=2
PartitionName=small Nodes=n1 MaxTime=10
CONF
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N n1
    slurmd -f "$SLURM_CONF" -N n2
    for _ in $(seq 300); do
        [ "$(sinfo -h -p main -t idle -o %D 2>/dev/null)" = 2 ] && exit 0
        sleep 0.1
    done
    echo "the nodes did not come up" >&2
    tail "$state"/*.log >&2
    exit 1
    ;;
stop)
    scancel --user="$(id -un)" 2>/dev/null || true
    for _ in $(seq 200); do # jobs first: nobody would end their processes without slurmd
        [ -z "$(squeue -h 2>/dev/null)" ] && break
        sleep 0.1
    done
    for file in "$state"/slurmd.n1.pid "$state"/slurmd.n2.pid "$state/slurmctld.pid" "$state/munge/pid"; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            runs "$pid" || break
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
    ;;
esac
