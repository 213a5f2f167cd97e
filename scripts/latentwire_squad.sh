#!/usr/bin/env bash
# LatentWire on real questions: a small language model is trained on local text and on the passages and questions of a
# SQuAD file, as far as that goes, and asked the questions of held-out articles from their text, from other passages and
# from shorter text. A code is worth measuring only where the text itself beats other passages.
#   bash scripts/latentwire_squad.sh SQUAD.json [MORE_TEXT ...]      15 minutes on two CPU cores
# Environment: STEPS (800), SAMPLES (1000 questions), OUTPUT_DIR (runs/latentwire/squad), PYTHON, DRY.
source "$(dirname "$0")/sweep.bash"
ROOT=${OUTPUT_DIR:-runs/latentwire/squad} STEPS=${STEPS:-800}
if [[ $# == 0 || ! -f $1 ]]; then echo "latentwire_squad.sh: give a SQuAD v1.1 file" >&2; exit 2; fi
if [[ $DRY != 1 ]]; then
  mkdir -p "$ROOT/text"
  "$PYTHON" - "$@" "$ROOT" <<'PROGRAM'
import json
import shutil
import sys
from pathlib import Path

import core
import latentwire_stage1

source, *texts, root = sys.argv[1:]
parts = latentwire_stage1.split_by_article(core.squad_rows(source), source)
for name, rows in zip(("train", "validation"), parts):
    lines = [json.dumps(row) for row in latentwire_stage1.shuffled(rows, 0, 0)]
    Path(root, f"{name}.jsonl").write_text("\n".join(lines) + "\n")
form = "Context: {context}\nQuestion: {question}\nAnswer: {answers[0]}\n\n"
Path(root, "text", "questions.txt").write_text("".join(form.format(**row) for row in parts[0]))
for text in texts:
    shutil.copy(text, Path(root, "text"))
PROGRAM
fi
LOG=stdout.txt SHOWN="^\[" run_one "$ROOT/lm/backbone_results.json" "$ROOT/lm" "$PYTHON" pretrain_backbone.py --kind lm \
  --data text --data_path "$ROOT/text" --max_steps "$STEPS" --output_dir "$ROOT/lm" --resume auto
LOG=stdout.txt SHOWN="F1" run_one "$ROOT/text_or_not/summary.json" "$ROOT/text_or_not" "$PYTHON" latentwire_stage1.py \
  --mode baselines --baseline text,token_budget,salience --model_id "$ROOT/lm" --train_file "$ROOT/train.jsonl" \
  --eval_file "$ROOT/validation.jsonl" --samples "${SAMPLES:-1000}" --compress_method none --stop_strings '\n' \
  --token_budget 64 --save_dir "$ROOT/text_or_not" --resume auto
exit $failed
