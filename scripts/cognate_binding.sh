#!/usr/bin/env bash
# Cognate phase 1 on questions that only the context can answer, some about what it does not say: names copied, copied
# across other words, two facts, up to four; each stage follows when 0.9 of its scored tokens are right (--staged). Each
# result file holds the probes of its own model: facts swapped, another question, what is absent, names never trained
# on, more facts than trained on, and what a fixed position would answer. Beside it: no recursion, no memory, and a
# library GPT-2 of as many parameters.
# One CPU core: at most 32 minutes for a run (30 epochs of 125 updates of 0.5 s; it ends when its last stage is learned),
# without recursion 9, GPT-2 16; so at most 89 for a seed of the four arms. Start with SEEDS=0 ARMS=all.
# The rates, from runs without the recursion: AdamW alone at 3e-3 had not learned to copy after 1,500 updates (loss 0.85),
# Muon at 8e-3 with 2e-3 for the rest passed that stage after 875. At 2e-2 and 3e-3 the whole model stood still for six
# epochs. Each epoch draws 4,000 of 24,000 rows: of 4,000 seen eight times a model learned by heart.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cognate_binding} ARMS=${ARMS:-"all t0 no_memory plain"}
SIZE=${SIZE:-"--size tiny --d-model 64 --n-heads 4 --n-layers 3 --tokenizer local --vocab-size 400 --dropout 0
  --init-std 0.08 --datasets bind_copy bind_gap bind_2 bind_3 bind_4 --staged --synth-rows 24000 --epoch-rows 4000
  --val-split 0.01 --epochs 30 --warmup-epochs 1 --batch-size 32 --grad-accum 1 --max-length 160 --learning-rate 2e-3
  --muon-lr 8e-3 --early-stop-patience 0 --save-every 100 --device cpu --threads 1 --wandb-mode disabled"}
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
