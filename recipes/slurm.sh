#!/bin/bash
# A phase on several machines under SLURM: sbatch recipes/slurm.sh --config recipes/sixty_four_gpus.yaml --out runs/full/pretrain --resume
# PHASE=tune sbatch recipes/slurm.sh --pretrained runs/full/pretrain --config recipes/sixty_four_gpus.yaml --out runs/full/model --resume
#SBATCH --job-name=chroma
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1            # accelerate starts the processes of a machine
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600              # ten minutes before the end: the run saves a checkpoint and stops
#SBATCH --requeue                      # after a machine has failed: with --resume the run goes on from its newest checkpoint
#SBATCH --output=slurm-%j.txt
set -euo pipefail
export OMP_NUM_THREADS=8 NCCL_DEBUG=WARN
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)              # head would end early, and pipefail call that a fault
processes=$((SLURM_NNODES * ${SLURM_GPUS_ON_NODE:-8}))
# each machine puts in its own number
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file recipes/accelerate_64gpu.yaml --machine_rank "$SLURM_NODEID" "$@"' chroma \
    --num_machines "$SLURM_NNODES" --num_processes "$processes" --main_process_ip "$first" -m "chroma_moe.${PHASE:-pretrain}" "$@"
