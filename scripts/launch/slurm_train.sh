#!/usr/bin/env bash
# A training on several machines under Slurm: one launcher a machine, which starts a process for each of its GPUs.
#   sbatch --nodes 2 --gpus-per-node 8 scripts/launch/slurm_train.sh -c configs/cifar10.yaml -e /shared/runs/cifar10 -mp auto
# The folder must lie on a disk that all machines see. Two minutes before its time is over (or when it is preempted) the job
# gets SIGTERM, writes a checkpoint and ends. Slurm requeues it by itself only after preemption or the failure of a node; after its
# time limit submit the same command again: it resumes from the checkpoint. Downloads happen on one machine: where
# compute nodes have no network, fetch the data set before submitting.
#SBATCH --job-name=flow
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flow-%j.txt
set -euo pipefail
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-32} # which srun does not take from sbatch since Slurm 22.05

master=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((${SLURM_GPUS_ON_NODE:-1} * SLURM_NNODES))
several=""
if [ "$processes" -gt 1 ]; then several=--multi_gpu; fi # which accelerate refuses for a single process
port=$((20000 + SLURM_JOB_ID % 20000))

# A run folder that exists is resumed from its latest checkpoint; without -e it is runs/CONFIG, as in train.py.
folder="" config="" previous=""
for word in "$@"; do
  case $previous in -e | --exp_dir) folder=$word ;; -c | --config) config=$word ;; esac
  case $word in --exp_dir=*) folder=${word#*=} ;; --config=*) config=${word#*=} ;; esac
  previous=$word
done
if [ -z "$folder" ]; then folder=runs/$(basename "${config%.*}"); fi
resume=()
if [ -f "$folder/config.yaml" ]; then resume=(-r latest); fi

srun --kill-on-bad-exit=1 bash -c '
  exec accelerate-launch '"$several"' --rdzv_backend static --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes '"$processes"' --main_process_ip '"$master"' --main_process_port '"$port"' \
    train.py "$@"' launcher "$@" ${resume[@]+"${resume[@]}"}
