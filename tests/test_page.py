"""docs/index.html: one page without any outside request, every claim on it; and its use in a browser."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

import claims

LONG = "python train.py " + " ".join(f"--flag_number_{i} {10**i}" for i in range(20)) + " --output_dir runs/" + "x" * 90
ODD = '<b>bold</b> & "quoted" $5 and $6 </script> style=\'a\' id="b"'


def row(name, document, band, **more):
    said = {"line": 7, "claim": f"claim of {name}", "documented": f"figure of {name}", "because": f"reason of {name}"}
    return {"id": name, "document": document, "band": band, "nulls": [{"label": "off", "value": 0}]} | said | more


def figure(folder, metric="final.gain", **more):
    more = {"evidence": "stand-in", "command": f"bash scripts/{folder}.sh"} | more
    return {"results": f"{folder}/s*/r.json", "metric": metric} | more


CONTROLS = [{"label": "alike", **figure("b")}, {"label": "of another unit", **figure("b", "final.bytes")}]
SCORED = {"results": "a/s0/r.json", "metric": "final.scored", "over": "items", "evidence": "documented scale"}
BOOK = {
    "documents": {"one": {"title": "One & only", "page": "docs/cfhot.md"}, "two": {"title": "Two"}},
    "claims": [
        row("holds", "one", [1, 9], headline="it <i>leads</i>", unit="nats", needs="a GPU", note="noted")
        | {"published": {"value": "2 ** 10"}, "rebuilt": figure("a"), "controls": CONTROLS},
        row("paired", "one", [1, float("inf")], needs="more", rebuilt=figure("a", minus="b/s*/r.json")),
        row("undecided", "one", [2.1, 3], needs="more", rebuilt=figure("a", evidence="mechanism", command=LONG)),
        row("items", "two", [-9, -0.1], headline="second", needs=ODD, unit=ODD, note=ODD)
        | {"rebuilt": SCORED | {"command": "A='<x>' bash a.sh"}},
        row("small", "two", [5, 9], needs="more", rebuilt=figure("a")),
        row("none", "two", [0, 1], needs="sixteen GPUs") | {"claim": ODD, "documented": ODD, "because": ODD},
    ],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of BOOK, the rows that it shows and the folder that it is in, beside its result files."""
    root = tmp_path_factory.mktemp("page")
    for folder, gain in (("a", 2.0), ("b", -3.0)):
        for seed in range(3):
            final = {"gain": gain + seed / 10, "bytes": 10**9, "scored": {"mean": 0.2, "lo": 0.1, "hi": 0.3, "n": 40}}
            path = root / folder / f"s{seed}" / "r.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps({"final": final, "seed": seed}))
    (root / "book.yaml").write_text(yaml.safe_dump(BOOK, sort_keys=False))
    rows = claims.main(["report", "--book", str(root / "book.yaml"), "--results", str(root)])
    return (root / "index.html").read_text(), {r["id"]: r for r in rows}, root


class Page(HTMLParser):
    """Attributes of all tags; the visible text of each article; a failure where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.articles, self.svg = [], [], {}, {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "br", "path"):
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for tag, attributes in self.open:
            if tag == "article":
                into = self.svg if any(t == "svg" for t, _ in self.open) else self.articles
                into[attributes["id"]] = into.get(attributes["id"], "") + data


def words(text):
    return " ".join(text.split())


def test_the_page_asks_for_nothing_outside_itself(made):
    text, _, root = made
    page = Page(text)
    named = [x for _, tag in page.tags for name in ("src", "href", "srcset", "action", "data") if (x := tag.get(name))]
    for link in (x for x in named if not x.startswith("#") and x != "data:,"):
        assert not re.match(r"[a-z]+:|//|/", link) and (root / link).exists(), link
    assert not re.search(r"url\(|@import|xlink|xmlns|https?:|fetch\(|XMLHttp", text)
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "object", "video", "base"} == set()
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids)) and all(x[1:] in ids for x in named if x.startswith("#"))


def test_every_claim_stands_there_with_figure_verdict_band_and_command(made):
    text, rows, _ = made
    page = Page(text)
    assert list(page.articles) == list(rows)
    for name, r in rows.items():
        shown = words(page.articles[name])
        told = [r["claim"], r["documented"], r["because"], r.get("note", ""), r.get("needs", ""), f"line {r['line']}"]
        for x in (r[s] for s in claims.SUBJECTS):
            if x["figure"]:
                told += [claims.interval(x["measured"], r.get("unit", "")), x["verdict"], x["reason"], x["evidence"]]
                told += [x["figure"].get("command", ""), str(x["figure"].get("metric", x["figure"].get("value")))]
        for x in r["nulls"] + r["controls"]:
            told += [x["label"], claims.short(x["measured"]["mean"])]
        assert [x for x in told if words(x) not in shown] == [], name
    for name, band in {
        "holds": "1 to 9 nats",
        "paired": "1 or more",
        "undecided": "2.1 to 3",
        "items": "-9 to -0.1 <b>",
        "none": "0 to 1",
    }.items():
        assert f"It holds at {band}" in words(page.articles[name])
    assert rows["holds"]["rebuilt"]["verdict"] == "holds (small scale)" and "not testable here" in page.articles["none"]
    links = {tag["href"] for tag_name, tag in page.tags if tag_name == "a"}
    assert {f"./{folder}/s{seed}/r.json" for folder in "ab" for seed in range(3)} <= links
    assert "<td data-of" in text and "it &lt;i&gt;leads&lt;/i&gt;" in text  # the index of documents


def test_text_is_escaped_and_scripts_stay_closed(made):
    text, *_ = made
    assert ODD not in text and "<b>bold" not in text and text.count("</script>") == 1
    assert words(Page(text).articles["none"]).count(ODD) == 3 and "$5 and $6" in Page(text).svg["items"]


def test_without_scripts_all_claims_are_shown_and_no_filter(made):
    hidden = [tag for tag, attributes in Page(made[0]).tags if "hidden" in attributes]
    assert hidden == ["form"] and "6 claims" in made[0]


def test_the_page_is_the_same_bytes_again(made):
    text, _, root = made
    claims.main(["report", "--book", str(root / "book.yaml"), "--results", str(root)])
    assert (root / "index.html").read_text() == text
    assert len(text) < 60_000


def test_the_plot_shows_what_is_on_the_scale_of_the_claim(made):
    svg = Page(made[0]).svg
    for name in ("as published", "rebuilt", "null: off", "control: alike", "nats"):
        assert name in svg["holds"]
    assert "another unit" not in svg["holds"] and "none" not in svg  # nothing is judged there
    drawn = re.search(r'<article id="undecided".*?(<svg.*?</svg>)', made[0], re.DOTALL)[1]
    kinds = re.findall(r'class="([a-z-]+)"', drawn)
    assert {"band", "edge", "tick", "axis", "judged", "judged-line", "judged-dot", "null-dot"} <= set(kinds)
    assert "style" not in drawn and "id=" not in drawn and len(drawn) < 3000
    lo, hi = map(float, re.search(r'judged-line" d="M ([\d.]+) \S+ L ([\d.]+)', drawn).groups())
    left, right = (
        f(map(float, re.findall(r"[ML] ([\d.]+) ", re.search(r'"band" d="([^"]*)', drawn)[1]))) for f in (min, max)
    )
    assert lo < left < hi < right  # its interval overlaps the lower edge of the band


def test_the_axis_by_hand():
    def axis(band, judged, *nulls):
        shown = [("rebuilt", x) for x in judged] + [("null", x) for x in nulls]
        return claims.axis([{"role": r, "measured": {"mean": x, "lo": x, "hi": x}} for r, x in shown], band)

    inf = float("inf")
    assert axis([2, inf], [1], 0)[:3] == ("linear", -0.12, 2.12)
    assert axis([0.9, 1e6], [1], 0.5)[:3] == ("linear", 0.47, 1.03)  # the far edge would squeeze the figures
    assert axis([0.9, 1.2], [1], 0.5)[1:3] == pytest.approx((0.458, 1.242))  # this one is near
    assert axis([5, 5], [5])[1] < 5 < axis([5, 5], [5])[2]
    assert axis([1, inf], [5000], 2)[:3] == ("log", 0.5, 10000)
    assert axis([1, inf], [5000], 0) == ("symlog", -0.5, 10000, 1)
    wide = [{"role": "null", "measured": {"mean": 1e-9, "lo": -1e-9, "hi": 3e-9}}]  # zero, as far as one can tell
    assert claims.axis([{"role": "rebuilt", "measured": {"mean": 1, "lo": 1, "hi": 1}}, *wide], [2, inf])[0] == "linear"


# ----------------------------------------------------------------------------------------------- in a real browser
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WATCH = """<script>
window.faults = [];
onerror = error => { faults.push(String(error)) };
onunhandledrejection = error => { faults.push(String(error.reason)) };
</script>"""
USE = """<script>
addEventListener("load", async () => {
  if (self !== top) return;
  const wait = () => new Promise(done => setTimeout(done, 60)), out = {steps: {}}, form = document.forms[0];
  const seen = kind => [...document.querySelectorAll(kind)].filter(x => x.getClientRects().length).map(x => x.id);
  const see = what => { out.steps[what] = {hash: location.hash, count: document.getElementById("count").textContent,
    values: [...form.querySelectorAll("select")].map(x => x.value), shown: seen("article"), parts: seen("section")} };
  const set = async (name, value) => {
    form[name].value = value;
    form[name].dispatchEvent(new Event("change", {bubbles: true}));
    await wait();
  };
  see("start");
  form.querySelector("button").click(); await wait(); see("reset");
  for (const field of form.querySelectorAll("select")) for (const option of [...field.options].slice(1)) {
    await set(field.name, option.value); see(field.name + "=" + option.value); await set(field.name, "");
  }
  await set("verdict", "fails"); await set("evidence", "stand-in"); see("both");
  location.hash = "none"; await wait(); see("hidden claim");
  location.hash = "verdict=nonsense"; await wait(); see("nonsense");
  out.copied = [];
  for (const button of document.querySelectorAll(".command button")) {
    button.click(); await wait();
    out.copied.push([button.textContent, getSelection().toString()]);
    button.remove();
  }
  out.commands = [...document.querySelectorAll(".command code")].map(x => x.textContent);
  const frame = document.createElement("iframe");  // a window itself is never as narrow as a telephone
  frame.style = "width: 400px; height: 800px; border: 0";
  frame.srcdoc = document.documentElement.outerHTML;
  await new Promise(done => { frame.onload = done; document.body.append(frame) });
  const phone = frame.contentDocument, all = [...phone.querySelectorAll("body *")];
  out.width = phone.documentElement.clientWidth, out.scroll = phone.documentElement.scrollWidth;
  out.over = all.filter(x => x.getBoundingClientRect().right > 400.5).map(x => x.outerHTML.slice(0, 200));
  out.buttons = phone.querySelectorAll(".command button").length;
  out.faults = [...faults, ...frame.contentWindow.faults];
  frame.remove();
  const told = document.body.appendChild(document.createElement("pre"));
  told.id = "told", told.textContent = JSON.stringify(out);
});
</script>"""


def browse(path, made, fragment=""):
    """What the page's own test script, put into a copy of it, tells of it in a browser without a window."""
    text = made[0].replace("<head>", "<head>" + WATCH, 1).replace("</body>", USE + "</body>", 1)
    (path / "index.html").write_text(text)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
    options += [
        f"--user-data-dir={path / 'profile'}",
        "--virtual-time-budget=60000",
        "--dump-dom",
        f"file://{path}/index.html{fragment}",
    ]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_filters_copying_and_a_narrow_screen_in_a_browser(made, tmp_path):
    _, rows, _ = made
    told = browse(tmp_path, made)
    steps, everything = told["steps"], list(rows)

    def fitting(document="", verdict="", evidence=""):
        judged = {n: [r[s] for s in claims.SUBJECTS if r[s]["figure"]] for n, r in rows.items()}
        judged["none"] = [{"word": "not testable here", "evidence": None}]
        return [
            n
            for n, r in rows.items()
            if document in ("", r["document"])
            and any(verdict in ("", x["word"]) and evidence in ("", x["evidence"]) for x in judged[n])
        ]

    assert steps["start"]["shown"] == steps["reset"]["shown"] == everything and steps["start"]["count"] == "6 claims"
    tried = [what for what in steps if "=" in what]
    assert len(tried) == 2 + 4 + 4
    for what in tried:
        name, value = what.split("=")
        expected = fitting(**{name: value})
        assert steps[what]["shown"] == expected and steps[what]["hash"] == "#" + what.replace(" ", "+"), what
        assert steps[what]["parts"] == list(dict.fromkeys(rows[n]["document"] for n in expected))
        assert steps[what]["count"].startswith(f"{len(expected)} of 6 claims")
    assert {what for what in tried if steps[what]["shown"] == []} == set()  # BOOK has each of them
    assert steps["both"]["shown"] == fitting(verdict="fails", evidence="stand-in") != fitting(verdict="fails")
    assert steps["hidden claim"]["shown"] == steps["nonsense"]["shown"] == everything  # a link to a claim shows it
    assert steps["nonsense"]["values"] == ["", "", ""]
    assert [text for _, text in told["copied"]] == told["commands"]  # what is selected, to the letter
    assert {word for word, _ in told["copied"]} <= {"Copied", "Selected"} and LONG in told["commands"]
    assert len(told["copied"]) == told["buttons"] == len(told["commands"])
    assert told["width"] == 400 and told["scroll"] <= 400 and told["over"] == []
    assert told["faults"] == []

    shared = browse(tmp_path, made, "#document=two&verdict=not+testable+here")
    assert shared["steps"]["start"]["shown"] == ["none"] and shared["steps"]["start"]["values"] == [
        "two",
        "not testable here",
        "",
    ]
    assert (
        shared["steps"]["reset"]["shown"] == everything
        and shared["steps"]["reset"]["hash"] == "#all"
        and shared["faults"] == []
    )
