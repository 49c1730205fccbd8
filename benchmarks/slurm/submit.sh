#!/usr/bin/env bash
# A run in SHARDS tasks, and a job that merges them when all have ended well.
#
#   SHARDS=16 benchmarks/slurm/submit.sh runs/NAME attack --dataset cifar10 --device cuda --precision bf16
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: SHARDS=N $0 RUN_DIR attack|certify OPTION ..." >&2
    exit 2
fi
here=$(dirname "$0")
export SHARDS=${SHARDS:-16}
if [ "$2" = attack ]; then  # wrong options are told here, not by N tasks; what fits on a node, this machine cannot know
    purify attack "${@:3}" --shard "1/$SHARDS" --out "$1" --device cpu --check
fi
job=$(sbatch --parsable --array="1-$SHARDS" "$here/shard.sbatch" "$@")
sbatch --dependency="afterok:$job" "$here/merge.sbatch" "$1" "$2"
