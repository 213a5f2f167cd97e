#!/usr/bin/env bash
# Cognate phase 1 on real word problems (GSM8K, SVAMP and ASDiv from local files), as far as two CPU cores go: ten
# epochs with the document's schedule and early stopping, beside a library GPT-2 of as many parameters on the same
# tokens. Each result file names its size and holds the floors of the same tokens, the curve of every epoch, the epoch
# of an early stop and the gradient norm of every update. DATA holds gsm8k/train.jsonl, svamp/SVAMP.json, asdiv/ASDiv.xml.
# One CPU core: about 65 minutes for Cognate and 35 for GPT-2, of one seed each; SEEDS="0 1 2" makes intervals.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0"} ROOT=${ROOT:-runs/cognate_real_small} DATA=${DATA:-../shared/data}
SIZE=${SIZE:-"--size tiny --d-model 128 --n-heads 4 --n-layers 4 --data-dir $DATA --datasets gsm8k svamp asdiv
  --tokenizer local --vocab-size 1024 --no-curriculum --epochs 10 --batch-size 16 --grad-accum 2 --max-length 256
  --dropout 0.1 --init-std 0.05 --learning-rate 3e-3 --max-samples 5000 --eval-every 200 --device cpu --threads 1 --wandb-mode disabled"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --synth-rows 40 --no-curriculum"; fi

for seed in $SEEDS; do for arm in all plain; do
  dir="$ROOT/${arm}_s$seed" flags=(--seed "$seed")
  [[ $arm == all ]] || flags+=(--plain --grokfast-lambda 0)
  run_one "$dir/reasoning/cognate_results.json" "$dir" \
    "$PYTHON" train_phase1_cognate.py --model reasoning --resume --checkpoint-dir "$dir" $SIZE "${flags[@]}" "$@"
done; done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" final.loss best_epoch floors.trigram train_seconds || failed=1
fi
exit $failed
