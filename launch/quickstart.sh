#!/usr/bin/env bash
# From nothing to a trained model: makes the environment, then prepares text, pretrains the quickstart recipe and evaluates it.
#
#     ./launch/quickstart.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment

largeformer run -c launch/recipes/quickstart.yaml "$@"

cat <<'NEXT'

What next (after `source .venv/bin/activate`):
  largeformer generate --from runs/quickstart/pretrain --prompt "def main("
  tensorboard --logdir runs/quickstart
  deepspeed --num_accelerators 2 --module largeformer pretrain -c launch/recipes/quickstart.yaml \
      run.output_dir=runs/tp2 parallel.tensor_model_parallel_size=2 parallel.sequence_parallel=true train.train_iters=20
NEXT
