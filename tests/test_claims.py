"""claims.py: verdicts by hand, the committed book, the table of a sweep; and the shell sweeps themselves."""

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import claims
import core


def test_values_are_paths_with_one_operator():
    r = {"a": {"b": 6, "c": True}, "d": 3.0}
    assert claims.value(r, "a.b") == 6 and claims.value(r, "a.b / d") == 2 and claims.value(r, "a.b - 1.5") == 4.5
    assert claims.value(r, "a.c") == 1.0 and claims.value(r, "a.x") is None and claims.value(r, "a.b / a.x") is None


def interval(lo, hi, n=3, over="runs", mixed=""):
    return {"mean": (lo + hi) / 2, "lo": lo, "hi": hi, "n": n, "over": over, "mixed": mixed}


@pytest.mark.parametrize(
    "lo, hi, expected",
    [
        (91, 99, "holds"),
        (90, 100, "holds"),
        (80, 99, "undecided"),
        (95, 101, "undecided"),
        (80, 120, "undecided"),
        (-5, 89.9, "fails"),
        (100.1, 110, "fails"),
    ],
)
def test_the_whole_interval_decides(lo, hi, expected):
    assert claims.verdict(interval(lo, hi), [90, 100])[0] == expected
    assert claims.verdict(interval(lo, hi, 1, "items"), [90, 100])[0] == expected
    assert claims.verdict(interval(lo, hi, n=2), [90, 100]) == ("undecided", "2 of 3 seeds")
    assert claims.verdict(interval(lo, hi, mixed="different commit"), [90, 100])[0] == "undecided"
    assert claims.verdict(None, [90, 100]) == ("not testable here", "")


def run_file(root, folder, seed, gain, **more):
    """A result file as an experiment writes it, with its manifest."""
    flags = {"seed": seed, "output_dir": f"runs/x/{folder}", "lr": 0.1}
    code = {"phase_a_validation.py": "1", "core.py": "2"}
    manifest = {"flags": flags, "inputs": {"data": "d"}, "segments": [{"code": code}]}
    path = root / "x" / folder / "phase_a_results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"gain": gain, "seed": seed, "manifest": manifest} | more))
    return path


def row(**changes):
    figure = {
        "results": "x/on_s*/phase_a_results.json",
        "metric": "gain",
        "evidence": "stand-in",
        "command": "for s in 0 1; do python phase_a_validation.py --output_dir runs/x/on_s$s; done; python x.py "
        "--output_dir=runs/x/on_s1; python phase_a_validation.py --output-dir runs/x/on_s2"
        " && python phase_a_validation.py --output_dir runs/x/off_s0",
    }
    null = {"label": "switched off", "results": "x/off_s*/phase_a_results.json", "metric": "gain"}
    whole = {
        "id": "a-claim",
        "document": "own",
        "line": 1,
        "claim": "it gains",
        "documented": "1 nat",
        "unit": "nats",
        "band": [0.5, 2],
        "because": "the document's size",
        "rebuilt": figure,
        "nulls": [null],
        "needs": "a GPU",
        "headline": "it gains",
    }
    return {k: v for k, v in (whole | changes).items() if v is not None}


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Recorded results of three seeds and of a mechanism that was off, in place of docs/results."""
    root = tmp_path / "record"
    for seed, gain in enumerate((1.0, 1.2, 1.1)):
        run_file(root, f"on_s{seed}", seed, gain)
    run_file(root, "off_s0", 0, 0.01)
    monkeypatch.setattr(claims, "RECORD", root)
    return root


def book(tmp_path, *rows):
    path = tmp_path / "book.yaml"
    path.write_text(yaml.safe_dump({"documents": {"own": {"title": "Own"}}, "claims": list(rows)}))
    return str(path)


def test_a_sound_row_is_judged_shown_and_written(record, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["report", "--book", book(tmp_path, row()), "--results", str(record), "--out", str(out)]
    (judged,) = claims.main(arguments)
    half = 4.303 * 0.1 / math.sqrt(3)
    assert (
        judged["rebuilt"]["verdict"] == "holds (small scale)" and judged["published"]["verdict"] == "not testable here"
    )
    figure = f"1.1 [{1.1 - half:.4g}, {1.1 + half:.4g}] nats (3 seeds)"
    shown, text = capsys.readouterr().out, (out / "RESULTS.md").read_text()
    for where in (shown, text):
        assert "it gains" in where and "1 nat" in where
    assert figure in text and "**holds (small scale)**" in text and "1.1 [" in shown
    assert shown.startswith("HOLDS (SMALL SCALE): Own: it gains: ")
    assert "*switched off*: 0.01 (1 seed)" in text and "(line 1)" in text and "off_s0" in text
    first = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    claims.main(arguments)
    assert first == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


REFUSED = {
    "satisfied by a null: switched off": row(band=[0, 2]),
    "not written by": row(rebuilt=row()["rebuilt"] | {"command": "python phase_a_validation.py --output_dir runs/y"}),
    "no result file matches": row(rebuilt=row()["rebuilt"] | {"results": "x/none_s*/phase_a_results.json"}),
    "none of its nulls has a figure": row(nulls=[row()["nulls"][0] | {"results": "x/gone/*.json"}]),
    "no nulls": row(nulls=[]),
    "needs. does not say": row(needs=None),
    "because missing": row(because=None),
    "either the document's line": row(line=None),
    "or another source": row(source="a book"),
    "unknown partly": row(partly=[0, 1]),
    "unknown typo": row(rebuilt=row()["rebuilt"] | {"typo": 1}),
    "band is empty": row(band=[2, 0.5]),
    "leaves nothing out": row(band=[-math.inf, math.inf]),
    "not two numbers": row(band=0.5),
    "no document is called": row(document="other"),
    "fast is soon": row(fast="soon"),
    "evidence guess": row(rebuilt=row()["rebuilt"] | {"evidence": "guess"}),
    "over luck": row(rebuilt=row()["rebuilt"] | {"over": "luck"}),
    "no exact one": row(rebuilt=row()["rebuilt"] | {"over": "exact"}),
    "arithmetic on the document": row(rebuilt={"value": "1 + 1", "evidence": "stand-in"}),
    "either results or value": row(rebuilt=row()["rebuilt"] | {"value": 1}),
    "without the command": row(rebuilt={k: v for k, v in row()["rebuilt"].items() if k != "command"}),
    "without a label": row(nulls=[{k: v for k, v in row()["nulls"][0].items() if k != "label"}]),
    "neither published nor rebuilt": row(rebuilt=None, needs=None),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_row_that_breaks_a_rule_is_refused_by_name(fault, record, tmp_path):
    with pytest.raises(core.Failure, match=f"a-claim: .*{fault}") as failure:
        path = book(tmp_path, REFUSED[fault])
        claims.main(["report", "--book", path, "--results", str(record), "--out", str(tmp_path / "out")])
    assert failure.value.code == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["lr", "data", "core.py", "seed", "commit"])
def test_runs_of_several_kinds_are_refused_by_name(what, record, tmp_path):
    path = record / "x" / "on_s1" / "phase_a_results.json"
    result = json.loads(path.read_text())
    if what == "commit":  # older result files: flags and commit
        for other in record.glob("x/*/*.json"):
            old = json.loads(other.read_text())
            old |= {"config": old.pop("manifest")["flags"], "environment": {"commit": str(other == path)}}
            other.write_text(json.dumps(old))
    else:
        manifest = result["manifest"]
        places = {"lr": manifest["flags"], "data": manifest["inputs"], "core.py": manifest["segments"][0]["code"]}
        places.get(what, result)[what] = 0
        path.write_text(json.dumps(result))
    kind = "the same seed twice" if what == "seed" else f"different .*{'code' if what == 'core.py' else what}"
    with pytest.raises(core.Failure, match=f"a-claim: .*{kind}") as failure:
        path = book(tmp_path, row())
        claims.main(["report", "--book", path, "--results", str(record), "--out", str(tmp_path / "out")])
    assert failure.value.code == 1


def test_a_flag_that_follows_the_seed_may_differ_where_the_row_says_so(record, tmp_path):
    path = record / "x" / "on_s1" / "phase_a_results.json"
    result = json.loads(path.read_text())
    result["manifest"]["inputs"]["data"] = "of seed 1"
    path.write_text(json.dumps(result))
    varied = row(rebuilt=row()["rebuilt"] | {"varies": "data"})
    (judged,) = claims.report(claims.load(Path(book(tmp_path, varied))), record, tmp_path / "out")
    assert judged["rebuilt"]["verdict"] == "holds (small scale)"


def test_one_seed_is_undecided_and_a_null_beats_a_verdict_elsewhere(record, tmp_path):
    """Outside the record nothing is refused, as a run may be half finished: the verdict says what is missing."""
    for name in ("on_s1", "on_s2"):
        (record / "x" / name / "phase_a_results.json").unlink()
    judged = claims.judge(row(), record, strict=True)
    assert judged["rebuilt"]["verdict"] == "undecided (small scale)" and judged["rebuilt"]["reason"] == "1 of 3 seeds"
    everywhere = claims.judge(row(rebuilt=row()["rebuilt"] | {"value": 1, "results": None}), record, strict=False)
    assert everywhere["rebuilt"]["word"] == "holds"
    useless = claims.judge(row(band=[0, 2]) | {"rebuilt": {"value": 1}}, record, strict=False)
    assert useless["rebuilt"]["word"] == "undecided" and "switched off" in useless["rebuilt"]["reason"]
    unknown = claims.judge(
        row(nulls=[row()["nulls"][0] | {"results": "x/no"}]) | {"rebuilt": {"value": 1}}, record, False
    )
    assert unknown["rebuilt"]["word"] == "undecided" and "is not measured" in unknown["rebuilt"]["reason"]


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (on, off) in enumerate([(1.0, 3.0), (2.0, 5.0), (4.0, 8.0)]):
        run_file(tmp_path, f"on_s{seed}", seed, on)
        run_file(tmp_path, f"off_s{seed}", seed, off)
    run_file(tmp_path, "on_s7", 7, 100.0)  # without a partner
    figure = {"results": "x/on_s*/*.json", "minus": "x/off_s*/*.json", "metric": "gain"}
    measured = claims.measure(tmp_path, figure)
    assert measured["mean"] == -3 and measured["n"] == 3 and measured["hi"] == pytest.approx(-3 + 4.303 / math.sqrt(3))


def test_items_are_of_one_run_and_exact_figures_span_their_files(tmp_path):
    scores = {"scores": {"mean": 0.5, "lo": 0.4, "hi": 0.6, "n": 200}}
    run_file(tmp_path, "a_s0", 0, 1.0, **scores)
    figure = {"results": "x/a_s*/*.json", "metric": "scores", "over": "items"}
    measured = claims.measure(tmp_path, figure)
    assert (
        claims.interval(measured) == "0.5 [0.4, 0.6] (200 items)" and claims.verdict(measured, [0.3, 0.7])[0] == "holds"
    )
    run_file(tmp_path, "a_s1", 1, 2.0, **scores)
    assert claims.verdict(claims.measure(tmp_path, figure), [0.3, 0.7])[0] == "undecided"
    exact = claims.measure(tmp_path, {"results": "x/a_s*/*.json", "metric": "gain", "over": "exact"})
    assert (exact["lo"], exact["hi"]) == (1, 2) and claims.interval(exact, "nats") == "1 [1, 2] nats"
    assert claims.interval(claims.measure(tmp_path, {"value": "2 ** 20"}), "tokens") == "1,048,576 tokens"


def test_a_report_from_elsewhere_stays_there(record, tmp_path):
    """Without --out it goes beside the results; onto the project's own pages only docs/results may go."""
    elsewhere = tmp_path / "mine"
    shutil.copytree(record, elsewhere)
    before = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    claims.main(["report", "--book", book(tmp_path, row()), "--results", str(elsewhere)])
    assert (elsewhere / "RESULTS.md").exists() and (elsewhere / "index.html").exists()
    with pytest.raises(core.Failure, match="name another --out"):
        claims.main(["report", "--book", book(tmp_path, row()), "--results", str(elsewhere), "--out", str(ROOT)])
    after = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    assert before == after


def test_figures_in_a_text_are_renewed(record, tmp_path):
    page = tmp_path / "page.md"
    mark = "<!--= x/on_s*/*.json | gain -->{}<!--/-->"
    page.write_text(
        f"{claims.MARKS[0]}\nold\n{claims.MARKS[1]}\nGains {mark.format('9')}, "
        "off <!--= x/off_s*/*.json | gain -->?<!--/-->."
    )
    claims.refresh(page, record, "table")
    half = 4.303 * 0.1 / math.sqrt(3)
    assert f"Gains {mark.format(f'1.1 [{1.1 - half:.3g}, {1.1 + half:.3g}] (3 seeds)')}, off" in page.read_text()
    assert (
        f"{claims.MARKS[0]}\ntable\n{claims.MARKS[1]}" in page.read_text()
        and "-->0.01 (1 seed)<!--" in page.read_text()
    )
    page.write_text(f"{claims.MARKS[0]}{claims.MARKS[1]}<!--= x/none*/*.json | gain -->?<!--/-->")
    with pytest.raises(core.Failure, match="no result for x/none"):
        claims.refresh(page, record, "table")
    page.write_text("no marks")
    with pytest.raises(core.Failure, match="claims: begin"):
        claims.refresh(page, record, "table")


MAKE = "import json, pathlib, sys\np = pathlib.Path(sys.argv[2])\np.parent.mkdir(parents=True)\n"
MAKE += "p.write_text(json.dumps({'gain': float(sys.argv[3]), 'seed': 0}))\n"


@pytest.mark.parametrize(
    "now, what", [(1.0, "as recorded"), (7.0, "fails now, holds in the record"), (None, "was written")]
)
def test_a_row_is_run_again_beside_its_record(now, what, tmp_path, monkeypatch, capfd):
    (tmp_path / "make.py").write_text(MAKE if now else "raise SystemExit(3)")
    monkeypatch.setattr(claims, "RECORD", tmp_path / "record")
    (tmp_path / "record" / "z").mkdir(parents=True)
    (tmp_path / "record" / "z" / "r.json").write_text('{"gain": 1.0, "seed": 0}')
    command = f"python {tmp_path}/make.py --out runs/z/r.json {now}"
    figure = {"results": "z/r.json", "metric": "gain", "over": "exact", "evidence": "mechanism", "command": command}
    nulls = [{"label": "nothing", "value": 0}]
    sound = row(rebuilt=figure, nulls=nulls, fast=True)
    for arguments in (["run", "a-claim"], ["check"]):
        arguments += ["--book", book(tmp_path, sound), "--out", str(tmp_path / arguments[0])]
        if now == 1.0:
            claims.main(arguments)
            assert "as recorded" in capfd.readouterr().out
        else:
            with pytest.raises(core.Failure, match=what) as failure:
                claims.main(arguments)
            assert failure.value.code == 1
    with pytest.raises(core.Failure, match="name a fresh --out"):
        claims.main(arguments)
    assert not (ROOT / "runs" / "z").exists()


def test_check_repeats_the_subjects_that_are_marked_fast(tmp_path, monkeypatch, capfd):
    """The published code may need the network; `run` repeats it, `check` does not."""
    (tmp_path / "make.py").write_text(MAKE)
    monkeypatch.setattr(claims, "RECORD", tmp_path / "record")
    for name in ("ours", "theirs"):
        (tmp_path / "record" / name).mkdir(parents=True)
        (tmp_path / "record" / name / "r.json").write_text('{"gain": 1.0, "seed": 0}')
    figure = {"metric": "gain", "over": "exact", "evidence": "mechanism"}
    ours = figure | {"results": "ours/r.json", "command": f"python {tmp_path}/make.py --out runs/ours/r.json 1.0"}
    theirs = figure | {"results": "theirs/r.json", "command": f"python {tmp_path}/gone.py --out runs/theirs/r.json"}
    nulls = [{"label": "nothing", "value": 0}]
    path = book(tmp_path, row(published=theirs, rebuilt=ours, nulls=nulls, fast="rebuilt"))
    claims.main(["check", "--book", path, "--out", str(tmp_path / "check")])
    assert "(rebuilt)" in (shown := capfd.readouterr().out) and "(published)" not in shown
    with pytest.raises(core.Failure, match=r"no theirs/r\.json was"):
        claims.main(["run", "a-claim", "--book", path, "--out", str(tmp_path / "run")])


def test_new_writes_a_row_that_loads(tmp_path):
    path = tmp_path / "mine.yaml"
    for name in ("first-claim", "second-claim"):
        claims.main(["new", name, "--book", str(path)])
    loaded = claims.load(path)
    assert [r["id"] for r in loaded["claims"]] == ["first-claim", "second-claim"] and loaded["documents"].keys() == {
        "own"
    }
    for name, words in (("first-claim", "choose another id"), ("Bad Name", "lower-case")):
        with pytest.raises(core.Failure, match=words):
            claims.main(["new", name, "--book", str(path)])
    with pytest.raises(core.Failure, match="no document other"):
        claims.main(["new", "third", "--document", "other", "--book", str(path)])


def test_the_worked_example_of_the_contribution_page(tmp_path, monkeypatch):
    """Its script, run as its row says, gives its row a verdict, and the row's null fails it."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    script, mine = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("python", "yaml"))
    (tmp_path / "example_train.py").write_text(script)
    (tmp_path / "mine.yaml").write_text(mine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    example = importlib.import_module("example_train")
    (row,) = claims.load(tmp_path / "mine.yaml")["claims"]
    for figure in (row["rebuilt"], row["nulls"][0]):
        command = " ".join(figure["command"].split())
        assert command.startswith("for s in 0 1 2; do python example_train.py ") and command.endswith("; done")
        for seed in "012":
            words = command[command.index(".py ") + 4 : -len("; done")].replace("$s", seed).split()
            example.main([*words, "--threads", "1"])
    monkeypatch.setattr(claims, "RECORD", tmp_path / "runs")  # strict: commands, nulls, one kind of runs
    (judged,) = claims.main(["report", "--book", "mine.yaml", "--results", "runs", "--out", "page"])
    assert judged["rebuilt"]["verdict"] == "holds (small scale)" and judged["rebuilt"]["measured"]["n"] == 3
    assert claims.verdict(judged["nulls"][0]["measured"], row["band"])[0] == "fails"


BOOK = claims.load(ROOT / "claims.yaml")


def test_every_documents_rows_say_where_it_says_so():
    documents = sorted((ROOT.parent / "shared" / "documents").glob("*.txt"))
    for key, number in zip(("cfhot", "hst", "cognate", "afrb", "latentwire"), range(5)):
        rows = [r for r in BOOK["claims"] if r["document"] == key]
        assert len(rows) >= 10, key
        longest = len(documents[number].read_text().splitlines()) if documents else math.inf
        assert all(1 <= r["line"] <= longest for r in rows if "line" in r)
        assert sum("line" in r for r in rows) >= 10


@pytest.mark.parametrize("key", BOOK["documents"])
def test_a_useless_mechanism_holds_no_claim(key):
    """Untrained, inert, shuffled, trivial: put in place of what is judged, none of them holds the row."""
    for r in (r for r in BOOK["claims"] if r["document"] == key):
        for null in r["nulls"]:
            measured = claims.measure(claims.RECORD, null)
            if measured:
                assert claims.verdict(measured | {"n": 3, "mixed": ""}, r["band"])[0] != "holds", (
                    r["id"],
                    null["label"],
                )


def test_the_committed_pages_are_what_the_committed_results_give(tmp_path, monkeypatch):
    """In a copy of the project the report changes nothing."""
    pages = ["README.md", "RESULTS.md", "docs/index.html", *{d["page"] for d in BOOK["documents"].values()}]
    for name in [*pages, "docs/index.html.j2"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    record = tmp_path / "docs" / "results"
    record.symlink_to(ROOT / "docs" / "results")
    monkeypatch.setattr(claims, "HOME", tmp_path)
    monkeypatch.setattr(claims, "RECORD", record)
    monkeypatch.setattr(
        claims, "faults_of_commands", lambda row, root: ""
    )  # asked by the next test, in the project itself
    claims.report(BOOK, record, tmp_path)
    for name in pages:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name}: run `python claims.py report`"
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {p.name for p in (ROOT / "plots").iterdir()}


def test_every_rows_command_writes_the_files_that_the_row_reads():
    for r in BOOK["claims"]:
        assert not claims.faults_of_commands(r, claims.RECORD), r["id"]


def test_table_groups_seeds(tmp_path, capsys):
    for seed, gain in enumerate((1.0, 3.0)):
        run_file(tmp_path, f"causal_s{seed}", seed, gain)
    claims.main(["table", str(tmp_path / "x"), "gain", "nothing"])
    out = capsys.readouterr().out
    assert "2.0000 ± 1.4142 (n=2)" in out and "causal " in out
    with pytest.raises(core.Failure, match="no "):
        claims.main(["table", str(tmp_path / "empty"), "x"])


def test_plot_draws_every_run_finished_or_not(tmp_path, capsys, monkeypatch):
    rows = [{"arm": "lora", "step": s, "train_loss": 3.0 - s, "lm_loss": 2.0 - s, "gate": 0.4} for s in range(3)]
    rows += [{"step": 1, "horizon_by_offset": [1.0, 2.0]}, {"train/step": 2, "val/act_q_variance": 0.1}, {"x": "end"}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    interval = {"mean": 0.5, "lo": 0.4, "hi": 0.7, "n": 9}
    for name, content in (
        ("b/metrics.json", {"recall": {"beta_0_85": [[1, 1.0], [4, 0.2]]}}),
        (
            "c/summary.json",
            {"f1_interval": interval, "best_f1": 0.5, "baselines_same_protocol": {"text": {"f1_interval": interval}}},
        ),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    drawn = {}
    monkeypatch.setattr(claims, "picture", lambda path, plot, curves: drawn.update({path.stem: curves}))
    claims.main(["plot", str(tmp_path)])
    assert drawn.keys() == {"loss", "gate", "heads", "act_variance", "recall", "f1_by_strategy"}
    assert drawn["loss"] == {
        "lora, training": [[(0, 3.0), (1, 2.0), (2, 1.0)]],
        "lora, training, next token": [[(0, 2.0), (1, 1.0), (2, 0.0)]],
    }
    assert drawn["heads"] == {"offset 2": [[(1, 1.0)]], "offset 3": [[(1, 2.0)]]}
    assert drawn["recall"] == {"beta 0.85": [[[1, 1.0], [4, 0.2]]]} and drawn["f1_by_strategy"].keys() == {"text", "c"}
    assert capsys.readouterr().out.count("plot: ") == 6
    monkeypatch.undo()
    for curves in (drawn["loss"], drawn["f1_by_strategy"]):
        claims.picture(tmp_path / "x.png", {"title": "t", "x": "x", "y": "y"}, curves)
        assert (tmp_path / "x.png").stat().st_size > 5000
        (tmp_path / "x.png").unlink()
    with pytest.raises(core.Failure, match="no such run"):
        claims.main(["plot", str(tmp_path / "c" / "none")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(core.Failure, match="pip install matplotlib"):
        claims.main(["plot", str(tmp_path / "a")])


SWEEPS = sorted((ROOT / "scripts").glob("*.sh"))


@pytest.mark.parametrize("script", SWEEPS, ids=lambda p: p.name)
def test_sweeps_parse_and_their_commands_too(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    env = os.environ | {"DRY": "1", "ROOT": "runs/x"}
    given = [str(script)] if script.stem == "latentwire_squad" else []  # a file, which a dry run does not read
    done = subprocess.run(["bash", str(script), *given], capture_output=True, text=True, env=env, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) >= 2
    for line in lines:
        program, *flags = line.split()[1:]
        if program == "-m":  # pytest
            continue
        importlib.import_module(program.removesuffix(".py").replace("/", ".")).parse(flags)


def test_the_ablation_of_cognate_by_hand(tmp_path, capsys):
    """Main effects are paired by seed and averaged over other factors; a cell without partner does not count."""
    losses = {(1, 1, 1, 0): 1.0, (0, 1, 1, 0): 1.5, (1, 0, 1, 0): 1.2, (0, 0, 1, 0): 1.4, (1, 1, 0, 1): 9.0}
    for (muon, grokfast, memory, seed), loss in losses.items():
        path = tmp_path / f"muon{muon}_grokfast{grokfast}_memory{memory}_s{seed}" / "reasoning"
        path.mkdir(parents=True)
        final = {"loss": loss, "act_q_variance": 0.1, "datasets": {}}
        (path / "cognate_results.json").write_text(json.dumps({"final": final, "tokens": 10}))
    runs = claims.main(["cognate", str(tmp_path)])
    assert {key: columns["val loss"] for key, columns in runs.items()} == losses
    assert claims.cognate_effects(runs, 0, "val loss") == [pytest.approx(((1.0 - 1.5) + (1.2 - 1.4)) / 2)]
    assert claims.cognate_effects(runs, 1, "val loss") == [pytest.approx(((1.0 - 1.2) + (1.5 - 1.4)) / 2)]
    assert claims.cognate_effects(runs, 2, "val loss") == [] == claims.cognate_effects(runs, 0, "synth_add")
    assert re.search(r"Muon +-0.35 \[-0.35, -0.35\]", capsys.readouterr().out)
    with pytest.raises(core.Failure, match="no run has finished"):
        claims.main(["cognate", str(tmp_path / "nothing")])
