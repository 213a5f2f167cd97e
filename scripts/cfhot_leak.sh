#!/usr/bin/env bash
# The leak made visible: independent uniform tokens have an entropy of ln 16 = 2.7726 nats, which no honest model can
# beat on held-out text. The published (centered) curvature does. Two CPU cores: 3 minutes. DRY=1 prints the commands,
# TEST=1 makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_leak}
SIZE="--data iid --vocab_size 16 --d_model 32 --n_layers 2 --n_heads 2 --d_ff 64 --d_fiber 8 --d_control 16 --seq_len 32
  --dropout 0 --batch_size 32 --lr 3e-3 --grad_accum 1 --max_steps 1200 --eval_interval 300 --eval_batches 0
  --num_workers 0 --threads 1 --device cpu"
if [[ ${TEST:-0} == 1 ]]; then SIZE="$SIZE --test --max_steps 20 --eval_interval 20"; fi

run() { # directory, flags
  run_one "$1/phase_a_results.json" "$1" \
    "$PYTHON" phase_a_validation.py --resume auto --output_dir "$1" $SIZE "${@:2}"
}

for seed in $SEEDS; do
  run "$ROOT/causal_s$seed" --seed "$seed" "$@"
  run "$ROOT/centered_s$seed" --seed "$seed" --curvature centered --no_baseline "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.cf_hot_loss final.baseline_loss data.entropy_floor_nats || failed=1
fi
exit $failed
