#!/usr/bin/env bash
# Trains on all GPUs of several nodes. Run it in the repository's folder:
#
#   sbatch train_slurm.sh [KEY=VALUE ...]
#   SCRIPT=train_Muesli_trXL.py sbatch train_slurm.sh ALL_DEVICES=True [KEY=VALUE ...]
#
# SCRIPT defaults to train_PPO_trXL_pmap.py. NUM_ENVS is summed over all GPUs of all nodes. Results
# are in RESULTS_DIR/<job>/, by default runs/slurm/<job>/, or with RESUME=<folder> in that folder. All
# nodes must share its file system.
#
# A job is requeued, at most MOST_RESTARTS times, and resumes from its last checkpoint if it is
# preempted, runs out of time, or loses or can't reach a node. Other errors, such as a bad config or a
# diverged agent, end the job.

#SBATCH --job-name=trxl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one process per node, which uses all its GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue               # after a node failure or a preemption
#SBATCH --signal=TERM@180       # 3 minutes before the time limit: stop, save, requeue
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append      # one log for all restarts
# Add your cluster's partition and account here or to the sbatch command.

set -u
MOST_RESTARTS=20

# Activate the environment of the requirements, if there is one.
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# A requeued job keeps its number, so its folder may have a checkpoint to resume.
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

# SLURM may send SIGTERM to this shell too, which must wait until the processes have saved.
trap : TERM
# The processes connect by SLURM's variables.
srun python "${SCRIPT:-train_PPO_trXL_pmap.py}" "${settings[@]}"
status=$?

case $status in
    143) again=yes ;;       # stopped by SIGTERM, saved
    134 | 137) again=yes ;; # a process was lost, and JAX aborted the others
    75) again=yes ;;        # a process did not connect, or communication failed
    *) again=no ;;          # finished, bad config, diverged agent or bug
esac
if [[ $again == yes && ${SLURM_RESTART_COUNT:-0} -lt $MOST_RESTARTS ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
