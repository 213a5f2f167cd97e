#!/usr/bin/env bash
# The eight HST variants and a plain transformer of as many parameters, over seeds: at equal tokens, then at equal seconds.
# Offline and small by default (one CPU core: about 2 hours, SEEDS=0: 45 minutes); the document's size on a GPU:
#   SIZE="--match_params 160000000" BUDGET=3600 bash scripts/hst_variants.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/hst}
VARIANTS=${VARIANTS:-"plain v3_ultra v4_unified v4_1_hyperlattice v5 v6 v7_1_2_agile v8_2_crystalline chaoslogic"}
SIZE=${SIZE:-"--data local --tokenizer local --vocab_size 2048 --d_model 128 --n_layers 4 --max_seq_len 128 --chunk_size 32
  --window 32 --page_size 32 --match_params 2400000 --batch_size 8 --grad_accum 1 --lr 1e-3 --warmup 50 --log_every 50
  --eval_every 200 --eval_rows 256 --save_every 200 --keep 1 --threads 1"}
STEPS=${STEPS:-300} BUDGET=${BUDGET:-90}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --match_params 500000 --self_check false" STEPS=4 BUDGET=0.5; fi

run() { # directory, flags
  run_one "$1/hst_results.json" "$1" "$PYTHON" hst_train.py --middle spine --old_start --resume auto --save_dir "$1" $SIZE "${@:2}"
}

for seed in $SEEDS; do
  for variant in $VARIANTS; do
    run "$ROOT/${variant}_s$seed" --variant "$variant" --seed "$seed" --max_steps "$STEPS" "$@"
    run "$ROOT/${variant}_time_s$seed" --variant "$variant" --seed "$seed" --max_steps 100000 --max_seconds "$BUDGET" "$@"
  done
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.loss tokens train_seconds train_cpu_seconds causality_max_abs_diff || failed=1
  "$PYTHON" claims.py hst "$ROOT" || failed=1
fi
exit $failed
