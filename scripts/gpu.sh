#!/usr/bin/env bash
# The documents' runs on a GPU, in the order of what each decides, in slices that resume:
#   MINUTES=9 bash scripts/gpu.sh              until it prints its table; a slice ends with what runs saved (exit code 143)
#   bash scripts/gpu.sh checks phase_a         these groups alone: checks bench phase_a cognate hst afrb phase_b latentwire
# checks   every script's short run: fp32 as on the CPU, bf16, fp16 and its scaler, resume, recomputed activations, 4 bits
# bench    tokens/s, memory and utilisation of each model beside a plain transformer of equal shape
# The others are the documents' own commands. Without the hub they read TEXT (a file or folder; unset: the prose of the
# Python library), DATA (with gsm8k, svamp, asdiv) and SQUAD (a SQuAD file), and the models are random ones of the
# documented shape, made once: they then decide time and memory, not quality.
# Environment: ROOT (runs/gpu), SEEDS (0), DEVICE (cuda), MODEL_8B, MODEL_1B, HUB (1 or 0; unset: tried), PYTHON; DRY=1 prints
# the commands, TEST=1 runs the same at smoke size on a CPU in under five minutes. A finished run is skipped, a broken one resumed.
source "$(dirname "$0")/sweep.bash"
ROOT=${ROOT:-runs/gpu} TEST=${TEST:-0} SEEDS=${SEEDS:-0} LOG=stdout.txt
DEVICE=${DEVICE:-$([[ $TEST == 1 ]] && echo cpu || echo cuda)}
GROUPS_=${*:-checks bench phase_a cognate hst afrb phase_b latentwire}
if [[ -z ${HUB:-} ]]; then HUB=0; if [[ $TEST$DRY == 00 ]]; then HUB=$("$PYTHON" -c "import core; print(int(core.hub_ready()))"); fi; fi
if [[ -n ${MINUTES:-} && $DRY != 1 ]]; then
  (sleep "${MINUTES}m" && kill -s TERM $$) >/dev/null 2>&1 &
  timer=$!
  trap '{ pkill -P "$timer"; kill "$timer"; } 2>/dev/null || true' EXIT
fi

big() { # document's, test, offline (else as the document's): the setting for this kind of run
  if [[ $TEST == 1 ]]; then echo "$2"; elif [[ $HUB == 1 ]]; then echo "$1"; else echo "${3-$1}"; fi
}
BENCHES="phase_a phase_b pvm afrb cognate latentwire hst stack"
text="--data local"
if [[ -n ${TEXT:-} ]]; then text="--data text --data_path $TEXT"; fi

shape() { # name, settings of a Llama: an untrained model of this shape in backbones/NAME, in bf16
  if [[ $DRY == 1 || $TEST == 1 || -f backbones/$1/config.json ]]; then return; fi
  echo "making: backbones/$1"
  begin "$PYTHON" -c "
import sys, torch, core
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
sizes = dict(pair.split('=') for pair in sys.argv[2:])
config = LlamaConfig(**{k: int(v) for k, v in sizes.items()}, rope_parameters={'rope_type': 'default', 'rope_theta': 5e5})
with torch.device('$DEVICE'):
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1])
core.load_backbone('tiny')[1].save_pretrained(sys.argv[1])" "backbones/$1" "${@:2}"
  settle "$!"
  if [[ $code != 0 ]]; then failed=1; fi
}

part() { # file that marks it as done, command: what is no training run
  if [[ $DRY == 1 ]]; then echo "${*:2}"; return; fi
  if [[ -f $1 ]]; then echo "passed already: $1"; return; fi
  mkdir -p "$ROOT"
  echo "begun: ${*:2}"
  begin "${@:2}"
  settle "$!"
  if [[ $stopped != 0 ]]; then exit "$stopped"; fi
  if [[ $code == 0 ]]; then touch "$1"; else echo "FAILED: ${*:2}"; failed=1; fi
}

run() { # name, its result file, the claims it decides, directory flag, script, flags
  local dir=$ROOT/$1
  if [[ $DRY != 1 ]]; then mkdir -p "$dir"; echo "$3" >"$dir/decides.txt"; fi
  if [[ $TEST == 1 ]]; then set -- "${@:1:5}" --test "${@:6}"; fi
  run_one "$dir/$2" "$dir" "$PYTHON" "$5" "$4" "$dir" "${@:6}" --device "$DEVICE" --resume auto
}

for group in $GROUPS_; do
  case $group in
    checks) CLAIMBENCH_DEVICE=$DEVICE part "$ROOT/checks_passed" "$PYTHON" -m pytest -m slow tests/test_device.py \
      $(big "" "-k phase_a") ;;
    bench) for model in $(big "$BENCHES" pvm); do
      part "$ROOT/bench_$model.json" "$PYTHON" bench.py --group "$model" --device "$DEVICE" --out "$ROOT/bench_$model.json" \
        $(big "--rounds 20 --batch_size 16" "--rounds 1")
    done ;;
    phase_a) for s in $SEEDS; do
      run "phase_a_s$s" phase_a_results.json "perplexity 53 of the baseline, criteria, 14 GB, 45 minutes" --output_dir \
        phase_a_validation.py --seed "$s" $(big "" "" "$text") \
        $(big "--batch_size 16 --max_steps 10000 --lr 1e-4" "--max_steps 10")
    done ;;
    cognate) for s in $SEEDS; do
      run "cognate_s$s" reasoning/cognate_results.json "loss and accuracy over ten epochs, 20 to 30 minutes an epoch, 6 GB" \
        --checkpoint-dir train_phase1_cognate.py --model reasoning --wandb-mode disabled --seed "$s" \
        $(big "--epochs 10 --batch-size 16" "--epochs 1 --synth-rows 12") \
        $(big "" "" "--data-dir ${DATA:-../shared/data} --datasets gsm8k svamp asdiv")
    done ;;
    hst) for s in $SEEDS; do for variant in plain v5 v7_1_2_agile v6; do
      run "hst_${variant}_s$s" hst_results.json "tokens/s at the documented size; gain over plain" --save_dir hst_train.py \
        --variant "$variant" --seed "$s" $(big "" "" "--data ${TEXT:-local} --tokenizer byte") \
        $(big "--max_steps 2000" "--max_steps 2 --self_check false --eval_rows 4")
    done; done ;;
    afrb) base=${MODEL_1B:-$(big "" tiny random:tinyllama)}
      for s in $SEEDS; do
        needle="--task needle --ctx-chunks 4 --ctx-chunk-len 128 --needle-len 16 --seq 512 --lr 1e-4 --disable-attn"
        needle+=" --needle-query --enable-pvm --readout-from pvm --infonce-weight 0.3 --kiss-ridge-calib"
        run "afrb_reproduce_s$s" metrics.json "recall of 10.5 %; 8 GB, 15 to 30 minutes" --save afrb_train.py \
          ${base:+--model $base} --seed "$s" $(big "$needle --steps 2000 --bs 1 --ga 4" \
          "--task needle --enable-pvm --disable-attn --steps 6")
        run "afrb_big_s$s" metrics.json "memory with recomputed activations" --save afrb_train.py ${base:+--model $base} \
          --seed "$s" --task needle --enable-pvm --disable-attn --gradient-checkpointing $(big \
          "--ctx-chunks 16 --ctx-chunk-len 128 --seq 2048 --steps 500 --lr 5e-5 --bs 1 --ga 8" "--steps 6")
      done ;;
    phase_b | latentwire)
      base=${MODEL_8B:-$(big meta-llama/Meta-Llama-3.1-8B-Instruct tiny backbones/random_8b)}
      if [[ $base == backbones/random_8b ]]; then
        shape random_8b vocab_size=128256 hidden_size=4096 intermediate_size=14336 num_hidden_layers=32 \
          num_attention_heads=32 num_key_value_heads=8 max_position_embeddings=8192
      fi
      for s in $SEEDS; do
        if [[ $group == phase_b ]]; then
          run "phase_b_s$s" phase_b_results.json "20 GB, 10 minutes for 100 steps" --output_dir phase_b_8b_adapters.py \
            --seed "$s" $(big "--model_path $base --load_in_4bit on --gradient_checkpointing --max_steps 100" \
            "--max_steps 4 --samples 0" "--model_path $base --gradient_checkpointing --max_steps 100 $text")
        else
          data="--dataset squad"
          if [[ -n ${SQUAD:-} ]]; then data="--train_file $SQUAD"; elif [[ $HUB != 1 ]]; then data="--dataset synthetic"; fi
          run "latentwire_width_s$s" summary.json "F1 at a quarter of the width; a minute" --save_dir latentwire_stage1.py \
            --mode phase1a --seed "$s" \
            $(big "--model_id $base --compress_dim 1024 --samples 10000 --epochs 3 $data" "--samples 16 --epochs 1")
          run "latentwire_gist_s$s" summary.json "a code of the context at a quarter of the positions" --save_dir \
            latentwire_stage1.py --mode pooling --pooling_mode gist --seed "$s" $(big \
            "--model_id $base --compress_method none --pool_ratio 4 --samples 10000 --epochs 1 $data" \
            "--samples 16 --epochs 1 --pool_ratio 4" \
            "--model_id $base --compress_method none --pool_ratio 4 --samples 2000 --epochs 1 $data")
        fi
      done ;;
    *) echo "unknown group: $group (use: checks bench phase_a cognate hst afrb phase_b latentwire)" >&2; exit 2 ;;
  esac
done
if [[ $DRY != 1 ]]; then "$PYTHON" claims.py gpu "$ROOT" || failed=1; fi
exit $failed
