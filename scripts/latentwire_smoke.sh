#!/usr/bin/env bash
# LatentWire's eight smoke configurations on its byte encoder (base, lora, prefix, deep_prefix, latent_adapters,
# coprocessor, gist_head, refiner): does any part rescue it? Document: 40 updates on a GPU and Llama 3.1 8B.
#   bash scripts/latentwire_smoke.sh --test             smoke size, 2 minutes
#   OFFLINE=1 bash scripts/latentwire_smoke.sh          on the offline reader, 1,500 updates of two facts, then four:
#       about 6 core-minutes a run, 50 core-minutes for SEEDS=0
# OFFLINE=1 UPDATES=documented keeps the document's 160 contexts and 2 epochs (1 core-minute a run). Settings: scripts/wire.bash.
source "$(dirname "$0")/wire.bash"
ROOT=${ROOT:-runs/latentwire_smoke}
TABLE=$ROOT
if [[ $TEST == 0 && $OFFLINE == 1 ]]; then readers; fi
offline="--llama_id $READER --dataset synthetic --warm_anchor_mode text --encoder_use_chat_template False --device cpu --threads 1"
offline+=" --facts 4 --questions_per_context 4 --eval_samples 64 --max_new_tokens 4 --latent_adapter_layers 0,1,2 --ratio 2"
if [[ ${UPDATES:-} != documented ]]; then
  offline+=" --fact_curriculum 2,4 --samples 3000 --epochs 6 --batch_size 12 --d_z 64 --lr 1e-3 --grad_diag_interval 0"
fi
small="--test --models llama --warm_anchor_mode text --encoder_use_chat_template False --latent_adapter_layers 0,1 --d_z 32"
flags=$(choose "" "$offline" "$small")
for seed in ${SEEDS:-0}; do
  for name in base lora prefix deep_prefix latent_adapters coprocessor gist_head refiner; do
    run "$ROOT/${name}_s$seed" --config "scripts/smoke/$name.json" --tag "smoke-$name" $flags --seed "$seed"
  done
done
close shares.llama_2 shares.llama_32_slots shares_swapped.llama_2 shares_swapped.llama_32_slots parameters.trained
exit $failed
