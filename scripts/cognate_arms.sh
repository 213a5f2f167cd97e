#!/usr/bin/env bash
# Cognate phase 1, one thing off or changed at a time, paired by seed, at equal tokens: states trained (--t-max 0 to 3, at
# 0 also with layers to make up for the recursion's parameters), refinements, halting, memory, Muon, Grokfast and its
# weight; and a library GPT-2 of as many parameters under either optimizer. Every run also gives the loss of each state
# and of fewer refinements than it was trained with, the loss by the state at which tokens halt, the n-gram floors and
# the loss against updates, tokens and seconds.
#   GRID=1 bash scripts/cognate_arms.sh     first: the rates, one seed, on other rows (--data-seed) than those reported
#   RATE="3e-3 5e-3" RATE_ADAMW=1e-3 RATE_PLAIN="3e-3 5e-3" RATE_PLAIN_ADAMW=1e-3 bash scripts/cognate_arms.sh
# RATE and RATE_PLAIN are those of AdamW's part and of Muon. Arms of one optimizer share its rates.
# One CPU core, from the seconds of an update of each kind: 507 updates take 2.9 minutes with three steps and 0.9 without
# (t1 1.7, t2 2.3, GPT-2 1.5), so that the grid of 18 runs takes 40 minutes and a seed of the 16 arms 35, five seeds 175.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2 3 4"} ROOT=${ROOT:-runs/cognate_arms}
RATE=${RATE:-"3e-3 5e-3"} RATE_ADAMW=${RATE_ADAMW:-1e-3} RATE_PLAIN=${RATE_PLAIN:-"3e-3 5e-3"}
RATE_PLAIN_ADAMW=${RATE_PLAIN_ADAMW:-1e-3}
SIZE=${SIZE:-"--size tiny --d-model 128 --n-heads 4 --tokenizer local --vocab-size 512 --dropout 0 --init-std 0.05
  --datasets synth_add synth_word synth_recall synth_two_step synth_recall3 synth_copy --synth-rows 1000 --no-curriculum
  --epochs 3 --batch-size 32 --grad-accum 1 --max-length 128 --early-stop-patience 0 --eval-every 50 --save-every 100
  --device cpu --threads 1 --wandb-mode disabled"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --synth-rows 40 --no-curriculum"; fi

run() { # directory, rates of AdamW's part and of Muon (or of AdamW alone), flags
  local rates=($2)
  run_one "$1/reasoning/cognate_results.json" "$1" \
    "$PYTHON" train_phase1_cognate.py --model reasoning --resume --checkpoint-dir "$1" $SIZE \
    --learning-rate "${rates[0]}" --muon-lr "${rates[1]:-5e-3}" "${@:3}"
}

if [[ ${GRID:-0} == 1 ]]; then
  for rate in 1e-3 3e-3 1e-2; do
    for muon in 5e-3 2e-2; do
      run "$ROOT/grid_muon_${rate}_$muon" "$rate $muon" --seed 0 --data-seed 7 "$@"
      run "$ROOT/grid_plain_muon_${rate}_$muon" "$rate $muon" --seed 0 --data-seed 7 --plain "$@"
    done
    run "$ROOT/grid_adamw_$rate" "$rate" --seed 0 --data-seed 7 --optimizer adamw "$@"
    run "$ROOT/grid_plain_adamw_$rate" "$rate" --seed 0 --data-seed 7 --optimizer adamw --plain "$@"
  done
else
  for seed in $SEEDS; do
    arm() { run "$ROOT/$1_s$seed" "$2" --seed "$seed" "${@:3}"; }
    arm all "$RATE" "$@"
    for steps in 0 1 2; do arm "t$steps" "$RATE" --t-max "$steps" "$@"; done
    arm t0_layers "$RATE" --t-max 0 --n-layers 3 "$@" # one layer is 16 D D, what it replaces 22 D D
    arm micro1 "$RATE" --micro-steps 1 "$@"
    arm t1_micro1 "$RATE" --t-max 1 --micro-steps 1 "$@"
    arm no_halting "$RATE" --no-act "$@"
    arm no_diversity "$RATE" --act-diversity-weight 0 "$@"
    arm no_memory "$RATE" --no-memory "$@"
    arm no_grokfast "$RATE" --grokfast-lambda 0 "$@"
    arm grokfast_2 "$RATE" --grokfast-lambda 2 "$@"
    arm no_muon "$RATE_ADAMW" --optimizer adamw "$@"
    arm no_muon_no_grokfast "$RATE_ADAMW" --optimizer adamw --grokfast-lambda 0 "$@"
    arm plain "$RATE_PLAIN" --plain --grokfast-lambda 0 "$@"
    arm plain_adamw "$RATE_PLAIN_ADAMW" --plain --grokfast-lambda 0 --optimizer adamw "$@"
  done
fi
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.loss final.avg_halting_steps floors.bigram floors.trigram train_seconds || failed=1
fi
exit $failed
