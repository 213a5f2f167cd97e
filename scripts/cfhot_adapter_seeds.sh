#!/usr/bin/env bash
# CF-HoT phase B over seeds on the offline language model, with a LoRA of as many parameters beside the adapters.
# Makes the model first if it is not there. Two CPU cores: 25 minutes. Another base model:
#   MODEL=/path/to/llama-8b SIZE="--data wikitext2 --batch_size 2" bash scripts/cfhot_adapter_seeds.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# makes every run a smoke test. Flags given here go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cfhot_b} PYTHON=${PYTHON:-python} failed=0
SIZE=${SIZE:-"--data local --batch_size 4 --grad_accum 2 --max_steps 200 --lr 1e-3 --eval_interval 50 --save_interval 100
  --samples 5 --lora_reference"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --lora_reference" MODEL=${MODEL:-tiny}; fi
MODEL=${MODEL:-runs/backbone/lm}

run_one() {
  local cmd=("$PYTHON" phase_b_8b_adapters.py --resume auto --model_path "$MODEL" --output_dir "$1" $SIZE "${@:2}")
  if [[ ${DRY:-0} == 1 ]]; then echo "${cmd[*]}"; return; fi
  if [[ -f $1/phase_b_results.json ]]; then echo "done already: $1"; return; fi
  mkdir -p "$1"
  echo "running: $1"
  "${cmd[@]}" >>"$1/stdout.txt" 2>&1 || { echo "FAILED: $1 (see $1/stdout.txt)"; failed=1; }
}

if [[ ${DRY:-0} != 1 && $MODEL == runs/backbone/lm && ! -f $MODEL/backbone_results.json ]]; then
  "$PYTHON" pretrain_backbone.py --kind lm --resume auto
fi
for seed in $SEEDS; do
  run_one "$ROOT/adapters_s$seed" --seed "$seed" "$@"
done
if [[ ${DRY:-0} != 1 ]]; then
  "$PYTHON" claims.py table "$ROOT" val.ppl_base val.ppl_gated lora.final.ppl val.max_abs_dlogit || failed=1
fi
exit $failed
