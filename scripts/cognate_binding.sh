#!/usr/bin/env bash
# Cognate phase 1 on questions that only the context can answer, some about what it does not say: names copied, copied
# across other words, two facts, up to four; each stage follows when 0.9 of its scored tokens are right (--staged). Each
# result file holds the probes of its own model: facts swapped, another question, what is absent, names never trained
# on, more facts than trained on, and what a fixed position would answer. Beside it: no recursion, no memory, and a
# library GPT-2 of as many parameters.
# One CPU core: at most 33 minutes for a run (16 epochs of 244 updates of 0.5 s; it ends when its last stage is learned),
# without recursion 9, GPT-2 16; so at most 91 for a seed of the four arms and 273 for three. Start with SEEDS=0 ARMS=all.
# The rates: of Muon 5e-3, 2e-2 and 5e-2, and 2e-3 and 5e-3 for the rest, the first stage's validation loss after 732 updates
# was least at 2e-2 with either of the latter (0.26, 0.27; on half of the rows at 5e-3 0.53). Rows seen too often are learned
# by heart: 4,000 of each set were.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cognate_binding} ARMS=${ARMS:-"all t0 no_memory plain"}
SIZE=${SIZE:-"--size tiny --d-model 64 --n-heads 4 --n-layers 3 --tokenizer local --vocab-size 400 --dropout 0
  --init-std 0.08 --datasets bind_copy bind_gap bind_2 bind_3 bind_4 --staged --synth-rows 8000 --val-split 0.025
  --epochs 16 --batch-size 32 --grad-accum 1 --max-length 160 --learning-rate 3e-3 --muon-lr 2e-2 --early-stop-patience 0
  --save-every 100 --device cpu --threads 1 --wandb-mode disabled"}
if [[ ${TEST:-0} == 1 ]]; then
  SIZE="--test --synth-rows 40 --staged --datasets bind_copy bind_4 --tokenizer local --vocab-size 400"
fi

for seed in $SEEDS; do for arm in $ARMS; do
  flags=(--seed "$seed")
  case $arm in
    t0) flags+=(--t-max 0) ;;
    no_memory) flags+=(--no-memory) ;;
    plain) flags+=(--plain) ;;
  esac
  dir="$ROOT/${arm}_s$seed"
  run_one "$dir/reasoning/cognate_results.json" "$dir" \
    "$PYTHON" train_phase1_cognate.py --model reasoning --resume --checkpoint-dir "$dir" $SIZE "${flags[@]}" "$@"
done; done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.loss final.token_accuracy floors.trigram || failed=1
fi
exit $failed
