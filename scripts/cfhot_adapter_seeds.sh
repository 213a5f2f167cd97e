#!/usr/bin/env bash
# CF-HoT phase B over seeds on the offline language model, with a LoRA of as many parameters beside the adapters.
# Makes the model first if it is not there. Two CPU cores: 25 minutes. Another base model:
#   MODEL=/path/to/llama-8b SIZE="--data wikitext2 --batch_size 2" bash scripts/cfhot_adapter_seeds.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_b}
SIZE=${SIZE:-"--data local --batch_size 4 --grad_accum 2 --max_steps 200 --lr 1e-3 --eval_interval 50 --save_interval 100
  --samples 5 --lora_reference"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --lora_reference" MODEL=${MODEL:-tiny}; fi
MODEL=${MODEL:-backbones/lm}

run() { # directory, flags
  run_one "$1/phase_b_results.json" "$1" \
    "$PYTHON" phase_b_8b_adapters.py --resume auto --model_path "$MODEL" --output_dir "$1" $SIZE "${@:2}"
}

if [[ $MODEL == backbones/lm ]]; then backbone lm "$MODEL"; fi
for seed in $SEEDS; do
  run "$ROOT/adapters_s$seed" --seed "$seed" "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" val.ppl_base val.ppl_gated lora.final.ppl val.max_abs_dlogit || failed=1
fi
exit $failed
