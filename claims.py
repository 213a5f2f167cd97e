"""Every documented claim, its measurement, its controls and its verdict: RESULTS.md and plots/ from result files.

Report   python claims.py report                                       docs/results -> RESULTS.md, plots/
         python claims.py report --results runs/demo --out runs/demo   your own runs
Table    python claims.py table runs/cfhot_a final.cf_hot_loss final.baseline_loss

Only result files are read, never logs. A verdict follows from the interval over runs and the band that claims.yaml
gives: the end of the interval that is worst for the claim decides, so a claim holds only where all of it does.
"""
import argparse
import json
import math
import operator
import re
import sys
from pathlib import Path

import yaml

import core

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
                short = [system.split(",")[0], claim["headline"], figure(measured, 3), row["verdict"]]
                headlines.append("| " + " | ".join(short) + " |")
        lines += ["", "Commands:", ""]
        lines += [f"- {claim['id']}: `{claim['command']}`" for claim in claims if "command" in claim]
        lines.append("")
    for plot in book["plots"]:
        if draw(root, out / "plots" / plot["file"], plot):
            lines += [f"![{plot['title']}](plots/{plot['file']})", ""]
            print(f"plot: {out / 'plots' / plot['file']}")
    core.write_atomic(out / "RESULTS.md", "\n".join(lines).encode())
    readme = out / "README.md"
    if readme.exists():  # the rows marked as headlines stand in the README as well, between two marks
        parts = re.split(r"(<!-- claims -->\n).*?(?=<!-- end of claims -->)", readme.read_text(), flags=re.S)
        core.require(len(parts) == 3, f"{readme}: no <!-- claims --> ... <!-- end of claims -->")
        core.write_atomic(readme, "".join([parts[0], parts[1], *(f"{line}\n" for line in headlines), parts[2]]).encode())
    return rows


def draw(root: Path, path: Path, plot: dict) -> bool:
    """One line for each series: mean over its runs, band from the lowest to the highest. False without any data."""
    drawn = []
    for series in plot["series"]:
        curves = [value for r in read(root, series["results"]) if (value := _list(r, series["y"]))]
        if curves:
            shared = sorted(set.intersection(*({step for step, _ in c} for c in curves)))
            columns = [[dict(map(tuple, c))[step] for c in curves] for step in shared]
            drawn.append((f"{series['label']} (n = {len(curves)})", shared, columns))
    if not drawn:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure_, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, (label, steps, columns) in enumerate(drawn):  # dashes, so that curves that coincide are all seen
        style = ("-", "--", ":", "-.")[i % 4]
        (line,) = axes.plot(steps, [sum(c) / len(c) for c in columns], style, label=label, linewidth=1.8)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    if "floor" in plot:
        axes.axhline(float(plot["floor"]), color="black", linestyle="--", linewidth=1, label=plot["floor_label"])
    axes.set(title=plot["title"], xlabel=plot["x"], ylabel=plot["y"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=130)
    plt.close(figure_)
    return True


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


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reporting = commands.add_parser("report", help="RESULTS.md and plots/")
    reporting.add_argument("--results", default="docs/results", help="folder of result files (docs/results)")
    reporting.add_argument("--out", default=".", help="where RESULTS.md and plots/ go (here)")
    tabling = commands.add_parser("table", help="means and deviations over a sweep's runs")
    tabling.add_argument("root")
    tabling.add_argument("metrics", nargs="+")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv=None):
    args = parse(argv)
    if args.command == "table":
        return table(Path(args.root), args.metrics)
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
