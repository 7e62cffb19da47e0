"""A table as data (numbers, columns, sentences, notes) and how it is written: screen, Markdown, CSV, LaTeX, HTML."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from pandas.api.types import is_numeric_dtype

from kdsweep.results.formats import DASH, interval, number, or_gap, p, with_interval

MARK = "*"  # behind the name of the best cell
LEAST = 8  # characters of a column that is wrapped
GAP = 2  # blanks between columns, which tabulate adds to a heading too
LONG = 24  # characters of a cell that may be wrapped in HTML
HTML = jinja2.Environment(autoescape=True, trim_blocks=True).from_string("""\
<table>
<caption class="unseen">{{ caption }}</caption>
<thead><tr>{% for heading, kind in heads -%}
<th scope="col"{{ {"class": kind}|xmlattr }}>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr{{ {"class": "best" if loop.index0 == best else none}|xmlattr }}>{% for tag, attributes, text in row -%}
<{{ tag }}{{ attributes|xmlattr }}>{{ text }}</{{ tag }}>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>""")


@dataclass(frozen=True)
class Options:
    """The user's choices for tables."""

    store: Path  # folder of the runs
    test: str = "ttest"  # of ``stats.TESTS``
    uri: str | None = None  # of the MLflow server or database; None for the file in the store
    margin_points: float | None = None  # of non-inferiority; None for the sweep's


@dataclass(frozen=True)
class Column:
    """A column of strings."""

    key: str | tuple[str, ...]  # column of the frame, or several; a frame without them has no such column
    heading: str
    format: Callable[..., str] = str  # makes the string of the values of key
    narrow: bool = False  # whether it is in the narrow view, on the screen
    full: bool = True  # whether it is in the files and the full view
    needs: str = ""  # column of the frame; if that has no value, this column is left out

    @property
    def keys(self) -> tuple[str, ...]:
        """Return the columns of the frame that it shows."""
        return (self.key,) if isinstance(self.key, str) else self.key

    def is_shown(self, frame: pd.DataFrame, *, narrow: bool) -> bool:
        """Return whether a view of a frame has this column."""
        there = set(self.keys) <= set(frame) and (not self.needs or frame[self.needs].notna().any())
        return bool(there and (self.narrow if narrow else self.full))

    def strings(self, frame: pd.DataFrame) -> list[str]:
        """Return the strings, one a row."""
        return [self.format(*values) for values in zip(*(frame[key] for key in self.keys), strict=True)]

    def is_numeric(self, frame: pd.DataFrame) -> bool:
        """Return whether it shows numbers, which are aligned on the right."""
        return all(is_numeric_dtype(frame[key]) for key in self.keys if key != "gap")


SETTINGS = Column("settings", "Settings", narrow=True)
MODEL = Column("notation", "Model", narrow=True)


def estimate(key: str, heading: str, **options: Any) -> Column:
    """Return a column of a number with two decimals, or the reason for its gap."""
    return Column((key, "gap"), heading, or_gap(number), **options)


def differences(change: Column, *, brief: str, prefix: str = "") -> list[Column]:
    """Return the columns of paired differences: in the narrow view mean, interval and corrected p.

    Args:
        change: the column of the differences in the full view; intervals and p of both questions follow.
        brief: heading of mean and interval in the narrow view.
        prefix: of the frame's columns, which are those of ``stats.compare`` and ``stats.adjusted``.
    """
    networks, methods = (tuple(f"{prefix}{part}{end}_points" for end in ("low", "high")) for part in ("", "methods_"))
    narrow = partial(Column, narrow=True, full=False)
    return [
        narrow((f"{prefix}difference_points", *networks), brief, with_interval),
        narrow(f"{prefix}p_holm", "p (Holm)", p),
        narrow(f"{prefix}p_methods_holm", "p methods", p, needs=f"{prefix}p_methods_holm"),
        change,
        Column(networks, "networks: 95 % interval", interval),
        *p_values(prefix),
        Column(methods, "methods: 95 % interval", interval, needs=f"{prefix}p_methods"),
        Column("n_images", "n images", partial(number, form="d")),
    ]


def p_values(prefix: str, *, of: str = "") -> list[Column]:
    """Return the columns of p-values, those of methods where there are several seeds; headings begin with ``of``."""
    names = {"p_methods": "methods: p", "p_methods_holm": "methods: p (Holm)", "p_runs": "methods: p (Nadeau-Bengio)"}
    return [
        Column(f"{prefix}p", f"{of}networks: p", p),
        Column(f"{prefix}p_holm", f"{of}networks: p (Holm)", p),
        *(Column(prefix + key, of + heading, p, needs=prefix + key) for key, heading in names.items()),
    ]


@dataclass(frozen=True)
class Table:
    """A table."""

    heading: str  # such as ``Table 3. The distillation experiments``
    frame: pd.DataFrame  # the numbers; a column gap with the reason why a row has none
    columns: Sequence[Column]
    lead: Sequence[str] = ()  # sentences on what the numbers support
    notes: Sequence[str] = ()  # what the numbers are; each begins with its subject and a colon
    best: int | None = None  # the position of the row that is marked

    def shown(self, *, narrow: bool = False) -> list[Column]:
        """Return the columns of the full or the narrow view."""
        return [column for column in self.columns if column.is_shown(self.frame, narrow=narrow)]

    def text(self, *, narrow: bool = False) -> pd.DataFrame:
        """Return the strings of the full or the narrow view."""
        return pd.DataFrame({column.heading: column.strings(self.frame) for column in self.shown(narrow=narrow)})

    @property
    def _sentences(self) -> list[str]:
        """Return lead sentences and notes, each once."""
        return list(dict.fromkeys((*self.lead, *self.notes)))

    def markdown(self, title: str) -> str:
        """Return a title line, the full table, sentences and notes."""
        body = self.text().to_markdown(index=False, disable_numparse=True)
        return "\n".join([title, "", body, "", *(f"- {line}" for line in self._sentences), ""])

    def latex(self, title: str) -> str:
        """Return a table environment for a document with the booktabs package, sentences and notes as lines below."""
        body = self.text().map(_tex).rename(columns=_tex).to_latex(index=False, escape=False).rstrip()
        lines = ["% needs \\usepackage{booktabs}", r"\begin{table}", rf"\caption{{{_tex(title)}}}", body]
        below = [rf"\par\footnotesize {_tex(line)}" for line in self._sentences]
        return "\n".join([*lines, *below, r"\end{table}", ""])

    def screen(self, title: str, *, width: int, wide: bool = False, last: Sequence[str] = ()) -> str:
        """Return title, table, sentences and last lines for a terminal of this many characters a line.

        The narrow view and all sentences keep to its width; the full view (``wide``) is as wide as it is.
        """
        columns = self.shown(narrow=not wide)
        names, cells = [column.heading for column in columns], [column.strings(self.frame) for column in columns]
        if self.best is not None:
            cells[names.index(MODEL.heading)][self.best] += f" {MARK}"
        words = [max(map(len, name.split())) + GAP for name in names]
        widths = [max(word, *map(len, strings)) for word, strings in zip(words, cells, strict=True)]
        while not wide and sum(widths) + GAP * (len(widths) - 1) > width and max(widths) > LEAST:
            widths[widths.index(max(widths))] -= 1  # the widest columns are wrapped
        body = pd.DataFrame(zip(*cells, strict=True)).to_markdown(
            index=False,
            headers=["\n".join(textwrap.wrap(name, size - GAP)) for name, size in zip(names, widths, strict=True)],
            tablefmt="simple",
            disable_numparse=True,
            colalign=["right" if column.is_numeric(self.frame) else "left" for column in columns],
            maxcolwidths=widths,
        )
        sentences = "\n".join(textwrap.fill(line, width) for line in self.lead)
        below = "\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in last)
        return "\n\n".join(part for part in (title, body, sentences, below) if part) + "\n"

    def subjects(self) -> str:
        """Return what the notes are about, such as ``Networks, Methods, Holm``."""
        heads = [note.partition(":")[0].partition(",")[0] for note in self.notes if ":" in note]
        return ", ".join(dict.fromkeys(head for head in heads if len(head) <= 30))

    def html(self) -> str:
        """Return a table element; the best row has the class best, cells of numbers their exact value as data-value."""
        columns = self.shown()
        named = next((column for column in columns if column.heading in ("Model", "Notation", "Effect")), columns[0])
        cells = [self._html_cells(column, tag="th" if column is named else "td") for column in columns]
        heads = [(column.heading, "number" if column.is_numeric(self.frame) else None) for column in columns]
        return HTML.render(caption=self.heading, heads=heads, rows=zip(*cells, strict=True), best=self.best)

    def _html_cells(self, column: Column, *, tag: str) -> list[tuple[str, dict[str, Any], str]]:
        """Return tag, attributes and text of each cell; of several numbers in a cell the value is the first."""
        strings, values = column.strings(self.frame), self.frame[column.keys[0]]
        if tag == "th" or not column.is_numeric(self.frame):
            return [(tag, {"scope": "row" if tag == "th" else None}, string) for string in strings]
        kinds = ["number long" if len(string) > LONG else "number" for string in strings]
        exact = [None if pd.isna(value) else value for value in values]
        attributes = [{"class": kind, "data-value": value} for kind, value in zip(kinds, exact, strict=True)]
        return [(tag, *each) for each in zip(attributes, strings, strict=True)]


def _tex(string: str) -> str:
    escaped = re.sub(r"([_%&#$])", r"\\\1", string)
    for sign, symbol in {"±": r"$\pm$", DASH: "--", "<": "$<$", "`": ""}.items():
        escaped = escaped.replace(sign, symbol)
    return escaped
