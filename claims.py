"""Every documented claim, its measurement, its controls and its verdict: RESULTS.md and plots/ from result files.

Report   python claims.py report                                       docs/results -> RESULTS.md, plots/
         python claims.py report --results runs/demo --out runs/demo   your own runs
Table    python claims.py table runs/cfhot_a final.cf_hot_loss final.baseline_loss
Curves   python claims.py plot runs/cfhot_a                            every run there -> RUN/plots/*.png
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
    plotting = commands.add_parser("plot", help="curves of the runs in and below a directory, into RUN/plots/")
    plotting.add_argument("root")
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
