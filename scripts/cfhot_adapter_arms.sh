#!/usr/bin/env bash
# CF-HoT phase B on the offline language model: what the trained gates save on held-out windows beside the same gates on
# shuffled keys and a constant gate, and whether texts repeat less, beside a repetition penalty and a LoRA of equal size.
# First a grid over RATES and LAMBDAS of GRID_STEPS updates on one seed, judged by windows that are not reported
# (tuning_loss; the LoRA's rate likewise); then SEEDS at the best of each, with generation.
# Number of prompts, calculated before the runs: over the 21 prompts of an earlier sweep the paired difference of rep_4 from
# the base had a standard deviation of 0.19 (greedy, adapters and shuffled gates alike). To see a difference of 0.05 with a
# power of 0.8 at 5 %, two-sided, takes (1.96 + 0.84)^2 (0.19 / 0.05)^2 = 113 prompts: the first 8 words of PROMPTS=120
# held-out lines. One sampled text of each: at a rate of 0.005 sampled repetition has little left to lose.
# Plan in core-minutes, from 0.86 s an update of the adapters and 0.69 s of the LoRA on two cores (8 windows of 512):
# grid 6 x 100 updates 17, LoRA's grid 3 x 100 updates 7, three seeds of 300 updates 26 + 21, texts 3 x 3, evaluation 5: 85.
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_adapters} RATES=${RATES:-"1e-3 3e-3 1e-2"} LAMBDAS=${LAMBDAS:-"1 4"}
STEPS=${STEPS:-300} GRID_STEPS=${GRID_STEPS:-100} PROMPTS=${PROMPTS:-120}
SIZE=${SIZE:-"--data local --batch_size 4 --grad_accum 2 --eval_interval 50 --save_interval 100 --eval_windows 32
  --tuning_windows 16"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --tuning_windows 4" STEPS=10 GRID_STEPS=5 MODEL=${MODEL:-tiny}; fi
MODEL=${MODEL:-backbones/lm}

run() { # directory, flags
  run_one "$1/phase_b_results.json" "$1" "$PYTHON" phase_b_8b_adapters.py --resume auto \
    --model_path "$MODEL" --output_dir "$1" $SIZE "${@:2}"
}

best() { # arm (cf_adapter or lora): the folder of the grid with its lowest tuning loss; the first one while there are none
  local file
  for file in "$ROOT"/grid/*/phase_b_results.json; do
    if [[ -f $file ]]; then
      echo "$(tr -d ' \n' <"$file" | sed -n "s/.*\"tuning_loss\":{[^}]*\"$1\":\([0-9.e-]*\).*/\1/p") ${file%/*}"
    fi
  done | sort -g | awk -v first="lambda${LAMBDAS%% *}_lr${RATES%% *}" \
    'NF == 2 && !at { at = $2 } END { sub(".*/", "", at); print at ? at : first }'
}

if [[ $MODEL == backbones/lm ]]; then backbone lm "$MODEL"; fi
lora=(--lora_reference) # once for each rate
for scale in $LAMBDAS; do
  for rate in $RATES; do
    run "$ROOT/grid/lambda${scale}_lr$rate" --lambda_init "$scale" --lr "$rate" "${lora[@]}" --seed 0 \
      --max_steps "$GRID_STEPS" --no_eval "$@"
  done
  lora=()
done
if [[ $DRY != 1 && ! -s $ROOT/prompts.txt ]]; then
  mkdir -p "$ROOT"
  "$PYTHON" -c "import core
lines = [line.split() for line in core.load_text('local', 'validation') if len(line.strip()) > 100]
chosen = list(dict.fromkeys(' '.join(words[:8]) for words in lines))
print('\n'.join(chosen[:: max(1, len(chosen) // $PROMPTS)][:$PROMPTS]))" >"$ROOT/prompts.txt"
fi
chosen=$(best cf_adapter) reference=$(best lora)
scale=${chosen%%_lr*} rate=${chosen##*_lr} lora_rate=${reference##*_lr}
if [[ $DRY != 1 ]]; then echo "best: $chosen of $LAMBDAS and $RATES; LoRA: $lora_rate (at an edge, add the next one and call again)"; fi
for seed in $SEEDS; do
  run "$ROOT/adapters_s$seed" --lambda_init "${scale#lambda}" --lr "$rate" --lora_reference --lora_lr "$lora_rate" --seed "$seed" \
    --max_steps "$STEPS" --prompts "$ROOT/prompts.txt" --samples 1 "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" val.ppl_base val.ppl_gated lora.final.ppl val.gain_over_shuffled.mean final.sat_frac \
    generation.greedy.cfhot.minus_base.rep_4.mean generation.greedy.cfhot_shuffled.minus_base.rep_4.mean || failed=1
fi
exit $failed
