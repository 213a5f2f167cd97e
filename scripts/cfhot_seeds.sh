#!/usr/bin/env bash
# CF-HoT phase A over seeds: the causal form beside its baseline, then the curvature rules alone.
# Offline and small by default (two CPU cores: 40 minutes); the document's size on a GPU:
#   SIZE="--data wikitext103" SEEDS="0 1 2" bash scripts/cfhot_seeds.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_a}
SIZE=${SIZE:-"--data local --tokenizer local --d_model 128 --n_layers 4 --n_heads 4 --d_ff 512 --seq_len 128
  --max_steps 600 --grad_accum 1 --lr 1e-3 --warmup_steps 50 --eval_interval 150 --save_interval 300 --log_interval 20
  --eval_batches 0 --num_workers 0 --threads 1"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --threads 1"; fi

run() { # directory, flags
  run_one "$1/phase_a_results.json" "$1" \
    "$PYTHON" phase_a_validation.py --resume auto --output_dir "$1" $SIZE "${@:2}"
}

for seed in $SEEDS; do
  run "$ROOT/causal_s$seed" --seed "$seed" "$@"
  run "$ROOT/off_s$seed" --seed "$seed" --curvature off --no_baseline "$@"
  run "$ROOT/centered_s$seed" --seed "$seed" --curvature centered --no_baseline "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.cf_hot_loss final.baseline_loss final.gate_effect causality_max_abs_diff || failed=1
fi
exit $failed
