#!/usr/bin/env bash
# CF-HoT phase A, every part of the mechanism beside its control: at equal parameters, tokens and windows, on bytes of the
# Python library's prose, each arm at its own best rate. First a grid over RATES of GRID_STEPS updates on one seed, judged by
# windows that are not reported (tuning_loss); then SEEDS at the best rate, the baseline first, since the other arms' result
# files hold their gain over it, step by step. The published curvature, which reads ahead, is marked invalid and has no grid.
# Stopping rule, written before the runs: STEPS is 6,000 updates, or where `settled_at` of a pilot of the causal arm says that
# the gate's spread and the holonomy are flat over the last fifth, if that is earlier.
# Plan in core-minutes, from 0.036 s an update of the baseline and 0.048 s of CF-HoT, timed on one busy core: grid 24 runs of
# 2,000 updates 36, three seeds of 8 arms 108, the published rule 5, evaluation and n-gram tables 22: 171. In a shorter run
# with dropout the causal arm was below the trigram table from 2,600 updates on, its gate's spread still rising.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_arms} RATES=${RATES:-"1e-3 3e-3 1e-2"}
STEPS=${STEPS:-6000} GRID_STEPS=${GRID_STEPS:-2000}
ARMS=${ARMS:-"baseline causal gate_only frozen shuffled conv alibi forget"}
SIZE=${SIZE:-"--data local --tokenizer byte --d_model 64 --n_layers 3 --n_heads 4 --d_ff 256 --d_fiber 16 --d_control 32
  --match_params --seq_len 128 --batch_size 8 --dropout 0 --grad_accum 1 --warmup_steps 100 --eval_interval 200
  --save_interval 2000 --log_interval 20 --eval_batches 64 --tuning_windows 256 --num_workers 0 --threads 1 --device cpu"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --match_params --tuning_windows 8" STEPS=20 GRID_STEPS=10; fi
declare -A FLAGS=([baseline]="--bias none --curvature off" [causal]="" [gate_only]="--curvature off" [frozen]="--curvature frozen"
  [shuffled]="--bias shuffled" [conv]="--curvature conv" [alibi]="--bias alibi --curvature off"
  [forget]="--bias forget --curvature off" [published]="--curvature centered")

run() { # directory, flags
  run_one "$1/phase_a_results.json" "$1" \
    "$PYTHON" phase_a_validation.py --resume auto --no_baseline --output_dir "$1" $SIZE "${@:2}"
}

best() { # arm: the rate of its grid with the lowest tuning loss; the first one while there are no results
  local rate file
  for rate in $RATES; do
    file=$ROOT/grid/${1}_lr$rate/phase_a_results.json
    if [[ -f $file ]]; then
      echo "$(tr -d ' \n' <"$file" | sed -n 's/.*"tuning_loss":{"cf_hot":\([0-9.e-]*\)}.*/\1/p') $rate"
    fi
  done | sort -g | awk -v first="${RATES%% *}" 'NF == 2 && !rate { rate = $2 } END { print rate ? rate : first }'
}

for arm in $ARMS; do
  for rate in $RATES; do
    run "$ROOT/grid/${arm}_lr$rate" ${FLAGS[$arm]} --lr "$rate" --seed 0 --max_steps "$GRID_STEPS" "$@"
  done
done
for arm in $ARMS published; do
  from=$arm steps=$STEPS over=()
  if [[ $arm == published ]]; then from=causal steps=$GRID_STEPS; fi
  rate=$(best "$from")
  if [[ $DRY != 1 ]]; then echo "best rate of $arm: $rate (of $RATES; at an edge, add the next one to RATES and call again)"; fi
  for seed in $SEEDS; do
    if [[ $arm != baseline && $arm != published ]]; then over=(--against "$ROOT/baseline_s$seed/phase_a_results.json"); fi
    run "$ROOT/${arm}_s$seed" ${FLAGS[$arm]} --lr "$rate" --seed "$seed" --max_steps "$steps" "${over[@]}" "$@"
  done
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.cf_hot_loss floors.trigram final.loss_gain final.gate_effect final.gate_spread \
    settled_at lookahead_nats.cf_hot || failed=1
fi
exit $failed
