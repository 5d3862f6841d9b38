#!/bin/bash
# Train on several machines under Slurm: sbatch examples/slurm_train.sh CONFIG [KEY=VALUE ...]
#
# srun starts one torchrun on every machine, torchrun one process for each of its GPUs. CONFIG, the data and run.out have
# to lie on a file system that all machines share. Slurm tells torchrun to stop 120 seconds before the time is up: the run
# is saved, and the same command goes on from there.
#SBATCH --job-name=robust-moe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi

nodes=${SLURM_JOB_NUM_NODES:?run this by sbatch}
gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs with --gpus-per-node}
cpus=${SLURM_CPUS_PER_TASK:?ask for cores with --cpus-per-task}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${first%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 40000))

# srun does not take over sbatch's --cpus-per-task (Slurm 22.05 and later): torchrun would get a single core
srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" torchrun \
    --nnodes="$nodes" \
    --nproc-per-node="$gpus" \
    --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:$port" \
    --max-restarts=3 \
    -m robust_moe train "$@"
