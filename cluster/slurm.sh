#!/usr/bin/env bash
# One recipe on the nodes of a SLURM allocation. All nodes see the checkout, its .venv and the directory of the results:
#   sbatch --nodes=2 cluster/slurm.sh --recipe llama-3.1-8b output=/shared/runs
#SBATCH --job-name=leap
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# A job that is ended early gets SIGTERM two minutes before; submitted again, the run continues from its last checkpoint.
#SBATCH --signal=B:TERM@120
#SBATCH --output=leap-%j.log
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "error: say what to run: sbatch --nodes=2 cluster/slurm.sh --recipe NAME output=DIRECTORY" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
python="${LEAP_PYTHON:-$PWD/.venv/bin/python}"
if [ ! -x "$python" ]; then
    echo "error: there is no $python; run make setup on a node, or set LEAP_PYTHON" >&2
    exit 2
fi
PATH="$(dirname "$python"):$PATH"

# The address that the other nodes reach the first one at. A port of its own, for two jobs may share a node.
first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | tr ' ' '\n' | grep -m 1 -v : ):$((20000 + SLURM_JOB_ID % 10000))"

# Whoever has this token may run code on the nodes. srun hands it on, and it is in no file and no command line.
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')"
export RAY_AUTH_MODE RAY_AUTH_TOKEN

# Nodes that read Python from a shared file system for the first time need more than the 30 seconds that it waits else.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"

# symmetric-run starts Ray on every node, the command on the first, and takes Ray down when that ends. srun runs in the
# background: bash would keep a signal until a command in the foreground is through.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
    ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    env RAY_ADDRESS="$address" "$python" pipeline/run.py run "$@" &
step=$!
trap 'kill -TERM "$step"' TERM
wait "$step" || { status=$?; wait "$step" 2> /dev/null || status=$?; exit "$status"; }
