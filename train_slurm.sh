#!/usr/bin/env bash
# Trains on every GPU of several nodes, from the repository's folder:
#
#   sbatch train_slurm.sh [KEY=VALUE ...]
#   SCRIPT=train_Muesli_trXL.py sbatch train_slurm.sh ALL_DEVICES=True [KEY=VALUE ...]
#
# The settings are those of the script, train_PPO_trXL_pmap.py where none is named; NUM_ENVS counts
# all GPUs of all nodes. A job that is preempted, runs out of time, loses a node or fails to reach one
# goes back to the queue, at most MOST_RESTARTS times, and resumes from its last checkpoint; what
# another start would meet again, such as a bad config or a diverged agent, ends the job. The results
# are in RESULTS_DIR/<job>/, runs/slurm/<job>/ where none is named, or with RESUME=<folder> in that
# folder, on a file system that all nodes share.

#SBATCH --job-name=trxl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one process per node, which takes all of its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue               # after a node failure or a preemption
#SBATCH --signal=TERM@180       # 3 minutes before the time is up: stop, save, go back to the queue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append      # one log for all restarts
# Partition and account are your cluster's: add them here or to the sbatch command.

set -u
MOST_RESTARTS=20

# The environment that the requirements were installed in, if it is not active already.
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# A requeued job keeps its number, and so finds what it did before; RESUME says where that is.
results=runs/slurm resumes=
for setting in "$@"; do
    case $setting in
        RESULTS_DIR=*) results=${setting#*=} ;;
        RESUME=*) resumes=yes ;;
    esac
done
settings=("$@")
if [[ -z $resumes ]]; then
    results=$results/$SLURM_JOB_ID
    settings+=("RESULTS_DIR=$results")
    checkpoint=$(find "$results" -mindepth 3 -maxdepth 3 \
        -regex '.*/checkpoints/[0-9]+' 2>/dev/null | head -n 1)
    if [[ -n $checkpoint ]]; then settings+=("RESUME=$(dirname "$(dirname "$checkpoint")")"); fi
fi

# SLURM may send the SIGTERM to this shell too, which must live until the processes have saved.
trap : TERM
# Each process finds the others by SLURM's variables.
srun python "${SCRIPT:-train_PPO_trXL_pmap.py}" "${settings[@]}"
status=$?

case $status in
    143) again=yes ;;       # stopped by SIGTERM, saved
    134 | 137) again=yes ;; # a process was lost, and JAX ended the others
    75) again=yes ;;        # a process never appeared, or an exchange with one failed
    *) again=no ;;          # done, a bad config, a diverged agent or a mistake in the program
esac
if [[ $again == yes && ${SLURM_RESTART_COUNT:-0} -lt $MOST_RESTARTS ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
