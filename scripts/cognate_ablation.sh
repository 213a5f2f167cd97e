#!/usr/bin/env bash
# Cognate phase 1, 2 x 2 x 2: Muon, Grokfast and the memory, each on and off, at equal tokens, on generated recall and
# arithmetic questions; and everything on but for the halting head's diversity loss. Ends in a table of means with 95 %
# intervals and of each factor's main effect over seeds. RATES: each optimizer alone, without Grokfast and the memory, at
# other learning rates, so that a rate that suits one of them decides nothing.
# One CPU core: about 1.5 hours (45 runs of 500 updates). Grokfast is tested at the document's lambda.
#   SEEDS="0 1 2" LAMBDA=2.0 ROOT=runs/cognate_lambda2 bash scripts/cognate_ablation.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cognate_ablation} LAMBDA=${LAMBDA:-0.02} RATES=${RATES-"5e-4 1e-3 4e-3"}
SIZE=${SIZE:-"--size tiny --d-model 128 --n-heads 4 --tokenizer local --vocab-size 512 --dropout 0 --init-std 0.05
  --datasets synth_add synth_word synth_recall synth_two_step synth_recall3 synth_copy --synth-rows 1000 --no-curriculum
  --epochs 3 --batch-size 32 --grad-accum 1 --max-length 128 --learning-rate 2e-3 --early-stop-patience 0
  --save-every 100 --device cpu --threads 1 --wandb-mode disabled"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --synth-rows 40 --no-curriculum"; fi

run() { # directory, flags
  run_one "$1/reasoning/cognate_results.json" "$1" \
    "$PYTHON" train_phase1_cognate.py --model reasoning --resume --checkpoint-dir "$1" $SIZE "${@:2}"
}

for seed in $SEEDS; do
  for muon in 1 0; do for grokfast in 1 0; do for memory in 1 0; do
    flags=(--seed "$seed" --grokfast-lambda "$LAMBDA")
    [[ $muon == 1 ]] || flags+=(--optimizer adamw)
    [[ $grokfast == 1 ]] || flags+=(--grokfast-lambda 0)
    [[ $memory == 1 ]] || flags+=(--no-memory)
    run "$ROOT/muon${muon}_grokfast${grokfast}_memory${memory}_s$seed" "${flags[@]}" "$@"
  done; done; done
  for rate in $RATES; do for muon in 1 0; do
    flags=(--seed "$seed" --grokfast-lambda 0 --no-memory --learning-rate "$rate")
    [[ $muon == 1 ]] || flags+=(--optimizer adamw)
    run "$ROOT/rate${rate}_muon${muon}_s$seed" "${flags[@]}" "$@"
  done; done
  run "$ROOT/no_diversity_s$seed" --seed "$seed" --grokfast-lambda "$LAMBDA" --act-diversity-weight 0 "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py cognate "$ROOT" || failed=1
fi
exit $failed
