"""The HTML page of a sweep: complete in itself, escaped, its numbers those of the tables, what is missing told."""

import base64
import hashlib
import itertools
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from test_tables import FakeSweep, fingerprint, rates, sweep_of, with_status

from kdsweep import cli
from kdsweep.core.errors import InputError
from kdsweep.evaluation import costs
from kdsweep.results import formats, report, stats, summary
from kdsweep.results.figures import command as figures
from kdsweep.results.figures import examples
from kdsweep.results.frame import variants
from kdsweep.results.stats import NAN
from kdsweep.results.table import Column, Options, Table
from kdsweep.results.tables import command as tables
from kdsweep.tracking import mirror, reader

DASH = formats.DASH
VOID = {"meta", "link", "img", "br", "hr", "input", "base"}
FEW = ("Teacher", "Student", "L_MSE", "H_KLD_WAug")
ROOT = "/data/jane doe/clinic"
PARAMS = {
    "train.lr": "0.0001",
    "teacher.lr": "0.0002",
    "image_size": "224",
    "train.batch_size": "64",
    "student.encoder": "small",
    "teacher.encoder": "large",
    "data.root": ROOT,
    "data.source._target_": "kdsweep.data.Busi",
}
TAGS = {"kdsweep.torch": "2.9", "kdsweep.threads": "4", "mlflow.source.git.commit": "abc-dirty"}


@dataclass(frozen=True, eq=False)
class Stored(FakeSweep):
    """With what a sweep has of MLflow."""

    run_id: str = "parent"
    experiment_id: str = "7"


def stored(sweep, *, params=None, tags=None, **columns):
    runs = sweep.runs.assign(
        params=[{**PARAMS, **single, **(params or {})} if single else {} for single in sweep.runs["params"]],
        tags=[{**TAGS, **(tags or {})} if single else {} for single in sweep.runs["params"]],
        run_id=[f"run{place}" if single else "" for place, single in enumerate(sweep.runs["params"])],
        started_ms=[1_000_000 if single else 0 for single in sweep.runs["params"]],
        ended_ms=[1_090_000 if single else 0 for single in sweep.runs["params"]],
        trivial_dice=0.1,
        epochs=[3.0 if single else np.nan for single in sweep.runs["params"]],
        best_epoch=[1.0 if single else np.nan for single in sweep.runs["params"]],
    )
    return Stored(sweep.name, runs.assign(**columns), sweep.scores, sweep.varied, sweep.commands)


class Page(HTMLParser):
    """A page's elements in order, its text, and the cells of its tables by row."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.rows, self.text, self.script = [], [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.script += data
        if {"style", "script"} & set(self.open):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def all(self, tag, attribute=None):
        return [attrs if attribute is None else attrs.get(attribute) for name, attrs in self.elements if name == tag]

    def images(self, kind):
        """The content of the pictures of a kind, svg+xml or png."""
        start = f"data:image/{kind};base64,"
        return [base64.b64decode(source[len(start) :]) for source in self.all("img", "src") if source.startswith(start)]

    def fact(self, name):
        return re.search(rf"\n{re.escape(name)}\n(.*)\n", self.text)[1]


def curves_of(sweep, *, store, uri):
    runs = sweep.runs.loc[sweep.runs.index.repeat(3), ["notation", "split", "seed"]]
    return runs.assign(metric="val/dice", epoch=[0, 1, 2] * len(sweep.runs), value=0.5)


def outline(which, sweep, **_):
    """In place of the real figures, which take seconds."""
    for label in variants(sweep):
        figure = Figure(figsize=(2, 1))
        figure.text(0, 0, f"{which} of {sweep.name}")
        yield f"{which}-{label}" if label else which, figure


def small(which, *_):
    """In place of the real tables."""
    text = pd.DataFrame({"Effect": ["a"], "DSC %": ["1.00"]})
    return Table(which, text, [Column(name, name) for name in text], notes=["a note"])


def shown(sweep, *_, **__):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:20, 8:20] = 1
    image = np.full((32, 32, 3), 90, np.uint8)
    return [examples.Example(image, mask, {"Student": mask > 0}, {}, {"Student": 0.8}, "caption", sweep.name)]


def some_interval(rows):
    """In place of the bootstrap, which takes seconds."""
    return (-1.0, 1.0) if len(rows) else (NAN, NAN)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the command on a sweep made here: exit code, page or None, what was logged."""
    logged = []

    def attached(_, files, *, folder, **__):
        logged.append((folder, files[0].name))
        return "logged"

    monkeypatch.setattr(reader, "attach", attached)
    monkeypatch.setattr(reader, "read_curves", curves_of)
    monkeypatch.setattr(examples, "load", shown)
    monkeypatch.setattr(stats, "clustered_interval", some_interval)
    monkeypatch.setattr(costs, "measure", lambda *_, **__: pytest.fail("measured"))

    def run(sweep, *words, costs=False, draws=False, counts=False):
        if not (draws or counts or costs):
            monkeypatch.setattr(tables, "make", small)
        if not draws:
            monkeypatch.setattr(figures, "draw", outline)
        monkeypatch.setattr(reader, "read_sweep", lambda **_: sweep)
        out = tmp_path / "out" / "r.html"
        words = (*words, "--out", str(out), "--store", str(tmp_path), *([] if costs else ["--no-costs"]))
        code = cli.main(["report", *words])
        return code, Page(out.read_text(encoding="utf-8")) if out.is_file() else None, logged

    return run


# ---- the page as a document ----------------------------------------------------------------------------------------


def check_document(page):
    """What holds for every page."""
    assert page.open == []
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    assert all(
        source.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,")) for source in page.all("img", "src")
    )
    assert all(attrs.get("alt") for attrs in page.all("img"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    used = [value for _, attrs in page.elements for key, value in attrs.items() if key in ("href", "xlink:href")]
    assert {value[1:] for value in used if value.startswith("#")} <= set(ids)
    urls = {
        name
        for _, attrs in page.elements
        for value in attrs.values()
        for name in re.findall(r"url\(#(.*?)\)", value or "")
    }
    assert urls <= set(ids)
    assert all(value.startswith(("#", "http://127.0.0.1:5000/#/", "https://doi.org/")) for value in used)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    (policy,) = [attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs]
    script = page.script.encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    sources = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:;"
    assert policy.startswith(f"default-src 'none'; {sources}")
    assert script == (Path(report.__file__).parent / "report.js").read_bytes()
    assert page.all("html", "lang") == ["en"]
    assert all(attrs.get("scope") in ("col", "row") for attrs in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_the_page_is_complete_in_itself(call, capsys):
    code, page, logged = call(stored(sweep_of(splits=(0, 1))), draws=True)
    assert code == 0
    check_document(page)
    assert len(page.images("svg+xml")) == 3
    assert all(b"HReg_KLD_WAug" in picture for picture in page.images("svg+xml"))
    assert logged == [("report", "r.html")]
    done = capsys.readouterr()
    assert re.search(r"^wrote \S+r\.html \(\d\.\d MB\); logged$", done.out.splitlines()[-1])
    assert done.err == ""


def test_numbers_are_the_strings_of_the_tables(call):
    sweep = stored(sweep_of(splits=(0, 1)))
    others = sweep.scores.assign(data_set="folder-1a2b3c4d", dice=0.5)
    pixels = range(len(sweep.scores))
    sweep = replace(sweep, external=others, scores=sweep.scores.assign(lesion_px=pixels, predicted_px=pixels))
    _, page, _ = call(sweep, "--test", "wilcoxon", counts=True)
    check_document(page)
    shown = [which for which in tables.applicable(sweep, store=Path()) if which != "table5"]
    assert shown == ["effects", "external", "strata", "table3", "table4", "translation"]
    for which in shown:
        made = tables.make(which, sweep, Options(Path(), "wilcoxon"))
        for sentence in made.lead if which not in ("table3", "table4", "effects") else ():
            assert sentence in page.text
        assert list(made.text()) in page.rows
        for row in made.text().to_numpy().tolist():
            assert row in page.rows
        for note in made.notes:
            assert note.replace("`", "") in page.text
    assert "--test wilcoxon" in page.text


def test_the_page_begins_with_the_answer(call):
    _, page, _ = call(stored(sweep_of(splits=(0, 1))), counts=True)
    headings = ["The answer", "Table 4.", "Which choice mattered", "Tables", "What was run", "Every cell"]
    places = [page.text.rindex(f"\n{heading}") for heading in headings]
    assert places == sorted(places)
    answer = page.text[places[0] : places[1]]
    for words in ("has the highest validation Dice: test DSC", "It differs from Student by", "Of 12 cells"):
        assert words in answer
    assert [attrs.get("class") for attrs in page.all("tr")].count("best") == 1


def test_what_was_run_is_read_from_the_runs(call):
    _, page, _ = call(stored(sweep_of(FEW, splits=(0, 1))))
    assert page.fact("Cells") == "6 of 6 finished; Teachers: 2 of 2 finished"
    assert page.fact("Factors").startswith(
        "path or method: L, H; loss: MSE, KLD; Teacher augmentation: strong, weak (2 comb"
    )
    assert page.fact("Splits and seeds") == "2 splits (0, 1), 1 seed (0)"
    assert page.fact("Test images") == "12 in split 0, 12 in split 1"
    assert page.fact("Learning rate") == "Student 0.0001, Teacher 0.0002"
    assert page.fact("Images") == DASH  # the params tell no number
    assert page.fact("Image size") == "224 pixels, square"
    assert page.fact("Code") == "abc-dirty (-dirty: with changes that the commit does not hold)"
    assert page.fact("Trained") == "1970-01-01 00:16 UTC to 1970-01-01 00:18 UTC"
    assert page.fact("Training time").startswith("12 min, summed over 8 runs")


def test_what_differs_between_runs_is_listed(call):
    sweep = stored(sweep_of(FEW, splits=(0,)), device=["cpu", "H200", "cpu", "H200"])
    tags = [{**TAGS, "mlflow.source.git.commit": name} for name in ("a", "b", "a", "b")]
    _, page, _ = call(replace(sweep, runs=sweep.runs.assign(tags=tags)))
    assert page.fact("Device") == "H200, cpu; threads: 4"
    assert page.fact("Code") == "2 states of the code: a, b"


# ---- every cell ----------------------------------------------------------------------------------------------------


def cells_of(page):
    start = next(place for place, row in enumerate(page.rows) if row[-1:] == ["MLflow"])
    return [row for row in page.rows[start + 1 :] if len(row) == len(page.rows[start])]


def test_all_cells_are_listed_with_their_links(call):
    sweep = stored(sweep_of(FEW, splits=(0, 1)))
    _, page, _ = call(sweep)
    rows = cells_of(page)
    assert len(rows) == len(sweep.runs) == 8
    dice = sweep.scores.groupby("fingerprint")["dice"].mean()
    links = iter([link for link in page.all("a", "href") if "/runs/" in link])
    for name, split, seed, status, percent, hd95, nsd, strength, epochs, time, _ in rows:
        run = sweep.runs.set_index("fingerprint").loc[fingerprint(name, int(split), int(seed))]
        assert (status, hd95, nsd, epochs, time) == ("finished", "3.00", "75.00", "3", "2 min")
        assert strength == ("2" if run["role"] == "distilled" else "\N{EN DASH}")
        assert percent == f"{100 * dice[run.name]:.2f}"
        assert (
            next(links) == f"http://127.0.0.1:5000/#/experiments/7/runs/{run['run_id']}?workflowType=machine_learning"
        )
    assert "work while make ui runs" in page.text


def test_links_go_where_the_user_says(call, capsys):
    sweep = stored(sweep_of(FEW, splits=(0,)))

    def address(page):
        return next(link for link in page.all("a", "href") if "/runs/" in link)

    _, page, _ = call(sweep, "--tracking-uri", "http://me:secret@host:1/")
    assert address(page).startswith("http://host:1/#/experiments/7/runs/")
    assert "secret" not in page.text
    assert "make ui" not in page.text
    _, page, _ = call(sweep, "--tracking-uri", "http://host:1", "--ui", "https://ml.example/mlflow/")
    assert address(page).startswith("https://ml.example/mlflow/#/experiments/7/runs/")
    code, _, _ = call(sweep, "--ui", "javascript:alert(1)")
    assert code == 1
    assert "--ui javascript:alert(1): must be an address such as" in capsys.readouterr().err


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_what_is_missing_and_why_is_reported(call):
    sweep = sweep_of(FEW, splits=(0, 1))
    for notation, split, status in (("L_MSE", 0, "FAILED"), ("L_MSE", 1, "missing"), ("H_KLD_WAug", 1, "KILLED")):
        sweep = with_status(sweep, notation, split, status)
    sweep = stored(sweep)
    failed = sweep.runs["fingerprint"] == fingerprint("L_MSE", 0)
    for tags in sweep.runs.loc[failed, "tags"]:
        tags[mirror.ERROR] = "no <loss>"
    _, page, _ = call(sweep, counts=True)
    check_document(page)
    assert "Not all is there: 3 of 6 finished, 1 failed, 1 not run, 1 interrupted." in page.text
    assert ["L_MSE", "1", "0", "not run", DASH, DASH] in [row[:6] for row in cells_of(page)]
    assert ["L_MSE, split 0, seed 0: no <loss>"] in page.rows
    assert f"{DASH} (failed: split 0; missing: split 1)" in itertools.chain.from_iterable(page.rows)


@pytest.mark.parametrize("notations", [("L_MSE",), ("Student",), ("Teacher", "Student", "L_MSE")])
@pytest.mark.parametrize("finished", [True, False])
def test_any_sweep_has_a_page(call, notations, finished):
    sweep = sweep_of(notations, splits=(0,))
    for notation in [] if finished else notations:
        sweep = with_status(sweep, notation, 0, "missing")
    code, page, _ = call(stored(sweep), draws=True)
    assert code == 0
    check_document(page)
    assert len(cells_of(page)) == len(notations)
    assert ("Not all is there" in page.text) != finished


def test_methods_alone_have_no_factors(call):
    sweep = sweep_of(("Student", "L_MSE", "H_KLD_WAug"), splits=(0,))
    names = sweep.runs["notation"].replace({"L_MSE": "CWD", "H_KLD_WAug": "AT_WAug"})
    code, page, _ = call(stored(sweep, notation=names), draws=True)
    assert code == 0
    check_document(page)
    assert "Which choice mattered" not in page.text


def test_what_cannot_be_made_leaves_the_rest(call, monkeypatch, capsys):
    def load(*_, **__):
        raise InputError(f"data.root={ROOT}: no <images> there")

    monkeypatch.setattr(examples, "load", load)
    code, page, _ = call(stored(sweep_of(("Teacher", "L_MSE"), splits=(0,))), "--with-images", draws=True)
    assert code == 0
    check_document(page)
    assert len(page.images("svg+xml")) == 2
    assert "is not here: its error names files; status and the command of this page show it." in page.text
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"kdsweep: figures: figure2 is not in the report: data.root={ROOT}: no <images> there"
    assert second.startswith("kdsweep: figures: pairs is not in the report: nothing to compare")


def test_a_mixed_sweep_still_shows_its_cells(call, capsys):
    sweep = stored(sweep_of(FEW, splits=(0,)), data=["busi", "udiat", "busi", "busi"])
    code, page, _ = call(sweep, counts=True)
    assert code == 0
    assert len(cells_of(page)) == 4
    assert page.text.count("sweep study mixes data=busi and data=udiat") == 6
    assert len(capsys.readouterr().err.splitlines()) == 6


def test_a_store_or_a_file_that_is_not_there_is_an_error(call, tmp_path, monkeypatch, capsys):
    assert cli.main(["report", "--store", str(tmp_path / "none")]) == 1
    assert "no mlflow.db in it" in capsys.readouterr().err
    (tmp_path / "out").write_text("a file")
    code, _, logged = call(stored(sweep_of(FEW, splits=(0,))))
    assert code == 1
    assert logged == []
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"^kdsweep: error: --out \S+r\.html: cannot write there", line)


# ---- privacy and escaping ------------------------------------------------------------------------------------------


def test_images_are_shown_only_where_they_may_be(call):
    real = stored(sweep_of(FEW, splits=(0,)))
    _, page, _ = call(real)
    assert page.images("png") == []
    assert "it shows images of the data set busi, which may be of patients" in page.text
    _, page, _ = call(real, "--with-images")
    assert len(page.images("png")) == 1
    assert "--with-images" in page.text
    phantoms = {"data.source._target_": report.PHANTOMS}
    _, page, _ = call(stored(sweep_of(FEW, splits=(0,)), params=phantoms, data="phantom"))
    assert len(page.images("png")) == 1
    _, page, _ = call(stored(sweep_of(FEW, splits=(0,)), data="phantom"))  # so named, but made of someone's files
    assert page.images("png") == []


def test_names_and_settings_are_text(call):
    name = '<script>alert("x")</script> id="y" & `z`'
    _, page, _ = call(replace(stored(sweep_of(FEW, splits=(0,)), device="<img src=http://x>"), name=name))
    check_document(page)
    assert f"Knowledge distillation sweep {name}" in page.text
    assert page.fact("Device").startswith("<img src=http://x>")
    assert page.text.count("<script>alert") >= 2
    assert all(b"<script" not in picture for picture in page.images("svg+xml"))
    assert """--sweep '<script>alert("x")</script> id="y" & `z`'""" in page.text


@pytest.mark.parametrize("error", ["no such file: /home/jane/x.png", r"C:\Users\jane\m.pt is bad", "n/a"])
def test_an_error_that_may_name_a_file_is_left_to_the_screen(error):
    assert report.shown_error(error) == "its error names files; status and the command of this page show it"
    assert report.shown_error("the loss is NaN in epoch 3") == "the loss is NaN in epoch 3"


# ---- settings, figures, costs --------------------------------------------------------------------------------------


def test_several_settings_are_reported_apart(call):
    sweep = stored(rates({"1": 0.0, "2": -0.01}, splits=(0,), notations=FEW))
    code, page, _ = call(sweep, counts=True)
    assert code == 0
    check_document(page)
    assert len(page.images("svg+xml")) == 6
    assert sum(label.endswith(", train.lr=2") for label in page.all("img", "alt")) == 3
    assert page.fact("Settings") == "train.lr=1; train.lr=2"
    assert page.fact("Learning rate") == "Student 1, 2, Teacher 0.0002"
    assert Counter(row[1] for row in cells_of(page)) == {"train.lr=1": 3, "train.lr=2": 3, DASH: 1}


def test_the_page_has_the_commands_of_the_sweep(call):
    typed = "python -m kdsweep -m path=L data.root=clinic"
    code, page, _ = call(stored(replace(sweep_of(FEW, splits=(0,)), commands=(typed,))))
    assert code == 0
    assert typed in page.text


def test_networks_are_measured_unless_reported_not_to(call, monkeypatch, capsys):
    sweep = stored(sweep_of(FEW, splits=(0,)))
    with monkeypatch.context() as patch:
        patch.setattr(costs, "measure", lambda *_, **__: {"parameters": 820_000.0})
        _, page, _ = call(sweep, costs=True)
    assert "Table 5. What the networks cost" in page.text
    assert ["Liang et al."] in [row[:1] for row in page.rows]
    assert capsys.readouterr().out.startswith("measuring networks for Table 5\n")
    _, page, _ = call(sweep)
    assert "Left out with --no-costs" in page.text
    assert "measuring" not in capsys.readouterr().out


def test_a_quick_check_says_so(call):
    banner = [("p", {"class": "banner", "role": "note"})]
    _, page, _ = call(stored(sweep_of(FEW, splits=(0,)), profile="quick"))
    assert [element for element in page.elements if element == banner[0]] == banner
    _, page, _ = call(stored(sweep_of(FEW, splits=(0,))))
    assert banner[0] not in page.elements


# ---- in a browser --------------------------------------------------------------------------------------------------


def in_browser(file, tmp_path):
    """Return the document that a page becomes once its scripts have run."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium or google-chrome on the PATH")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout


def with_script(script, tmp_path):
    """Write the report with one more script, which its policy allows here; return the file."""
    html = (tmp_path / "out" / "r.html").read_text(encoding="utf-8")
    html = html.replace("default-src 'none'", "script-src 'unsafe-inline'")
    file = tmp_path / "inside.html"
    file.write_text(html.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return file


@pytest.mark.slow
def test_nothing_overflows_in_a_browser(call, tmp_path):
    widths = (360, 1280)  # of a telephone and of a screen
    call(stored(rates({"1": 0.0, "2": -0.01}, splits=(0,))), "--with-images", draws=True)
    with_script(
        "onload = () => parent.postMessage([document.documentElement.scrollWidth, innerWidth].join(), '*')", tmp_path
    )
    outside = tmp_path / "outside.html"
    outside.write_text(
        "<!DOCTYPE html><p id=measured></p>"
        "<script>onmessage = e => document.getElementById('measured').textContent += e.data + ';'</script>"
        + "".join(f"<iframe src=inside.html style='border:0;width:{each}px;height:900px'></iframe>" for each in widths)
    )
    measured = re.search(r'id="measured">((?:\d+,\d+;)+)<', in_browser(outside, tmp_path))
    needed = {int(pair[1]): int(pair[0]) for pair in re.findall(r"(\d+),(\d+);", measured[1])}
    assert sorted(needed) == sorted(widths)
    assert all(needed[width] <= width for width in widths), needed


@pytest.mark.slow
@pytest.mark.parametrize(("heading", "column"), [("Model", 0), ("Dice (%)", 4)])
def test_a_click_on_a_heading_sorts_and_gaps_come_last(call, tmp_path, heading, column):
    call(stored(with_status(sweep_of(splits=(0, 1)), "L_MSE", 1, "missing")))
    click = f"[...document.querySelectorAll('thead button')].filter(b => b.textContent === '{heading}').at(-1).click()"
    clicked = []
    for times in (1, 2):
        page = Page(in_browser(with_script("; ".join([click] * times), tmp_path), tmp_path))
        clicked.append([row[column] for row in cells_of(page) if row[column] != DASH])
        assert (page.all("th", "aria-sort").count(("ascending", "descending")[times - 1]), len(clicked[0])) > (0, 20)
        if column:
            assert cells_of(page)[-1][column] == DASH
    order = float if column else (lambda name: name.lower())
    assert clicked == [sorted(clicked[0], key=order), sorted(clicked[0], key=order, reverse=True)]


def test_the_number_of_images_is_that_of_all_parts_of_a_split():
    sweep = stored(sweep_of(("Student",), splits=(0,)))
    tags = [{**tags, "kdsweep.split_images": "3/1/2"} for tags in sweep.runs["tags"]]
    assert summary.summarize(replace(sweep, runs=sweep.runs.assign(tags=tags)))["Images"] == "6"
    assert summary.summarize(sweep)["Images"] == "\N{EN DASH}"
