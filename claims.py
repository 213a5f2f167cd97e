"""Every documented claim, its measurement, what a useless mechanism gives, and its verdict.

Report   python claims.py report                              docs/results -> RESULTS.md, plots/, docs/index.html
         python claims.py report --results runs/demo          your own runs -> runs/demo/RESULTS.md and so on
Repeat   python claims.py run cfhot-a-parameters              the row's command again, beside what is recorded
Check    python claims.py check                               that, for every row marked fast
Add      python claims.py new my-claim --document cfhot       a row template at the end of claims.yaml
Table    python claims.py table runs/cfhot_a final.cf_hot_loss final.baseline_loss
Status   python claims.py status compression runs/compression_suite     the document's words for a LatentWire sweep
Curves   python claims.py plot runs/cfhot_a                            every run there -> RUN/plots/*.png
Gains    python claims.py hst runs/hst                                 HST's variants against plain, by seed
Cognate  python claims.py cognate runs/cognate_ablation                table of its ablation, effects by factor
AFRB     python claims.py lanes out                                    a table of its runs, and out/summary.csv

A verdict follows from an interval and the band that claims.yaml gives, and from nothing else. A row that breaks a rule
(a band that a useless mechanism satisfies, runs of several kinds in one mean, a command that writes elsewhere) ends the
program with exit code 1 and the row's name. Verdicts read result files only, never logs; `plot` reads the logs of runs.
"""

import argparse
import csv
import fnmatch
import functools
import html
import io
import itertools
import json
import math
import operator
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

import yaml

import core

HOME = Path(__file__).resolve().parent
RECORD = HOME / "docs" / "results"
MARKS = "<!-- claims: begin -->", "<!-- claims: end -->"
OPERATORS = {"-": operator.sub, "/": operator.truediv, "*": operator.mul}
SUBJECTS = "published", "rebuilt"
WORDS = "holds", "fails", "undecided", "not testable here"
EVIDENCE = "arithmetic", "mechanism", "stand-in", "documented scale"
OVER = "runs", "items", "exact"
ROW = set(
    "id document line source claim documented unit band because published rebuilt nulls controls needs note".split()
)
ROW |= {"headline", "fast"}
FIGURE = set("label results metric over counted minus varies value evidence command".split())
PLACES = set("seed output_dir save_dir save checkpoint_dir out diagnostic_log device".split()) | core.Run.FREE


# ------------------------------------------------------------------------------------------------ the book of claims
def load(path: Path) -> dict:
    """The book at `path`: {documents, plots, claims}. Failure with the row's name where a row breaks a rule of form."""
    text = core.read_text(path)
    try:
        book = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise core.Failure(f"{path}: no YAML: {' '.join(str(error).split())[:200]}") from error
    parts = isinstance(book, dict) and isinstance(book.get("documents"), dict) and isinstance(book.get("claims"), list)
    core.require(parts, f"{path}: expected `documents` by name and a list of `claims`")
    names = Counter(row.get("id") if isinstance(row, dict) else None for row in book["claims"])
    for row in book["claims"]:
        core.require(isinstance(row, dict) and row.get("id"), f"{path}: a claim without an id", core.CHECK_FAILED)
        broken(row, "its id stands twice" if names[row["id"]] > 1 else faults_of_form(row, book["documents"]))
    for key, document in book["documents"].items():
        led = [row["id"] for row in book["claims"] if row["document"] == key and "headline" in row]
        core.require(len(led) == 1, f"document {key}: one row leads it, not {led or 'none'}", core.CHECK_FAILED)
        core.require(document.get("title"), f"document {key}: it has no title", core.CHECK_FAILED)
    return {"plots": [], **book}


def broken(row: dict, fault: str) -> None:
    """Failure (exit code 1) with the row's name, if there is a `fault`."""
    core.require(not fault, f"claim {row['id']}: {fault}", core.CHECK_FAILED)


def faults_of_form(row: dict, documents: dict) -> str:
    """What is wrong with a row before anything is measured; nothing if it is in order."""
    absent = [name for name in ("document", "claim", "documented", "band", "because") if row.get(name) is None]
    if absent:
        return f"{', '.join(absent)} missing"
    if unknown := sorted(set(row) - ROW):
        return f"unknown {', '.join(unknown)}"
    if isinstance(row.get("line"), int) == bool(row.get("source")):
        return "either the document's line, a number, or another source of its author"
    if row["document"] not in documents:
        return f"no document is called {row['document']}"
    band = row["band"]
    if not (isinstance(band, list) and len(band) == 2 and all(isinstance(x, int | float) for x in band)):
        return "its band is not two numbers"
    if not band[0] <= band[1] or band == [-math.inf, math.inf]:
        return "its band is empty, or leaves nothing out"
    if row.get("fast", True) not in (True, *SUBJECTS):
        return f"fast is {row['fast']}: use true, {' or '.join(SUBJECTS)}"
    judged = [row[subject] for subject in SUBJECTS if subject in row]
    if not judged and not row.get("needs"):
        return "neither published nor rebuilt is measured, and `needs` does not say what that would take"
    if any(f.get("evidence") == "stand-in" for f in judged) and not row.get("needs"):
        return "measured on a stand-in, and `needs` does not say what the documented scale would take"
    if not row.get("nulls"):
        return "no nulls: name what a useless mechanism gives on this scale"
    beside = [*row["nulls"], *row.get("controls", [])]
    if unnamed := [f for f in beside if not f.get("label")]:
        return f"a null or control without a label: {unnamed[0]}"
    return next((fault for f in judged + beside if (fault := fault_of_figure(f, f in judged))), "")


def fault_of_figure(figure: dict, judged: bool) -> str:
    if unknown := sorted(set(figure) - FIGURE):
        return f"unknown {', '.join(unknown)} in {figure}"
    if ("value" in figure) == ("results" in figure):
        return f"either results or value, in {figure}"
    if "results" in figure and "metric" not in figure:
        return f"results without a metric, in {figure}"
    if figure.get("over", "runs") not in OVER:
        return f"over {figure['over']}: use {', '.join(OVER)}"
    if not judged:
        return ""
    evidence = figure.get("evidence", "arithmetic" if "value" in figure else None)
    if evidence not in EVIDENCE:
        return f"evidence {evidence}: use {', '.join(EVIDENCE)}"
    if "results" in figure and not figure.get("command"):
        return "results without the command that writes them"
    if "value" in figure and evidence != "arithmetic":
        return "a typed value is arithmetic on the document's figures, no other evidence"
    if figure.get("over") == "exact" and evidence not in ("arithmetic", "mechanism"):
        return "a trained model's figure is no exact one: over runs or items"
    return ""


# ------------------------------------------------------------------------------------------------------- measurement
def read(root: Path, pattern: str) -> list[dict]:
    """The result files under `root` that match `pattern`, in order; each knows its `file` and the `run` directory."""
    files = sorted(root.glob(pattern))
    return [json.loads(p.read_text()) | {"run": p.parent.name, "file": str(p.relative_to(root))} for p in files]


def lookup(result: dict, path: str):
    """What stands at `a.b.c` in a result; None if it is absent."""
    for name in path.split("."):
        result = result.get(name) if isinstance(result, dict) else None
    return result


def value(result: dict, expression: str) -> float | None:
    """`a.b` of a result, or `a.b / c.d`, `a.b - 1.5`: names joined by dots, numbers, one operator. None if absent."""
    words, operands = expression.split(), []
    for word in words[::2]:
        try:
            operands.append(float(word))
        except ValueError:
            operands.append(lookup(result, word))
    if any(x is None for x in operands):
        return None
    return float(OPERATORS[words[1]](*operands)) if len(words) == 3 else float(operands[0])


def flags_of(result: dict) -> dict:
    """The flags a run was started with: of its manifest, or of the older result files' `config`."""
    return result["manifest"]["flags"] if "manifest" in result else result.get("config", {})


def identity(result: dict, varies: str = "") -> dict:
    """What must be alike in runs that are averaged: flags, inputs and code, up to the seed and the places written to.
    `varies`: further flags or inputs that follow the seed, separated by spaces."""
    free = PLACES | set(varies.split())
    alike = {f"--{k}": v for k, v in flags_of(result).items() if k not in free}
    if manifest := result.get("manifest"):
        alike |= {k: v for k, v in manifest["inputs"].items() if k not in free}
        return alike | {"code": sorted({json.dumps(s["code"], sort_keys=True) for s in manifest["segments"]})}
    return alike | {"commit": result.get("environment", {}).get("commit")}


def mixed(results: list[dict], varies: str) -> str:
    """What differs between runs that are to be averaged; nothing if they are of one kind."""
    kinds = [identity(r, varies) for r in results]
    differ = sorted({k for kind in kinds for k in {*kind, *kinds[0]} if kind.get(k) != kinds[0].get(k)})
    seeds = [r.get("seed") for r in results]
    twice = "the same seed twice" if len(set(seeds)) < len(seeds) and None not in seeds else ""
    return ", ".join([f"different {k}" for k in differ] or [twice])


def measure(root: Path, figure: dict) -> dict | None:
    """{mean, lo, hi, n, over, results, mixed} of a figure under `root`; None without a result file.

    `over` runs: Student-t over seeds; items: the interval that the one run gives for its scored items; exact: a figure
    without chance, from the lowest to the highest file. `minus`: another set of runs, taken off seed by seed.
    """
    if "value" in figure:  # arithmetic on the document's own figures, from the book
        x = float(eval(str(figure["value"]), {"__builtins__": {}, "math": math, "abs": abs}))
        return {"mean": x, "lo": x, "hi": x, "n": 0, "over": "exact", "results": [], "mixed": ""}
    results, over = read(root, figure["results"]), figure.get("over", "runs")
    why = mixed(results, figure.get("varies", "")) if over == "runs" and results else ""
    if over == "items":
        several = f"{len(results)} files, and items are those of one" if len(results) > 1 else ""
        interval = lookup(results[0], figure["metric"]) if results else None
        if not isinstance(interval, dict):
            return None
        ends = {name: float(interval[name]) for name in ("mean", "lo", "hi")}
        return ends | {
            "n": interval.get("n"),
            "counted": figure.get("counted", "items"),
            "over": over,
            "results": results,
            "mixed": several,
        }
    if "minus" in figure:
        others = read(root, figure["minus"])
        why = why or mixed(others, figure.get("varies", "")) if others else why
        theirs = {r["seed"]: value(r, figure["metric"]) for r in others}
        results = [r for r in results if r["seed"] in theirs]
        found = [(value(r, figure["metric"]), theirs[r["seed"]]) for r in results]
        found = [a - b for a, b in found if a is not None and b is not None]
        results = results + others
    else:
        found = [x for x in (value(r, figure["metric"]) for r in results) if x is not None]
    if not found:
        return None
    more = {"over": over, "results": results, "mixed": why}
    if over == "exact":
        return {"mean": found[0], "lo": min(found), "hi": max(found), "n": len(found)} | more
    return core.mean_interval(found) | more


# ----------------------------------------------------------------------------------------------------------- verdict
def verdict(measured: dict | None, band: list) -> tuple[str, str]:
    """(word, reason): holds where the whole interval lies in the band, fails where all of it lies outside, undecided
    where it overlaps an edge or rests on fewer than three seeds, not testable here without a measurement."""
    if measured is None:
        return "not testable here", ""
    if measured["mixed"]:
        return "undecided", f"the runs are not of one kind: {measured['mixed']}"
    if measured["over"] == "runs" and measured["n"] < 3:
        return "undecided", f"{measured['n']} of 3 seeds"
    if band[0] <= measured["lo"] and measured["hi"] <= band[1]:
        return "holds", ""
    if measured["hi"] < band[0] or measured["lo"] > band[1]:
        return "fails", ""
    return "undecided", "its interval overlaps an edge of the band"


def judge(row: dict, root: Path, strict: bool) -> dict:
    """The row with its measurements and verdicts. `strict`, for the record under docs/results: Failure with the row's
    name where a null lies in the band, runs of several kinds are averaged, or a measured row has no measured null."""
    beside = {
        kind: [{"label": f["label"], "measured": measure(root, f), "figure": f} for f in row.get(kind, [])]
        for kind in ("nulls", "controls")
    }
    nulls = [n for n in beside["nulls"] if n["measured"]]
    useless = [n for n in nulls if row["band"][0] <= n["measured"]["mean"] <= row["band"][1]]
    judged, subjects = dict(row) | beside, {}
    for subject in SUBJECTS:
        figure = row.get(subject)
        measured = measure(root, figure) if figure else None
        if figure and strict:
            broken(row, f"no result file matches {figure['results']}" if measured is None else "")
            broken(row, f"{figure.get('results')}: {measured['mixed']}" if measured["mixed"] else "")
        word, reason = verdict(measured, row["band"])
        if word == "holds" and not nulls:
            word, reason = "undecided", "what a useless mechanism gives is not measured"
        if word == "holds" and useless:
            word, reason = "undecided", f"a useless mechanism passes too: {useless[0]['label']}"
        evidence = figure.get("evidence", "arithmetic") if figure else None
        small = " (small scale)" if evidence == "stand-in" and word != "not testable here" else ""
        subjects[subject] = {
            "measured": measured,
            "evidence": evidence,
            "word": word,
            "reason": reason,
            "figure": figure,
        }
        subjects[subject]["verdict"] = word + small
    if strict:
        broken(row, faults_of_commands(row, root))
        for f in beside["nulls"] + beside["controls"]:
            broken(row, f"{f['label']}: {f['measured']['mixed']}" if f["measured"] and f["measured"]["mixed"] else "")
        named = ", ".join(f"{n['label']} at {short(n['measured']['mean'])}" for n in useless)
        broken(row, f"its band {row['band']} is satisfied by a null: {named}" if useless else "")
        measured = any(subjects[s]["measured"] for s in SUBJECTS)
        broken(row, "none of its nulls has a figure" if measured and not nulls else "")
    return judged | subjects


def short(x: float, digits: int = 4) -> str:
    if not math.isfinite(x):
        return "no limit"
    return f"{x:,.0f}" if x == int(x) and abs(x) >= 1000 else f"{x:.{digits}g}"


def interval(measured: dict | None, unit: str = "", digits: int = 4) -> str:
    """`mean [lo, hi] unit (n seeds)` with so many significant digits: the one form of a measured figure."""
    if measured is None:
        return "not measured"
    shown = short(measured["mean"], digits)
    if measured["lo"] != measured["hi"]:
        shown += f" [{short(measured['lo'], digits)}, {short(measured['hi'], digits)}]"
    shown += f" {unit}" if unit else ""
    if measured["over"] == "exact":
        return shown
    counted = measured.get("counted") or ("seeds" if measured["n"] > 1 else "seed")
    return f"{shown} ({measured['n']} {counted})"


# ------------------------------------------------------------------------------------------------------------ report
def cell(row: dict, subject: str) -> str:
    """What the report shows of one subject: figure, evidence, verdict, and why it is no clearer."""
    judged = row[subject]
    if judged["figure"] is None:
        return f"**not testable here**: needs {row['needs']}" if subject == "rebuilt" and row.get("needs") else "–"
    reason = f": {judged['reason']}" if judged["reason"] else ""
    evidence = f", {judged['evidence']}" if judged["evidence"] != "stand-in" else ""  # its verdict says small scale
    return f"{interval(judged['measured'], row.get('unit', ''))}{evidence}<br>**{judged['verdict']}**{reason}"


def place(row: dict) -> str:
    """Where the claim is made."""
    return row.get("source") or f"line {row['line']}"


def table_of(rows: list[dict]) -> str:
    """The claims of one document as a Markdown table."""
    lines = [
        "| claim | documented | as published | rebuilt | nulls (useless mechanisms) and controls |",
        "| --- " * 5 + "|",
    ]
    for row in rows:
        said = f"{row['claim']} ({place(row)})"
        cells = [cell(row, subject) for subject in SUBJECTS]
        beside = [f"*{n['label']}*: {interval(n['measured'])}" for n in row["nulls"]]
        beside += [f"{c['label']}: {interval(c['measured'])}" for c in row["controls"]]
        beside += [row["note"]] if row.get("note") else []
        lines.append("| " + " | ".join([said, str(row["documented"]), *cells, "<br>".join(beside)]) + " |")
    return "\n".join(lines)


def headlines_of(documents: dict, rows: list[dict]) -> str:
    """For each document the claim that leads it, and how all its claims stand."""
    lines = ["| document | its claim | documented | as published | rebuilt | all its claims |", "| --- " * 6 + "|"]
    plural = {"holds": "hold", "fails": "fail"}
    for row in (row for row in rows if "headline" in row):
        document = documents[row["document"]]
        cells = [cell(row, subject) for subject in SUBJECTS]
        if row["rebuilt"]["figure"] is None and row.get("needs"):
            cells[1] = "**not testable here**"  # the document's page says what it takes
        title = f"[{document['title']}]({document['page']})" if "page" in document else document["title"]
        counts = Counter(x for r in rows if r["document"] == row["document"] for x in words_of(r))
        standing = ", ".join(f"{counts[word]} {plural.get(word, word)}" for word in WORDS if counts[word])
        lines.append("| " + " | ".join([title, row["headline"], str(row["documented"]), *cells, standing]) + " |")
    return "\n".join(lines)


def words_of(row: dict) -> list[str]:
    """The verdicts of a row on what it judges; one that judges nothing is not testable here."""
    return [row[subject]["word"] for subject in SUBJECTS if row[subject]["figure"]] or ["not testable here"]


PREAMBLE = """# Results

Made by `python claims.py report` from the result files; nothing here is typed by hand. Two columns judge two things:
the document's own code and arithmetic (*as published*), and the same mechanism made causal and scored correctly
(*rebuilt*). A claim **holds** where the whole 95 % interval lies in the band that `claims.yaml` gives, **fails** where
all of it lies outside, and is **undecided** where it overlaps an edge or rests on fewer than three seeds. "Small scale"
is a verdict on a small model or other data than the document's. In italics what a mechanism that does nothing gives on
the same scale."""


def report(book: dict, root: Path, out: Path) -> list[dict]:
    """Judge every claim on the results under `root`; write RESULTS.md, plots/ and index.html under `out`, and, in the
    project itself, the tables of README.md and of the documents' pages and the figures in their text."""
    strict = root.resolve() == RECORD.resolve()
    at_home = out.resolve() == HOME
    core.require(
        strict or not at_home, f"--results {root}: the project's own pages show docs/results; name another --out"
    )
    rows = [judge(row, root, strict) for row in book["claims"]]
    parts = [PREAMBLE, ""]
    for key, document in book["documents"].items():
        mine = [row for row in rows if row["document"] == key]
        commands = {f["command"]: None for row in mine for s in SUBJECTS if (f := row[s]["figure"]) and "command" in f}
        parts += [f"## {document['title']}", "", table_of(mine), "", "Commands:", ""]
        parts += [f"- `{command}`" for command in commands] + [""]
    for plot in book["plots"]:
        if draw(root, out / "plots" / plot["file"], plot):
            parts += [f"![{plot['title']}](plots/{plot['file']})", ""]
    core.write_atomic(out / "RESULTS.md", "\n".join(parts).encode())
    where = out / ("docs/index.html" if at_home else "index.html")
    results, home = (Path(os.path.relpath(place, where.parent)).as_posix() for place in (root, HOME))
    core.write_atomic(where, page(book, rows, results, home).encode())
    if at_home:
        for name in ("README.md", *{d["page"]: None for d in book["documents"].values() if "page" in d}):
            mine = [row for row in rows if book["documents"][row["document"]].get("page") == name]
            refresh(out / name, root, table_of(mine) if mine else headlines_of(book["documents"], rows))
    return rows


def replace_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Put `text` between the two marks of the page; Failure if they are not in it."""
    old = page.read_text()
    core.require(all(mark in old for mark in marks), f"{page}: {' and '.join(marks)} are not in it")
    before, rest = old.split(marks[0])
    core.write_atomic(page, f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.split(marks[1])[1]}".encode())


def refresh(page: Path, root: Path, claims: str) -> None:
    """Renew what a page shows of the results: the table between the two marks, and every figure in its text, written as
    `<!--= pattern | metric -->figure<!--/-->`. Failure where the marks or a result are missing."""

    def renewed(match: re.Match) -> str:
        pattern, metric, *over = (word.strip() for word in match[1].split("|"))
        measured = measure(root, {"results": pattern, "metric": metric, "over": over[0] if over else "runs"})
        core.require(measured, f"{page}: no result for {match[1].strip()}", core.CHECK_FAILED)
        return f"<!--={match[1]}-->{interval(measured, digits=3)}<!--/-->"

    replace_between(page, MARKS, claims)
    core.write_atomic(page, re.sub(r"<!--=(.*?)-->.*?<!--/-->", renewed, page.read_text()).encode())


# ------------------------------------------------------------------------------- running a claim, and adding one
OUTPUTS = "output_dir save_dir save checkpoint_dir out".split()  # flags that name where a command writes


@functools.cache
def written_by(command: str) -> list[str]:
    """Directories (and files) that a command line writes, relative to the project: a sweep's as its DRY=1 says. A
    variable of the shell in a name counts as any text."""
    lines, places = [command], []
    if ".sh" in command:
        dry = os.environ | {"DRY": "1", "PYTHON": "python"}
        done = subprocess.run(["bash", "-c", command], cwd=HOME, env=dry, capture_output=True, text=True)
        core.require(done.returncode == 0, f"DRY=1 {command}: {done.stderr.strip()[-200:]}", core.CHECK_FAILED)
        lines = done.stdout.splitlines()
    for line in lines:
        tokens = shlex.shlex(line, posix=True, punctuation_chars=True)  # `;` and `&&` end a word
        tokens.whitespace_split, tokens.commenters = True, ""
        words = [word for token in tokens for word in token.split("=", 1)]
        for flag, place in itertools.pairwise(words):
            if flag.startswith("--") and flag[2:].replace("-", "_") in OUTPUTS:
                places.append(os.path.normpath(re.sub(r"\$\{?\w+\}?", "*", place)))
    return places


def faults_of_commands(row: dict, root: Path) -> str:
    """Whether the row's commands write every recorded file that the row reads, under runs/ in place of `root`."""
    judged = [row[subject] for subject in SUBJECTS if subject in row]
    common = [f["command"] for f in judged if "command" in f]
    for figure in [*judged, *row["nulls"], *row.get("controls", [])]:
        own = [figure["command"]] if "command" in figure else common
        places = [place for command in own for place in written_by(command)]
        for pattern in (p for p in (figure.get("results"), figure.get("minus")) if p):
            for path in sorted(root.glob(pattern)):
                there = Path("runs") / path.relative_to(root)
                names = [str(name) for name in (there, *there.parents[:-1])]
                if not any(fnmatch.fnmatch(name, place) for name in names for place in places):
                    return f"{there} is not written by {' or '.join(own) or 'any command of the row'}"
    return ""


def rerun(commands: list[str], folder: Path) -> list[str]:
    """Run the commands in the fresh `folder`, which sees the project but none of its runs; those that failed."""
    core.require(not folder.exists(), f"{folder} exists: name a fresh --out")
    folder.mkdir(parents=True)
    for path in HOME.iterdir():
        if path.name not in ("runs", "out", "results", ".git"):
            (folder / path.name).symlink_to(path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # `python` is this one
    done = [subprocess.run(["bash", "-c", c], cwd=folder, env=os.environ | {"PATH": path}) for c in commands]
    return [f"exit code {d.returncode} of {c}" for c, d in zip(commands, done) if d.returncode]


def run_rows(rows: list[dict], out: Path, fast: bool = False) -> list[str]:
    """Run the commands of these rows, their nulls' too, in the fresh directory `out` and print recorded and new figures
    side by side; returns what went wrong: a command that failed, a file that it did not write, another verdict. With
    `fast` only what the row marks so: all of it (`fast: true`), or one of its subjects (`fast: rebuilt`)."""

    def subjects(row: dict) -> list[str]:
        return [s for s in SUBJECTS if row.get(s) and (not fast or row["fast"] in (True, s))]

    judged = [figure for row in rows for figure in [*(row[s] for s in subjects(row)), *row["nulls"]]]
    commands = {figure["command"]: None for figure in judged if "command" in figure}
    recorded = [judge(row, RECORD, strict=True) for row in rows]
    faults = rerun(list(commands), out)
    for row, old in zip(rows, recorded):
        new = judge(row, out / "runs", strict=False)
        for subject in subjects(row):
            shown = [
                f"{interval(x[subject]['measured'], old.get('unit', ''))}  {x[subject]['verdict']}" for x in (old, new)
            ]
            print(f"{old['id']} ({subject})\n  recorded  {shown[0]}\n  now       {shown[1]}")
            if new[subject]["measured"] is None:
                faults.append(f"{old['id']}: no {old[subject]['figure']['results']} was written")
            elif old[subject]["word"] != new[subject]["word"]:
                faults.append(f"{old['id']}: {new[subject]['verdict']} now, {old[subject]['verdict']} in the record")
    return faults


TEMPLATE = """
- id: {id}
  document: {document}
  line: 1                       # of the document, where it says so
  claim: one sentence in your own words, with the size of the effect
  documented: the document's own figure
  unit: ""                      # of the metric, such as nats or %
  band: [0.01, .inf]            # the claim holds where the whole 95 % interval lies in it: written before the runs
  because: one line of reason for the band
  rebuilt:                      # what is judged; `published:` in the same form for the document's own code
    results: my_runs/on_s*/phase_a_results.json   # result files under docs/results (under runs/ when they are made)
    metric: final.cf_hot_loss   # a path in them, or two joined by - / *
    evidence: stand-in          # arithmetic, mechanism, stand-in, documented scale
    command: the command that writes these files under runs/
  nulls:                        # what a mechanism that does nothing gives on the same scale; none may lie in the band
  - {{label: switched off, results: my_runs/off_s*/phase_a_results.json, metric: final.cf_hot_loss}}
  controls: []
  needs: what the documented scale would take
"""


def new(path: Path, name: str, document: str) -> None:
    """Append a row template to the book, or begin a book with it."""
    core.require(re.fullmatch(r"[a-z0-9-]+", name), f"{name}: use lower-case letters, digits and dashes")
    old = path.read_text() if path.exists() else f"documents:\n  {document}: {{title: {document}}}\nclaims:\n"
    book = yaml.safe_load(old)
    core.require(
        name not in [row["id"] for row in book["claims"] or ()], f"{path} has a claim {name}: choose another id"
    )
    core.require(document in book["documents"], f"{path} has no document {document}: add it under `documents` first")
    led = any(row.get("document") == document and "headline" in row for row in book["claims"] or ())
    text = TEMPLATE.format(id=name, document=document)
    core.write_atomic(
        path, f"{old.rstrip()}\n{text}".encode() + (b"" if led else b"  headline: the row that leads its document\n")
    )


# -------------------------------------------------------------------------------------------------- one page for all
def page(book: dict, rows: list[dict], results: str = "results", home: str = "..") -> str:
    """docs/index.html: every claim with its figures, nulls, controls and commands, in one file that asks for no other.
    `results`, `home`: the way from the page to the result files and to the project, for its links."""
    import jinja2

    shown = []
    for row in rows:
        figures = figures_of(row, results)
        commands = dict.fromkeys(f["command"] for x in figures if "command" in (f := x["figure"] or {}))
        shown.append(row | {"figures": figures, "plot": forest(row, figures), "commands": list(commands)})
    source = (HOME / "docs" / "index.html.j2").read_text()
    template = jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.render(documents=book["documents"], rows=shown, home=home, evidence=EVIDENCE, short=short) + "\n"


def figures_of(row: dict, results: str) -> list[dict]:
    """Each figure of a row as the page shows it. `drawn`: it is on the scale of what is judged, as every null is."""
    found = [row[subject] | {"role": subject, "label": ""} for subject in SUBJECTS]
    found += [x | {"role": kind[:-1]} for kind in ("nulls", "controls") for x in row[kind]]
    judged = [f for s in SUBJECTS if (f := row[s]["figure"]) and "metric" in f]
    for x in found:
        figure, measured = x["figure"] or {}, x["measured"] or {"results": []}
        like = any(figure.get("metric") == f["metric"] and ("minus" in figure) == ("minus" in f) for f in judged)
        x["drawn"] = bool(x["measured"]) and (x["role"] != "control" or like)
        x["text"] = interval(x["measured"], row.get("unit", "") if x["drawn"] else "")
        x["files"] = []
        for pattern in [figure[name] for name in ("results", "minus") if name in figure]:
            head, *tail = pattern.split("*")
            named = re.compile("([^/]*)".join(map(re.escape, (head, *tail))))
            matches = filter(None, map(named.fullmatch, sorted({r["file"] for r in measured["results"]})))
            links = [(",".join(m.groups()) or m[0], f"{results}/{m[0]}") for m in matches]
            x["files"].append({"head": head, "tail": "*".join(tail), "links": links, "several": bool(tail)})
    return found


def axis(shown: list[dict], band: list) -> tuple[str, float, float, float]:
    """(scale, low, high, floor) of an axis for the figures `shown` and the edges of the band near to them: logarithmic
    where it spans more than a factor of 1000, then linear below `floor` if it takes in zero."""
    edges = [edge for edge in band if math.isfinite(edge)]
    judged = [x["measured"]["mean"] for x in shown if x["role"] in SUBJECTS]
    near = [min(edges, key=lambda edge: abs(edge - mean)) for mean in judged]  # a far one would squeeze the figures
    points = [x["measured"][end] for x in shown for end in ("mean", "lo", "hi")] + near
    low, high = (f(x for x in points if math.isfinite(x)) for f in (min, max))
    apart = [m["mean"] for x in shown if not (m := x["measured"])["lo"] <= 0 <= m["hi"]]  # from zero
    sizes = [abs(x) for x in apart + near if x]
    if sizes and max(sizes) > 1000 * min(sizes):
        floor = max(min(sizes), max(sizes) * 1e-8)
        if low > 0:
            return "log", low / 2, 2 * high, floor
        return "symlog", 2 * min(low, -floor / 4), 2 * max(high, floor / 4), floor
    points = [low, high] + [edge for edge in edges if 3 * low - 2 * high <= edge <= 3 * high - 2 * low]
    pad = 0.06 * (max(points) - min(points)) or abs(high) / 20 or 1
    return "linear", min(points) - pad, max(points) + pad, 0.0


def forest(row: dict, figures: list[dict]) -> str:
    """The row's figures, nulls and like controls on one axis, its band shaded, as inline SVG whose colours and sizes
    are the page's (a class for each kind of mark); nothing where nothing is judged."""
    shown = [x for x in figures if x["drawn"]]
    if not any(x["role"] in SUBJECTS for x in shown):
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    words = [x["role"].replace("published", "as published") + f": {x['label']}" * bool(x["label"]) for x in shown]
    labels = [textwrap.wrap(line, 54) for line in words]
    *tops, bottom = itertools.accumulate((13 * len(lines) + 13 for lines in labels), initial=2)
    scale, low, high, floor = axis(shown, row["band"])
    height, (left, right) = bottom + 30, (min(max(edge, low), high) for edge in row["band"])
    axes = Figure(figsize=(5, height / 72), dpi=72).add_axes((0.04, 0, 0.92, 1))  # 360 points: a telephone's width
    axes.set_axis_off()
    axes.set_xscale(scale, **{"linthresh": floor} if scale == "symlog" else {})
    axes.set(xlim=(low, high), ylim=(height, 0))
    axes.axvspan(left, right, (height - bottom) / height, 1, gid="band")
    axes.vlines([x for x in sorted({left, right}) if low < x < high], 0, bottom, gid="edge")
    ticks, places = [], []
    for x in sorted(axes.get_xticks(), key=lambda x: (x != 0, -abs(x))):
        place = axes.transData.transform((x, 0))[0]
        if low <= x <= high and all(abs(place - other) > 50 for other in places):
            ticks, places = ticks + [x], places + [place]
            axes.text(x, bottom + 13, f"{x:,.10g}" if 1e-3 <= abs(x) < 1e6 or not x else f"{x:.6g}", gid="axis")
    axes.vlines(sorted(ticks), 0, bottom + 3, gid="tick")
    unit = " ".join(filter(None, [row.get("unit"), "(logarithmic axis)" * (scale != "linear")]))
    axes.text(0.5, bottom + 26, unit, gid="axis", transform=axes.get_yaxis_transform(), parse_math=False)
    for x, top, lines in zip(shown, tops, labels):
        kind, y = x["role"] if x["role"] not in SUBJECTS else "judged", top + 13 * len(lines) + 6
        for i, line in enumerate(lines, 1):
            axes.text(0, top + 13 * i - 3, line, gid=kind, transform=axes.get_yaxis_transform(), parse_math=False)
        ends = [min(max(x["measured"][end], low), high) for end in ("lo", "hi", "mean")]
        axes.hlines(y, *ends[:2], gid=f"{kind}-line")
        axes.hlines(y, ends[2], ends[2], gid=f"{kind}-dot")  # the page's round or square caps make it a mark
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "claims"}), io.StringIO() as file:
        axes.figure.savefig(file, format="svg", metadata={"Date": None})
        groups = re.findall(r'<g id="([a-z-]+)">\s*(.*?)\s*</g>', file.getvalue(), re.DOTALL)
    title = f"<title>{html.escape(row['id'])}: figures, nulls and band</title>"
    drawn = [f'<svg viewBox="0 0 360 {height}" role="img">{title}']
    for kind, inside in groups:
        if text := re.search(r' x="([^"]*)" y="([^"]*)"[^>]*>(.*)</text>', inside, re.DOTALL):
            x, y = (f"{float(n):.4g}" for n in text.groups()[:2])
            drawn.append(f'<text class="{kind}" x="{x}" y="{y}">{text[3]}</text>')
        else:
            path = " ".join(" ".join(re.findall(r' d="([^"]*)"', inside)).split())
            path = re.sub(r"\d+\.\d+", lambda n: f"{float(n[0]):.4g}", path)
            drawn.append(f'<path class="{kind}" d="{path}"/>')
    return "".join(drawn) + "</svg>"


# --------------------------------------------------------------------------------------------------------- figures
def draw(root: Path, path: Path, plot: dict) -> bool:
    """One line for each series with a curve `y`: mean over its runs, band from the lowest to the highest; of one
    run, with `trials` (a path to their number), the Wilson band of its shares. Series with a `metric` are points with
    their 95 % interval. False without any data."""
    drawn = {}
    for series in plot["series"]:
        if "metric" in series:
            if measured := measure(root, series):
                drawn[f"{series['label']} (n = {measured['n']})"] = measured
            continue
        results = [r for r in read(root, series["results"]) if lookup(r, series["y"])]
        curves = [lookup(r, series["y"]) for r in results]
        if curves and "trials" in series:
            n = lookup(results[0], series["trials"])
            bands = [(x, core.wilson(round(share * n), n)) for x, share in curves[0]]
            curves = [curves[0], *([[x, b[end]] for x, b in bands] for end in ("lo", "hi"))]
            drawn[f"{series['label']} ({n} trials)"] = curves
        elif curves:
            drawn[f"{series['label']} (n = {len(curves)})"] = curves
    if drawn:
        picture(path, plot, drawn)
    return bool(drawn)


def picture(path: Path, plot: dict, drawn: dict[str, list]) -> None:
    """Write `path`. `drawn`: label -> curves, each [[x, y], ...], of which the first (with `trials`) or the mean over
    those x that all have, and the band from lowest to highest, are shown; or label -> {mean, lo, hi}, shown as a point
    with its interval."""
    try:
        import matplotlib
    except ImportError as error:
        raise core.Failure("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {label: value for label, value in drawn.items() if isinstance(value, dict)}
    legends = 0 if points else math.ceil(len(drawn) / 2)  # rows of the legend below the axes
    figure_, axes = plt.subplots(figsize=(7, max(4.2, 0.34 * len(points)) + 0.22 * legends), layout="constrained")
    for i, (label, curves) in enumerate((k, v) for k, v in drawn.items() if k not in points):
        steps = sorted(set.intersection(*({step for step, _ in c} for c in curves)))
        columns = [[dict(map(tuple, c))[step] for c in curves] for step in steps]
        style = ("-", "--", ":", "-.")[i % 4]  # dashes, so that curves that coincide are all seen
        mark = "o" if len(steps) < 15 else None  # a curve of one point is seen too
        means = [c[0] if label.endswith("trials)") else sum(c) / len(c) for c in columns]
        (line,) = axes.plot(steps, means, style, label=label, linewidth=1.8, marker=mark, markersize=4)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    if points:
        means = [b["mean"] for b in points.values()]
        ends = [[max(0.0, s * (b[end] - b["mean"])) for b in points.values()] for end, s in (("lo", -1), ("hi", 1))]
        axes.errorbar(means, list(points), xerr=ends, fmt="o", color="tab:blue", ecolor="black", capsize=3)
        axes.invert_yaxis()
    if "floor" in plot:
        axes.axhline(float(plot["floor"]), color="black", linestyle="--", linewidth=1, label=plot["floor_label"])
    if "mark" in plot:
        axes.axvline(float(plot["mark"]), color="black", linestyle=":", linewidth=1, label=plot["mark_label"])
    figure_.suptitle(textwrap.fill(plot["title"], 66), fontsize="large")
    axes.set(xlabel=plot["x"], ylabel=plot["y"], **plot.get("axes", {}))
    if not points and axes.get_xscale() == "linear" and "xticks" not in plot.get("axes", {}):
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if legends:  # below the axes: never over the curves
        figure_.legend(frameon=False, loc="outside lower center", ncols=2)
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
    print("\n".join(f"plot: {path}" for path in written))
    return written


# ---------------------------------------------------------------------------------------------- tables of a sweep
def table(root: Path, metrics: list[str]) -> int:
    """Print mean, sd and n of each metric over a sweep's runs; runs that differ in `_s<seed>` alone share a row."""
    files = sorted({*root.glob("*/*results.json"), *root.glob("*/reasoning/*results.json")})
    core.require(files, f"{root}: no */*results.json")
    groups: dict[str, list] = {}
    for path in files:
        name = re.sub(r"_s\d+$", "", path.relative_to(root).parts[0])
        groups.setdefault(name, []).append(json.loads(path.read_text()))
    print(f"{'run':24s}" + "".join(f"{m.split('.')[-1]:>26s}" for m in metrics))
    for name, results in groups.items():
        cells = []
        for metric in metrics:
            found = [x for x in (value(r, metric) for r in results) if x is not None]
            sd = core.np.std(found, ddof=1) if len(found) > 1 else 0.0
            cells.append(f"{core.np.mean(found):.4f} ± {sd:.4f} (n={len(found)})" if found else "-")
        print(f"{name:24s}" + "".join(f"{c:>26s}" for c in cells))
    return len(files)


def found_in(result, key: str) -> float | None:
    """The first number under `key` in a nested result: where it has one for each arm, that of the mechanism's."""
    if not isinstance(result, dict):
        return None
    if isinstance(result.get(key), dict):
        return next(iter(result[key].values()))
    inner = (found_in(x, key) for name, x in result.items() if name not in ("config", "manifest"))
    return result[key] if key in result else next((x for x in inner if x is not None), None)


def gpu(root: Path) -> list[list]:
    """The table that scripts/gpu.sh ends in: of each run its speed, memory, time and what it decides; below it
    those of a step of each model, with its utilisation."""
    names = ("*results.json", "reasoning/*results.json", "metrics.json", "summary.json")
    rows = [["run", "tokens/s", "utilisation", "peak GB", "seconds", "decides"]]

    def shown(x, scale=1.0, digits=0):
        return "-" if x is None else f"{x / scale:,.{digits}f}"

    for path in sorted(path for name in names for path in root.glob(f"*/{name}")):
        result, folder = json.loads(path.read_text()), root / path.relative_to(root).parts[0]
        speed = found_in(result, "tokens_per_s")
        cells = [shown(speed if speed is not None else found_in(result, "tokens_per_sec")), "-"]
        cells += [shown(found_in(result, "peak_mem_bytes"), 1e9, 2), shown(found_in(result, "train_seconds"))]
        decides = folder / "decides.txt"
        rows.append([folder.name, *cells, decides.read_text().strip() if decides.exists() else "-"])
    for file in sorted(root.glob("bench_*.json")):
        for group, contestants in json.loads(file.read_text()).items():
            for name, row in contestants.items() if isinstance(contestants, dict) else ():
                if isinstance(row, dict) and "s_per_step" in row:
                    used = row.get("utilisation")
                    cells = [shown(row.get("tokens_per_s")), "-" if used is None else f"{used:.0%}"]
                    cells += [shown(row.get("peak_bytes"), 1e9, 2), shown(row["s_per_step"], 1, 3), "a step"]
                    rows.append([f"bench {group} {name}", *cells])
    core.require(len(rows) > 1, f"{root}: no finished run")
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:5], widths[1:])), row[5]]))
    return rows


# ----------------------------------------------------------------------------------------- HST: variants against plain
HST_EQUAL = (  # flags in which a variant and its control may not differ
    "data dataset tokenizer vocab_size d_model n_layers max_seq_len eval_rows batch_size grad_accum max_steps "
    "max_seconds lr warmup weight_decay precision"
).split()


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
    grade(kind, rows)
    for r in rows:
        print(status_line(r) if r["f1"] is not None else f"{r['name']:30s} FAILED ({r['failed']})")
    if kind == "compression":
        print(curve_table(rows))
    return rows


def grade(kind: str, rows: list[dict]) -> None:
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
        gap = best["gap"]["mean"] if isinstance(best["gap"], dict) else best["gap"]  # as older runs wrote it
        cells.append(f"best free row {best['name']} {best['f1']:.3f}, gap {gap:+.3f}")
    cells += [r["word"], r.get("against_control", ""), r.get("against_plan", "")]
    cells += ["LEGACY" if r.get("legacy") else "", r.get("collapse") or ""]
    return "  ".join(c for c in cells if c and c != "none")


def curve_table(rows: list[dict]) -> str:
    """What each run with a curve keeps of the text's F1 at each ratio, beside the best text of as many positions and
    the code of another context."""
    lines = [
        f"{'run':34s}{'ratio':>6s}{'positions':>11s}{'bytes':>8s}{'F1':>7s}{'text':>7s}  best text of as many, swapped"
    ]
    for r in rows:
        for at in (r.get("curve") or {}).values():
            cost, equal = at["budget"], at["equal_positions"]
            best = max(equal, key=lambda name: equal[name]["f1"])
            nulls = ", ".join(f"{name.replace('_', ' ')} {null['f1']:.3f}" for name, null in at["nulls"].items())
            figures = f"{cost['code_ratio']:6.1f}{at['prefill_positions']:11.1f}{cost['wire_bytes_fp16']:8.0f}"
            figures += f"{at['f1']:7.3f}{at['text']['f1']:7.3f}"
            lines.append(f"{r['name']:34s}{figures}  {best} {equal[best]['f1']:.3f}, {nulls}")
    return "\n".join(lines) if len(lines) > 1 else "no run with a curve here"


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


# --------------------------------------------------------------------------------------------------- command line
def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help)
        if name in ("report", "run", "check", "new"):
            command.add_argument("--book", default=str(HOME / "claims.yaml"), help="file of claims (claims.yaml)")
        return command

    reporting = add("report", "RESULTS.md, plots/ and the page")
    reporting.add_argument("--results", default=str(RECORD), help="folder of result files (docs/results)")
    reporting.add_argument("--out", help="where it goes (here for docs/results, else the folder itself)")
    running = add("run", "a row's command again, in a fresh directory, beside its recorded figure")
    running.add_argument("row")
    running.add_argument("--out", help="fresh directory for it (runs/again/ROW)")
    checking = add("check", "every row marked fast again")
    checking.add_argument("--out", help="fresh directory for it (a temporary one)")
    adding = add("new", "append the template of a claim of your own")
    adding.add_argument("id")
    adding.add_argument("--document", default="own", help="the document that it is of (own)")
    tabling = add("table", "means and deviations over a sweep's runs")
    tabling.add_argument("root")
    tabling.add_argument("metrics", nargs="+")
    add("gpu", "speed, memory and time of the runs of scripts/gpu.sh").add_argument("root")
    judging = add("status", "the document's table of a LatentWire sweep")
    judging.add_argument("kind", choices=STATUS_KINDS)
    judging.add_argument("root", help="folder of runs; for embed_sweep also a summary.json")
    plotting = add("plot", "curves of the runs in and below a directory, into RUN/plots/")
    plotting.add_argument("root")
    comparing = add("hst", "nats that HST's variants save over the plain transformer, by seed")
    comparing.add_argument("root")
    ablation = add("cognate", "table of scripts/cognate_ablation.sh")
    ablation.add_argument("root")
    laning = add("lanes", "a table of AFRB runs, and summary.csv beside them")
    laning.add_argument("folders", nargs="+")
    return parser.parse_args(sys.argv[1:] if argv is None else argv)


def main(argv=None):
    args = parse(argv)
    chosen = {
        "plot": lambda: plot(Path(args.root)),
        "table": lambda: table(Path(args.root), args.metrics),
        "gpu": lambda: gpu(Path(args.root)),
        "hst": lambda: hst_comparison(Path(args.root)),
        "cognate": lambda: cognate(Path(args.root)),
        "status": lambda: status(args.kind, Path(args.root)),
        "lanes": lambda: lanes(args.folders),
        "new": lambda: new(Path(args.book), args.id, args.document),
    }
    if args.command in chosen:
        return chosen[args.command]()
    book = load(Path(args.book))
    if args.command == "report":
        root = Path(args.results)
        core.require(root.is_dir(), f"{root}: no such folder of result files")
        out = Path(args.out) if args.out else HOME if root.resolve() == RECORD.resolve() else root
        rows = report(book, root, out)
        in_words(book, rows)
        print(f"report: {out / 'RESULTS.md'}")
        return rows
    if args.command == "run":
        rows = [row for row in book["claims"] if row["id"] == args.row]
        core.require(rows, f"no claim is called {args.row}: see {args.book}")
        faults = run_rows(rows, Path(args.out or f"runs/again/{args.row}"))
    else:
        rows = [row for row in book["claims"] if row.get("fast")]
        core.require(rows, f"{args.book}: no row is marked fast")
        with tempfile.TemporaryDirectory() as folder:
            faults = run_rows(rows, Path(args.out or f"{folder}/check"), fast=True)
    core.require(not faults, "; ".join(faults), core.CHECK_FAILED)
    print(f"{len(rows)} claims: as recorded")
    return rows


def in_words(book: dict, rows: list[dict]) -> None:
    """Print what a newcomer is told of each claim whose result files are here: a line each."""
    told = 0
    for row in rows:
        document = book["documents"][row["document"]]
        for subject in SUBJECTS:
            judged = row[subject]
            if judged["measured"] and judged["measured"]["results"]:
                told += 1
                word = judged["verdict"].upper() + (f" ({judged['reason']})" if judged["reason"] else "")
                about = document["title"] + (" as published" if subject == "published" else "")
                figure = f"{interval(judged['measured'], row.get('unit', ''), 3)} (the document: {row['documented']})"
                print(f"{word}: {about}: {row['claim']}: {figure}. Read on: {document.get('page', 'RESULTS.md')}")
    print(f"({told} figures of {len(rows)} claims; the others have no result file here)")


if __name__ == "__main__":
    core.cli(main)
