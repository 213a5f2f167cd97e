"""Every documented claim, its measurement, its controls and its verdict: RESULTS.md and plots/ from result files.

Report   python claims.py report                                       docs/results -> RESULTS.md, plots/
         python claims.py report --results runs/demo --out runs/demo   your own runs
Table    python claims.py table runs/cfhot_a final.cf_hot_loss final.baseline_loss
Status   python claims.py status compression runs/compression_suite     the document's words for a LatentWire sweep
Curves   python claims.py plot runs/cfhot_a                            every run there -> RUN/plots/*.png
Gains    python claims.py hst runs/hst                                 HST's variants against plain, by seed
Cognate  python claims.py cognate runs/cognate_ablation                table of its ablation, effects by factor
AFRB     python claims.py lanes out                                    a table of its runs, and out/summary.csv

Verdicts read result files only, never logs; `plot` reads the logs of runs, finished or not. A verdict follows from the
interval over runs and the band that claims.yaml gives: the end of the interval that is worst for the claim decides, so
a claim holds only where all of it does.
"""

import argparse
import csv
import io
import json
import math
import operator
import os
import re
import sys
from pathlib import Path

import yaml

import core

MARKS = "<!-- claims: begin -->", "<!-- claims: end -->"
OPERATORS = {"-": operator.sub, "/": operator.truediv, "*": operator.mul}


def read(root: Path, pattern: str) -> list[dict]:
    """The result files under `root` that match `pattern`, in order; each knows the directory it came from."""
    return [json.loads(p.read_text()) | {"run": p.parent.name} for p in sorted(root.glob(pattern))]


def value(result: dict, expression: str) -> float | None:
    """`a.b` of a result, or `a.b / c.d`, `a.b - 1.5`: names joined by dots, numbers, one operator. None if absent."""
    words = expression.split()
    operands = []
    for word in words[::2]:
        try:
            operands.append(float(word))
        except ValueError:
            item = result
            for name in word.split("."):
                item = item.get(name) if isinstance(item, dict) else None
            operands.append(item)
    if any(x is None for x in operands):
        return None
    return float(OPERATORS[words[1]](*operands)) if len(words) == 3 else float(operands[0])


def measure(root: Path, spec: dict) -> dict | None:
    """Interval of `spec["metric"]` over the runs that match `spec["results"]`, or of the arithmetic `spec["value"]`."""
    if "value" in spec:  # arithmetic on the document's own figures, from our claims.yaml
        x = float(eval(str(spec["value"]), {"__builtins__": {}, "math": math, "abs": abs}))
        return {"mean": x, "lo": x, "hi": x, "n": 0, "results": []}
    results = read(root, spec["results"])
    found = [x for x in (value(r, spec["metric"]) for r in results) if x is not None]
    return core.mean_interval(found) | {"results": results} if found else None


def verdict(measured: dict | None, claim: dict) -> str:
    """holds, partly, fails, or not testable here: by where the whole interval lies."""
    if measured is None:
        return "not testable here"

    def inside(band):
        return band and band[0] <= measured["lo"] and measured["hi"] <= band[1]

    holds, partly = claim["holds"], claim.get("partly")
    if inside(holds):
        return "holds"
    both = [min(holds[0], partly[0]), max(holds[1], partly[1])] if partly else None
    return "partly" if inside(both) else "fails"


def figure(measured: dict | None, digits: int = 4) -> str:
    """`mean [lo, hi] (n runs)` with so many significant digits."""
    if measured is None:
        return "no result file"

    def short(x):
        return f"{x:,.0f}" if x == int(x) and abs(x) >= 1000 else f"{x:.{digits}g}"

    if measured["n"] == 0:
        return f"{short(measured['mean'])} (arithmetic)"
    if measured["n"] == 1 or measured["lo"] == measured["hi"]:
        return f"{short(measured['mean'])} (n = {measured['n']})"
    return f"{short(measured['mean'])} [{short(measured['lo'])}, {short(measured['hi'])}] (n = {measured['n']})"


def stand_in(measured: dict | None, claim: dict) -> str:
    """What the runs used in place of the documented data or model, in words for the row."""

    def model(r):
        return r.get("model_id") or r["data"].get("model") or r.get("config", {}).get("model_id")

    results, words = [r for r in (measured or {}).get("results", []) if "data" in r], []
    for kind, used in (("data", lambda r: r["data"]["source"]), ("model", model)):
        other = sorted({str(used(r)) for r in results} - {claim.get(kind)})
        if claim.get(kind) and other:
            words.append(f"{', '.join(other)} instead of {claim[kind]}")
    return f"; on {' and '.join(words)}" if words else ""


def report(root: Path, out: Path) -> list[dict]:
    book = yaml.safe_load((Path(__file__).resolve().parent / "claims.yaml").read_text())
    rows, headlines = [], ["| idea | claim | measured here | verdict |", "| --- | --- | --- | --- |"]
    lines = [
        "# Results",
        "",
        "Made by `python claims.py report` from the result files under `docs/results`; nothing here is typed by hand.",
        "Intervals are 95 % Student-t over runs with different seeds. A claim *holds*, or holds *partly*, only where",
        "its whole interval lies in the band that `claims.yaml` gives for that; otherwise it *fails*.",
        "",
    ]
    for system, claims in book["claims"].items():
        lines += [f"## {system}", "", "| claim | documented | measured | controls | verdict |", "| --- " * 5 + "|"]
        for claim in claims:
            measured = measure(root, claim) if "results" in claim or "value" in claim else None
            controls = [f"{c['label']}: {figure(measure(root, c))}" for c in claim.get("controls", [])]
            row = {"id": claim["id"], "verdict": verdict(measured, claim), "measured": figure(measured)}
            rows.append(row)
            missing = f"needs {claim['needs']}" if "needs" in claim else "no result file"
            shown = row["measured"] + stand_in(measured, claim) if measured else missing
            judged = f"**{row['verdict']}**. {claim.get('note', '')}".strip()
            cells = [claim["claim"], str(claim["documented"]), shown, "<br>".join(controls), judged]
            lines.append("| " + " | ".join(cells) + " |")
            if "headline" in claim:
                star = " \\*" if stand_in(measured, claim) else ""
                headlines.append(f"| {system} | {claim['headline']} | {figure(measured, 3)}{star} | {row['verdict']} |")
        lines += ["", "Commands:", ""]
        lines += [f"- {claim['id']}: `{claim['command']}`" for claim in claims if "command" in claim]
        lines.append("")
    for plot in book["plots"]:
        if draw(root, out / "plots" / plot["file"], plot):
            lines += [f"![{plot['title']}](plots/{plot['file']})", ""]
            print(f"plot: {out / 'plots' / plot['file']}")
    core.write_atomic(out / "RESULTS.md", "\n".join(lines).encode())
    if (out / "README.md").exists():  # the rows marked as headlines stand there as well
        replace_between(out / "README.md", MARKS, "\n".join(headlines))
    return rows


def replace_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between the two marks of the page; Failure if they are not in it."""
    old = page.read_text()
    core.require(all(mark in old for mark in marks), f"{page}: {' and '.join(marks)} are not in it")
    before, rest = old.split(marks[0])
    core.write_atomic(page, f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}".encode())


def draw(root: Path, path: Path, plot: dict) -> bool:
    """One line for each series: mean over its runs, band from the lowest to the highest. False without any data."""
    drawn = {}
    for series in plot["series"]:
        curves = [value for r in read(root, series["results"]) if (value := _list(r, series["y"]))]
        if curves:
            drawn[f"{series['label']} (n = {len(curves)})"] = curves
    if drawn:
        picture(path, plot, drawn)
    return bool(drawn)


def picture(path: Path, plot: dict, drawn: dict[str, list]) -> None:
    """Write `path`. `drawn`: label -> curves, each [[x, y], ...], of which the mean over those x that all have, and
    the band from lowest to highest, are shown; or label -> {mean, lo, hi}, shown as a bar with its interval."""
    try:
        import matplotlib
    except ImportError as error:
        raise core.Failure("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = {label: value for label, value in drawn.items() if isinstance(value, dict)}
    figure_, axes = plt.subplots(figsize=(7, max(4.2, 0.34 * len(bars))), layout="constrained")
    for i, (label, curves) in enumerate((k, v) for k, v in drawn.items() if k not in bars):
        steps = sorted(set.intersection(*({step for step, _ in c} for c in curves)))
        columns = [[dict(map(tuple, c))[step] for c in curves] for step in steps]
        style = ("-", "--", ":", "-.")[i % 4]  # dashes, so that curves that coincide are all seen
        mark = "o" if len(steps) < 15 else None  # a curve of one point is seen too
        means = [sum(c) / len(c) for c in columns]
        (line,) = axes.plot(steps, means, style, label=label, linewidth=1.8, marker=mark, markersize=4)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    if bars:
        means = [b["mean"] for b in bars.values()]
        ends = [[max(0.0, s * (b[end] - b["mean"])) for b in bars.values()] for end, s in (("lo", -1), ("hi", 1))]
        axes.barh(list(bars), means, xerr=ends, color="tab:blue", alpha=0.7, ecolor="black", capsize=3)
        axes.margins(y=0.02)
        axes.invert_yaxis()
    if "floor" in plot:
        axes.axhline(float(plot["floor"]), color="black", linestyle="--", linewidth=1, label=plot["floor_label"])
    figure_.suptitle(plot["title"], fontsize="large")  # over the legend's column as well
    axes.set(xlabel=plot["x"], ylabel=plot["y"], **plot.get("axes", {}))
    if not bars and axes.get_xscale() == "linear":
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if len(drawn) > 4 and not bars:  # beside the curves: there is no room among so many
        figure_.legend(frameon=False, loc="outside right center")
    elif not bars:
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=130)
    plt.close(figure_)


# What `plot` draws of a run: file, title, y axis, and the names in the run's log with what they are called.
PANELS = (
    (
        "loss",
        "Loss",
        "nats per token",
        {
            "train_loss": "training",
            "val_loss": "validation",
            "train/loss": "training",
            "val/loss": "validation",
            "lm_loss": "training, next token",
        },
    ),
    ("objective", "Objective", "loss", {"loss": "training"}),
    ("gate", "Mean gate", "gate", {"gate": "gate", "gate/mean_g": "gate"}),
    ("memory_gate", "Gate of the memory", "sigmoid(gate)", {"pvm_gate_strength": "gate"}),
    ("coherence", "Phase coherence", "coherence, 0 to 1", {"phase_coherence": "coherence"}),
    (
        "act_variance",
        "Variance of the halting probability",
        "variance",
        {"act/q_variance": "training", "val/act_q_variance": "validation"},
    ),
    ("heads", "Loss of each prediction head", "nats per token", {"horizon_by_offset": "offset"}),
    (
        "f1",
        "Answers",
        "share",
        {
            "f1": "F1",
            "em": "exact match",
            "em_shuffled_words": "exact match, shuffled context",
            "quick_f1": "F1 of the quick evaluation",
        },
    ),
)


def plot_run(run: Path) -> list[Path]:
    """Draw a run directory's log.jsonl and recall curves into RUN/plots; returns the files written."""
    log, drawn, written = run / "log.jsonl", {}, []
    for line in log.read_text().splitlines() if log.exists() else ():
        row = json.loads(line)
        step = row.get("step", row.get("train/step"))
        for panel in PANELS if step is not None else ():
            for name, label in panel[3].items():
                found = row.get(name)
                several = enumerate(found, 2) if isinstance(found, list) else ()
                for what, x in {f"{label} {k}": x for k, x in several}.items() or {label: found}.items():
                    what = f"{row['arm']}, {what}" if "arm" in row else what
                    if x is not None:
                        drawn.setdefault(panel[0], {}).setdefault(what, {})[step] = x
    for file, title, unit, _ in PANELS:
        if file in drawn:
            for label, curve in list(drawn[file].items()):  # without further losses the objective is this one
                if label.endswith(", next token") and curve == drawn[file].get(label.removesuffix(", next token")):
                    del drawn[file][label]
            title = {"title": f"{title}: {run.name}", "x": "training steps", "y": unit}
            title["axes"] = {"ylim": (-0.03, 1.03)} if unit == "share" else {}
            written.append(run / "plots" / f"{file}.png")
            picture(written[-1], title, {label: [sorted(c.items())] for label, c in drawn[file].items()})
    for path in run.glob("metrics.json"):
        result = json.loads(path.read_text())
        curves = {name.replace("_", " ", 1).replace("_", "."): c for name, c in (result.get("recall") or {}).items()}
        if result.get("recall_by_distance"):
            curves["trained memory"] = result["recall_by_distance"]
        if curves:
            title = {"title": f"Recall over distance: {run.name}", "x": "distance in tokens", "y": "share recalled"}
            title["axes"] = {"ylim": (-0.03, 1.03), "xscale": "log" if result.get("recall") else "linear"}
            written.append(run / "plots" / "recall.png")
            picture(written[-1], title, {label: [c] for label, c in curves.items()})
    return written


def plot(root: Path) -> list[Path]:
    """Draw every run in and below `root`, and, of LatentWire's runs, F1 for each of them and for its text controls."""
    core.require(root.is_dir(), f"{root}: no such run directory")
    runs = sorted({p.parent for name in ("log.jsonl", "metrics.json") for p in root.rglob(name)})
    written, bars = [path for run in runs for path in plot_run(run)], {}
    summaries = sorted(root.rglob("summary.json"))
    for path in summaries:
        result, name = json.loads(path.read_text()), str(path.parent.relative_to(root))
        text = (result.get("baselines_same_protocol") or {}).get("text")
        bars |= {"text": text["f1_interval"]} if text and "text" not in bars else {}
        bars |= {name if name != "." else root.name: result["f1_interval"]} if result.get("f1_interval") else {}
        rows = (result.get("equal_positions") or {}) if len(summaries) == 1 else {}  # of many there is no room
        bars |= {k.replace("_", " "): r["f1_interval"] for k, r in rows.items() if "f1_interval" in r}
    if bars:
        written.append(root / "plots" / "f1_by_strategy.png")
        title = {"title": "F1 of each strategy", "x": "F1, with its 95 % interval", "y": ""}
        picture(written[-1], title, dict(sorted(bars.items(), key=lambda bar: -bar[1]["mean"])))
    core.require(written, f"{root}: no run with a log.jsonl, and no result with a curve")
    return written


def _list(result: dict, path: str) -> list | None:
    for name in path.split("."):
        result = result.get(name, {})
    return result or None


def table(root: Path, metrics: list[str]) -> int:
    """Print mean, sd and n of each metric over a sweep's runs; runs that differ in `_s<seed>` alone share a row."""
    files = sorted(root.glob("*/*results.json"))
    core.require(files, f"{root}: no */*results.json")
    groups: dict[str, list] = {}
    for path in files:
        groups.setdefault(re.sub(r"_s\d+$", "", path.parent.name), []).append(json.loads(path.read_text()))
    print(f"{'run':24s}" + "".join(f"{m.split('.')[-1]:>26s}" for m in metrics))
    for name, results in groups.items():
        cells = []
        for metric in metrics:
            found = [x for x in (value(r, metric) for r in results) if x is not None]
            sd = core.np.std(found, ddof=1) if len(found) > 1 else 0.0
            cells.append(f"{core.np.mean(found):.4f} ± {sd:.4f} (n={len(found)})" if found else "-")
        print(f"{name:24s}" + "".join(f"{c:>26s}" for c in cells))
    return len(files)


# ----------------------------------------------------------------------------------------- HST: variants against plain
HST_EQUAL = (  # flags in which a variant and its control may not differ
    "data dataset tokenizer vocab_size d_model n_layers max_seq_len eval_rows batch_size grad_accum max_steps "
    "max_seconds lr warmup weight_decay precision"
).split()


def flags_of(result: dict) -> dict:
    """The flags a run was started with: of its manifest, or of the older result files' `config`."""
    return result["manifest"]["flags"] if "manifest" in result else result["config"]


def hst_runs(root: Path) -> dict[tuple, dict]:
    """Finished HST runs below `root` by (axis, model, seed), as their result files tell it, whatever a directory is
    called. Axis: `seconds` for runs that --max_seconds ended, else `tokens`. Model: the variant, and what --off left
    out of it (`v6_without_horizon`)."""
    runs: dict[tuple, dict] = {}
    for result in read(root, "*/hst_results.json"):
        flags = flags_of(result)
        left_out = "".join(f"_without_{name}" for name in sorted(filter(None, flags.get("off", "").split(","))))
        key = "seconds" if flags.get("max_seconds") else "tokens", result["variant"] + left_out, result["seed"]
        other = runs.setdefault(key, result)["run"]
        name = result["run"]
        core.require(other == name, f"{root}: {other} and {name} are both {key[1]}, seed {key[2]}: move one away")
    return runs


def hst_comparison(root: Path) -> dict:
    """Nats that each HST model saves over `plain`, paired by seed, at equal tokens and at equal seconds: a table, and
    ROOT/compare_sSEED/hst_comparison.json for the report. Failure where a pair differs in more than the model."""
    runs = hst_runs(root)
    core.require(any(model == "plain" for _, model, _ in runs), f"{root}: no finished run of plain")
    savings: dict[tuple, list] = {}  # (model, axis) -> nats, a seed each
    comparisons: dict[int, dict] = {}  # seed -> {axis: {model: nats}, data}
    for (axis, model, seed), result in sorted(runs.items()):
        plain = runs.get((axis, "plain", seed))
        if plain is None or model == "plain":
            continue
        differ = [flag for flag in HST_EQUAL if flags_of(result).get(flag) != flags_of(plain).get(flag)]
        if axis == "tokens" and result["tokens"] != plain["tokens"]:
            differ.append("tokens")
        if abs(result["parameters"] / plain["parameters"] - 1) >= 0.01:
            differ.append("parameters")
        pair = f"{result['run']} and {plain['run']}"
        core.require(not differ, f"{pair} differ in {', '.join(differ)}: run both again")
        saved = plain["final"]["loss"] - result["final"]["loss"]
        savings.setdefault((model, axis), []).append(saved)
        comparison = comparisons.setdefault(seed, {"seed": seed, "data": result["data"]})
        comparison.setdefault(axis, {})[model] = saved
    for seed, comparison in comparisons.items():
        where = root / f"compare_s{seed}" / "hst_comparison.json"
        core.write_json(where, comparison | {"environment": core.environment()})
    print(f"{'nats saved over plain':32s}{'equal tokens':>32s}{'equal seconds':>32s}")
    for model in sorted({model for model, _ in savings}):
        cells = [savings.get((model, axis)) for axis in ("tokens", "seconds")]
        form = "{mean:+.4f} [{lo:+.4f}, {hi:+.4f}] n={n}"
        texts = [form.format(**core.mean_interval(cell)) if cell else "-" for cell in cells]
        print(f"{model:32s}" + "".join(f"{text:>32s}" for text in texts))
    return {f"{model} {axis}": nats for (model, axis), nats in savings.items()}


# ------------------------------------------------------------------------------------------ Cognate's ablation table
COGNATE = {  # column: where it stands in a result
    "val loss": "final.loss",
    "act var": "final.act_q_variance",
    "tokens": "tokens",
    "synth_recall": "final.datasets.synth_recall.answers.mean",
    "synth_recall3": "final.datasets.synth_recall3.answers.mean",
    "synth_add": "final.datasets.synth_add.answers.mean",
    "synth_copy": "final.datasets.synth_copy.answers.mean",
}


def cognate_effects(runs: dict[tuple, dict], factor: int, column: str) -> list[float]:
    """Of each seed: the mean over the other factors of `column` with the factor on minus off. `runs`: by
    (muon, grokfast, memory, seed); a pair of which one half is missing does not count."""
    effects = []
    for seed in sorted({key[3] for key in runs}):
        differences = []
        for key, on in runs.items():
            off = runs.get((*key[:factor], 0, *key[factor + 1 :]))
            if key[3] != seed or key[factor] == 0 or off is None:
                continue
            if on[column] is not None and off[column] is not None:
                differences.append(on[column] - off[column])
        if differences:
            effects.append(sum(differences) / len(differences))
    return effects


def cognate(root: Path) -> dict[tuple, dict]:
    """Print the table of scripts/cognate_ablation.sh: a row for each cell of Muon, Grokfast and memory, one without the
    diversity loss, one for each learning rate, then each factor's main effect, all with 95 % intervals over seeds.
    Returns the columns of the factorial runs by (muon, grokfast, memory, seed)."""
    runs, without, rates = {}, [], {}  # without: the diversity loss; rates: by (muon, rate)
    for path in sorted(root.glob("*/reasoning/cognate_results.json")):
        result, name = json.loads(path.read_text()), path.parts[-3]
        columns = {column: value(result, place) for column, place in COGNATE.items()}
        if name.startswith("no_diversity"):
            without.append(columns)
        elif rated := re.match(r"rate(.+)_muon(\d)", name):
            rates.setdefault((int(rated[2]), float(rated[1])), []).append(columns)
        else:
            runs[tuple(map(int, re.findall(r"\d+", name)))] = columns
    core.require(runs, f"{root}: no run has finished")

    def line(title: str, cells: list[list[float]]) -> None:
        known = [[x for x in cell if x is not None] for cell in cells]
        intervals = [core.mean_interval(cell) if cell else None for cell in known]
        shown = ["{mean:.4g} [{lo:.4g}, {hi:.4g}]".format(**i) if i else "-" for i in intervals]
        print(f"{title:24s}" + "".join(f"{text:>36s}" for text in shown))

    def row(title: str, chosen: list[dict]) -> None:
        line(f"{title}  {len(chosen)}", [[columns[name] for columns in chosen] for name in COGNATE])

    def head(title: str) -> None:
        print(f"{title:24s}" + "".join(f"{name:>36s}" for name in COGNATE))

    head("muon grokfast memory  n")
    for cell in sorted({key[:3] for key in runs}, reverse=True):
        row("  ".join(map(str, cell)), [columns for key, columns in runs.items() if key[:3] == cell])
    if without:
        row("all, no diversity", without)
    if rates:
        print()
        head("Muon  rate  n")
    for (muon, rate), chosen in sorted(rates.items(), key=lambda cell: (-cell[0][0], cell[0][1])):
        row(f"{muon}  {rate:g}", chosen)
    print("\nmain effect (on minus off, paired by seed and averaged over the other factors)")
    for i, factor in enumerate(("Muon", "Grokfast", "memory")):
        line(factor, [cognate_effects(runs, i, column) for column in COGNATE])
    return runs


# ------------------------------------------------------------------------- LatentWire: the document's status tables
STATUS_KINDS = ("weight_sweep", "compression", "sequence", "anneal", "embed_sweep", "baselines")
STATUS_LEVELS = {  # the document's word from an F1 on
    "compression": ((0.30, "SUCCESS"), (0.15, "MARGINAL"), (0.05, "POOR"), (0, "FAILURE")),
    "sequence": ((0.40, "strong"), (0.30, "moderate"), (0.20, "partial"), (0, "failure")),
}
ANNEAL_LEVELS = (  # word, least F1, cosine and first-token accuracy
    ("gold", 0.40, 0.85, 0.15),
    ("strong", 0.35, 0.80, 0.10),
    ("minimum", 0.30, 0.75, 0.0),
    ("partial", 0.28, -1.0, 0.0),
    ("between", 0.26, -1.0, 0.0),
)
NO_REFERENCE = "NO REFERENCE"  # the model cannot answer even the text prompt


def threshold(value: float, reference: float | None) -> float:
    """A documented F1 threshold, or, for a stand-in model, the same share of its text F1 (documented: 0.36)."""
    return value if reference is None else min(1.0, value / 0.36) * reference


def suite_status(kind: str, f1: float, reference: float | None) -> str:
    if reference == 0:
        return NO_REFERENCE
    return next(word for least, word in STATUS_LEVELS[kind] if f1 >= threshold(least, reference))


def sweep_status(cos: float, f1: float, reference: float | None = None) -> str:
    """The document's word for one weight of the sweep."""
    if reference == 0:
        return NO_REFERENCE
    if cos < 0.3 or f1 < threshold(0.05, reference):
        return "COLLAPSED"
    if f1 > threshold(0.25, reference):
        return "IMPROVED"
    return "STABLE" if f1 > threshold(0.20, reference) else "DEGRADED"


def anneal_status(f1: float, cos: float, first: float, degenerate: bool, reference: float | None = None) -> str:
    if reference == 0:
        return NO_REFERENCE
    if degenerate:
        return "collapsed"
    for word, least, cosine, token in ANNEAL_LEVELS:
        if f1 >= threshold(least, reference) and cos >= cosine and first >= token:
            return word
    return "fail"


def against_plan(name: str, f1: float, cos: float, reference: float | None = None) -> str:
    """Whether an annealed run does what the document's plan expects of its variant; nothing for another run."""
    for variant, cosine, least in (("linear", 0.75, 0.30), ("weak", 0.80, 0.28), ("warmstart", 0.85, 0.35)):
        if f"anneal_{variant}" in name:
            least = threshold(least, reference)
            return "as expected" if cos >= cosine and f1 >= least else f"expected cos {cosine:.2f}, F1 {least:.2f}"
    return ""


def against_control(row: dict, control: dict) -> str:
    """One weight of the sweep against weight 0 under the same seed."""
    gap, se = row["f1"] - control["f1"], math.hypot(row["f1_se"], control["f1_se"])
    if row["collapse"] != "none":
        return "COLLAPSED"
    return "IMPROVED" if gap > 2 * se else "WORSE" if gap < -2 * se else "SAME"


def status_rows(root: Path) -> list[dict]:
    """One row for each run below `root`: its summary, or, of one that wrote none, what its log says. The cosine is that
    of the last record that has one: an evaluation record may not."""
    core.require(root.is_dir(), f"{root}: no such folder of runs")
    rows = []
    for directory in sorted(p for p in root.iterdir() if p.is_dir()):
        logs = sorted(directory.rglob("diagnostics.jsonl"))
        records = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
        cosines = [r["recon_cosine_sim"] for r in records if r.get("recon_cosine_sim") is not None]
        row = {"name": directory.name, "cos": cosines[-1] if cosines else None, "f1": None, "failed": ""}
        if (directory / "summary.json").exists():
            row |= json.loads((directory / "summary.json").read_text())
            if "best_f1" not in row or "budget" not in row:  # of another mode
                continue
            row["f1"] = row["best_f1"]
            row["cos"] = row.get("recon_cosine_sim") if row["cos"] is None else row["cos"]  # the log may lie elsewhere
            row["reference"] = row["baselines_same_protocol"]["text"]["f1"] if row.get("relative") else None
        elif logs:
            evaluations = [r for r in records if r.get("type") == "full_eval"]
            ends = [f"{r['term']} not finite at step {r['step']}" for r in records if r.get("type") == "diverged"]
            row |= max(evaluations, key=lambda r: r["f1"], default={"failed": (ends or ["no result file"])[-1]})
        else:
            continue
        rows.append(row)
    core.require(rows, f"{root}: no run with a summary.json or a diagnostics.jsonl in it")
    return rows


def status(kind: str, root: Path) -> list[dict]:
    """Print the table of one of the document's sweeps; returns its rows."""
    if kind == "embed_sweep":
        summary = json.loads(core.read_text(root if root.is_file() else root / "summary.json"))
        for r in summary["sorted_by_f1"]:
            figures = f"F1 {r['f1']:.3f}  EM {r['em']:.3f}  empty {r['empty_rate']:.0%}"
            print(f"{r['rank']:3d} {r['experiment']:16s} {figures}")
        print(f"{summary['successful']} of {summary['total_experiments']} ran without an error")
        return summary["sorted_by_f1"]
    if kind == "baselines":
        rows = [json.loads(p.read_text()) | {"name": p.parent.name} for p in sorted(root.rglob("results.json"))]
        core.require(rows, f"{root}: no results.json in it")
        for r in rows:
            print(f"{r['name']:28s} {answers(r)}  positions {r['prefill_positions']:7.1f}  {r['collapse']}")
        return rows
    rows = status_rows(root)
    judge(kind, rows)
    for r in rows:
        print(status_line(r) if r["f1"] is not None else f"{r['name']:30s} FAILED ({r['failed']})")
    if kind == "compression":
        print(segment_verdict(rows))
    return rows


def judge(kind: str, rows: list[dict]) -> None:
    """Give each row that has a score its `word`, and what else the kind of sweep compares it with."""
    done = [r for r in rows if r["f1"] is not None]
    weightless = [r for r in done if r.get("lambda_kce") == r.get("lambda_kd") == 0]
    controls = {r.get("seed"): r for r in reversed(weightless)}
    for r in done:
        f1, cos, reference = r["f1"], r["cos"] or 0.0, r.get("reference")
        if kind == "weight_sweep":
            r["word"] = sweep_status(cos, f1, reference)
            control = controls.get(r.get("seed"), r)
            if control is not r:
                r["against_control"] = against_control(r, control)
        elif kind == "anneal":
            degenerate, first = r.get("collapse", "none") != "none", r.get("first_tok_top1") or 0.0
            r["word"] = anneal_status(f1, cos, first, degenerate, reference)
            r["against_plan"] = "" if reference == 0 else against_plan(r["name"], f1, cos, reference)
        else:
            r["word"] = suite_status(kind, f1, reference)


def answers(row: dict) -> str:
    return f"F1 {row['f1']:.3f} ± {row.get('f1_se', 0):.3f}  EM {row.get('em', 0):.3f}"  # a log may lack them


def status_line(r: dict) -> str:
    cells = [f"{r['name']:30s} {answers(r)}"]
    cells += [f"cos {r['cos']:.3f}"] if r["cos"] is not None else []
    if "budget" in r:
        b = r["budget"]
        positions = (
            f"positions {b['prefill_positions']:.1f} of {b['text_positions']:.1f} ({b['actual_seq_ratio']:.2f}x)"
        )
        cells.append(f"{positions}, {b['wire_bytes_fp16']:.0f} B, ids {b['token_id_bytes']:.0f} B")
    if best := r.get("rival"):
        cells.append(f"best free row {best['name']} {best['f1']:.3f}, gap {best['gap']:+.3f} ± {best['se']:.3f}")
    cells += [r["word"], r.get("against_control", ""), r.get("against_plan", "")]
    cells += ["LEGACY" if r.get("legacy") else "", r.get("collapse") or ""]
    return "  ".join(c for c in cells if c and c != "none")


def segment_verdict(rows: list[dict]) -> str:
    """Whether lm_segment beats the best training-free row at its positions and every documented mode that had as many
    positions or more, by two standard errors each."""
    done = [r for r in rows if r["f1"] is not None and not r.get("legacy")]
    ours = [r for r in done if r.get("pooling_mode") == "lm_segment" and "segment_only" not in r["name"]]
    theirs = [r for r in done if r.get("pooling_mode") not in (None, "lm_segment")]
    lines = []
    for r in ours:
        ratio = r["budget"]["actual_seq_ratio"]
        fair = [t for t in theirs if t["budget"]["actual_seq_ratio"] <= 1.05 * ratio]
        against = [(r["rival"]["name"], r["rival"]["gap"], r["rival"]["se"])] if r["rival"] else []
        against += [(t["name"], r["f1"] - t["f1"], math.hypot(r["f1_se"], t["f1_se"])) for t in fair]
        losses = [f"{name} ({gap:+.3f} ± {se:.3f})" for name, gap, se in against if gap <= 2 * se]
        won = "beats every training-free row at its positions and every documented mode with as many positions or "
        won += f"more ({len(fair)} runs) by more than 2 SE"
        lost = f"does NOT beat by more than 2 SE: {', '.join(losses)}"
        lines.append(f"{r['name']} at {ratio:.2f}x: {lost if losses else won}")
    return "\n".join(lines or ["no lm_segment run here"])


# ------------------------------------------------------------------------------------------------------ AFRB's sweep
LANE_COLUMNS = (
    "status task attention_disabled n_afrb enable_pvm seed steps test_loss test_ppl improvement needle_hit_rate "
    "needle_token_acc control_shuffled_token_acc control_memory_off_token_acc legacy_echo_token_acc retrieval_verdict"
).split()
SAME_TASK = "task model disable_attn seq data ctx_chunks ctx_chunk_len needle_len needle_marker needle_query".split()


def lanes(folders: list[str]) -> list[dict]:
    """Tabulate metrics.json of these folders, or of the folders in them; write summary.csv beside them. `improvement`:
    (base - new) / base of test_ppl against the bare model on the same task, data, model and attention."""
    files = [
        file for f in folders for file in [*Path(f).glob("metrics.json")] or sorted(Path(f).glob("*/metrics.json"))
    ]
    core.require(files, f"{' '.join(folders)}: no metrics.json in these folders")
    results = {file.parent: json.loads(file.read_text()) for file in files}

    def task_of(result):
        return tuple(result["config"].get(name) for name in SAME_TASK)

    bare = {task_of(r): r["test_ppl"] for r in results.values() if r["config"]["n_afrb"] == 0 and r.get("test_ppl")}
    rows = []
    for folder, result in results.items():
        row = {"run": folder.name} | {name: result.get(name, result["config"].get(name)) for name in LANE_COLUMNS}
        base = bare.get(task_of(result))
        if base and result.get("test_ppl") and result["config"]["n_afrb"]:
            row["improvement"] = (base - result["test_ppl"]) / base
        rows.append(row)
    summary = Path(os.path.commonpath([folder.parent for folder in results])) / "summary.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([rows[0], *(row.values() for row in rows)])
    core.write_atomic(summary, text.getvalue().encode())
    cells = [list(rows[0])]
    for row in rows:
        cells.append([f"{v:.4g}" if isinstance(v, float) else "-" if v is None else str(v) for v in row.values()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    print(f"summary: {summary}")
    return rows


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reporting = commands.add_parser("report", help="RESULTS.md and plots/")
    reporting.add_argument("--results", default="docs/results", help="folder of result files (docs/results)")
    reporting.add_argument("--out", default=".", help="where RESULTS.md and plots/ go (here)")
    tabling = commands.add_parser("table", help="means and deviations over a sweep's runs")
    tabling.add_argument("root")
    tabling.add_argument("metrics", nargs="+")
    judging = commands.add_parser("status", help="the document's table of a LatentWire sweep")
    judging.add_argument("kind", choices=STATUS_KINDS)
    judging.add_argument("root", help="folder of runs; for embed_sweep also a summary.json")
    plotting = commands.add_parser("plot", help="curves of the runs in and below a directory, into RUN/plots/")
    plotting.add_argument("root")
    comparing = commands.add_parser("hst", help="nats that HST's variants save over the plain transformer, by seed")
    comparing.add_argument("root")
    ablation = commands.add_parser("cognate", help="table of scripts/cognate_ablation.sh")
    ablation.add_argument("root")
    laning = commands.add_parser("lanes", help="a table of AFRB runs, and summary.csv beside them")
    laning.add_argument("folders", nargs="+")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv=None):
    args = parse(argv)
    if args.command == "plot":
        written = plot(Path(args.root))
        print("\n".join(f"plot: {path}" for path in written))
        return written
    if args.command == "table":
        return table(Path(args.root), args.metrics)
    if args.command == "hst":
        return hst_comparison(Path(args.root))
    if args.command == "cognate":
        return cognate(Path(args.root))
    if args.command == "status":
        return status(args.kind, Path(args.root))
    if args.command == "lanes":
        return lanes(args.folders)
    core.require(Path(args.results).is_dir(), f"{args.results}: no such folder of result files")
    rows = report(Path(args.results), Path(args.out))
    measured = [row for row in rows if row["measured"] != "no result file"]
    for row in measured:
        print(f"{row['verdict']:8s} {row['id']:30s} {row['measured']}")
    print(f"({len(rows) - len(measured)} further claims have no result file here)")
    print(f"report: {Path(args.out) / 'RESULTS.md'}")
    return rows


if __name__ == "__main__":
    core.cli(main)
