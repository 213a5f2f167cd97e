#!/usr/bin/env bash
# Cognate phase 1, 2 x 2 x 2: Muon, Grokfast and the memory, each on and off, at equal tokens, on generated recall and
# arithmetic questions; and everything on but for the halting head's diversity loss. Ends in a table of means with 95 %
# intervals and of each factor's main effect over seeds. RATES: each optimizer alone, without Grokfast and the memory, at
# other learning rates, so that a rate that suits one of them decides nothing.
# One CPU core: about 1.5 hours (45 runs of 500 updates). Grokfast is tested at the document's lambda.
#   SEEDS="0 1 2" LAMBDA=2.0 ROOT=runs/cognate_lambda2 bash scripts/cognate_ablation.sh
# A finished run is skipped, a broken one resumed; a failure is reported at the end. DRY=1 prints the commands, TEST=1
# runs the same at the size of --test.
source "$(dirname "$0")/sweep.bash"
SEEDS=${SEEDS:-"0 1 2"} ROOT=${ROOT:-runs/cognate_ablation} LAMBDA=${LAMBDA:-0.02} RATES=${RATES-"5e-4 1e-3 4e-3"}
SIZE=${SIZE:-"--size tiny --d-model 128 --n-heads 4 --tokenizer local --vocab-size 512 --dropout 0 --init-std 0.05
  --datasets synth_add synth_word synth_recall synth_two_step synth_recall3 synth_copy --synth-rows 1000 --no-curriculum
  --epochs 3 --batch-size 32 --grad-accum 1 --max-length 128 --learning-rate 2e-3 --early-stop-patience 0
  --save-every 100 --device cpu --threads 1 --wandb-mode disabled"}
if [[ ${TEST:-0} == 1 ]]; then SIZE="--test --synth-rows 40 --no-curriculum"; fi

run() { # directory, flags
  run_one "$1/reasoning/cognate_results.json" "$1" \
    "$PYTHON" train_phase1_cognate.py --model reasoning --resume --checkpoint-dir "$1" $SIZE "${@:2}"
}

for seed in $SEEDS; do
  for muon in 1 0; do for grokfast in 1 0; do for memory in 1 0; do
    flags=(--seed "$seed" --grokfast-lambda "$LAMBDA")
    [[ $muon == 1 ]] || flags+=(--optimizer adamw)
    [[ $grokfast == 1 ]] || flags+=(--grokfast-lambda 0)
    [[ $memory == 1 ]] || flags+=(--no-memory)
    run "$ROOT/muon${muon}_grokfast${grokfast}_memory${memory}_s$seed" "${flags[@]}" "$@"
  done; done; done
  for rate in $RATES; do for muon in 1 0; do
    flags=(--seed "$seed" --grokfast-lambda 0 --no-memory --learning-rate "$rate")
    [[ $muon == 1 ]] || flags+=(--optimizer adamw)
    run "$ROOT/rate${rate}_muon${muon}_s$seed" "${flags[@]}" "$@"
  done; done
  run "$ROOT/no_diversity_s$seed" --seed "$seed" --grokfast-lambda "$LAMBDA" --act-diversity-weight 0 "$@"
done
if [[ $DRY != 1 ]]; then
  "$PYTHON" - "$ROOT" <<'TABLE' || failed=1
import json, re, sys
from pathlib import Path
import core

METRICS = {"val loss": lambda r: r["final"]["loss"], "act var": lambda r: r["final"]["act_q_variance"],
           "tokens": lambda r: r["tokens"]}
for name in ("synth_recall", "synth_recall3", "synth_add", "synth_copy"):
    METRICS[name] = lambda r, n=name: ((r["final"]["datasets"].get(n) or {}).get("answers") or {}).get("mean")
runs, without, rates = {}, [], {}  # without: the diversity loss; rates: by (rate, muon)
for path in sorted(Path(sys.argv[1]).glob("*/reasoning/cognate_results.json")):
    name = path.parts[-3]
    found = {m: f(json.loads(path.read_text())) for m, f in METRICS.items()}
    if name.startswith("no_diversity"):
        without.append(found)
    elif name.startswith("rate"):
        rate, muon = re.match(r"rate(.+)_muon(\d)", name).groups()
        rates.setdefault((float(rate), int(muon)), []).append(found)
    else:
        runs[tuple(map(int, re.findall(r"\d+", name)))] = found  # muon, grokfast, memory, seed
core.require(runs, f"{sys.argv[1]}: no run has finished")

def show(values):
    values = [v for v in values if v is not None]
    return "{mean:.4g} [{lo:.4g}, {hi:.4g}]".format(**core.mean_interval(values)) if values else "-"

def row(title, found):
    print(f"{f'{title}  {len(found)}':24s}" + "".join(f"{show([r[m] for r in found]):>36s}" for m in METRICS))

print(f"{'muon grokfast memory  n':24s}" + "".join(f"{m:>36s}" for m in METRICS))
for cell in sorted({k[:3] for k in runs}, reverse=True):
    row("  ".join(map(str, cell)), [r for k, r in runs.items() if k[:3] == cell])
if without:
    row("all, no diversity", without)
if rates:
    print(f"\n{'Muon  rate  n':24s}" + "".join(f"{m:>36s}" for m in METRICS))
for (rate, muon), found in sorted(rates.items(), key=lambda item: (-item[0][1], item[0][0])):
    row(f"{muon}  {rate:g}", found)
print("\nmain effect (on minus off, paired by seed and averaged over the other factors)")
for i, factor in enumerate(("Muon", "Grokfast", "memory")):
    line = []
    for m in METRICS:
        effects = []
        for seed in sorted({k[3] for k in runs}):
            pairs = [(runs[k][m], runs[k[:i] + (0,) + k[i + 1:]][m]) for k in runs
                     if k[3] == seed and k[i] == 1 and k[:i] + (0,) + k[i + 1:] in runs]
            pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
            effects += [sum(a - b for a, b in pairs) / len(pairs)] if pairs else []
        line.append(f"{show(effects):>36s}")
    print(f"{factor:24s}" + "".join(line))
TABLE
fi
exit $failed
