"""What the benches found: rows, tables as text, results/<cpu>.json, and plots and tables in docs/.

A run of some of the benches replaces their rows and leaves the others as they were measured.
"""

from __future__ import annotations

import functools
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import cpuinfo
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator

import peers
from rayfuse import backend

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"


@dataclass
class Row:
    """One contender in one column of one table. None: does not apply, or was not measured."""

    op: str
    table: str
    column: str
    contender: str
    ms: float | None = None
    gb_per_s: float | None = None
    times_limit: float | None = None
    streaming_gb_per_s: float | None = None
    memory_mb: float | None = None
    error: float | None = None
    agrees: bool | None = None
    first_call_s: float | None = None
    note: str | None = None
    commit: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
            if value is not None
        }


_rows: list[Row] = []
# op -> its page under docs/
pages: dict[str, str] = {}
# one for all instead (`--page`), with the rows beside it
own_page: Path | None = None


def add(row: Row) -> None:
    row.commit = _commit()
    _rows.append(row)


def finish() -> Iterator[str]:
    """Write everything down; yields the lines of the tables that this run has touched."""
    if not _rows:
        return
    path = own_page.with_suffix(".json") if own_page else RESULTS / f"{_file_name()}.json"
    stored = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {_key(row): row for row in [*(Row(**row) for row in stored), *_rows]}
    # a run of everything settles the order, a run of some keeps it
    everything = {_key(row) for row in _rows} >= {*merged}
    rows = _in_order(_rows if everything else merged.values())
    path.parent.mkdir(exist_ok=True)
    # a row to a line, so that a diff shows what changed
    lines = ",\n".join(json.dumps(row.as_dict(), ensure_ascii=False) for row in rows)
    path.write_text(f'{{"environment": {json.dumps(environment())},\n"rows": [\n{lines}\n]}}\n')

    touched = {(row.op, row.table) for row in _rows}
    ran = {op for op, _ in touched}
    whole: list[str] = []
    for op, of_op in groupby(rows, lambda row: row.op):
        into_docs = op in ran and not own_page
        page: list[str] = []
        for title, group in groupby(of_op, lambda row: row.table):
            table = Table(title, [*group])
            text = table.lines()
            if (op, title) in touched:
                yield from ("", f"{op}: {title}", *text)
            plot = f"{op}_{re.sub(r'[^a-zA-Z]+', '_', title.partition(',')[0])}.svg"
            if into_docs and table.plot(ROOT / "docs" / plot):
                text = [*text, "", f"![{title}]({plot})"]
            page += [f"### {title[0].upper()}{title[1:]}", "", *text, ""]
        whole += [f"## `{op}`", "", *page]
        if op in pages and into_docs:
            _insert(ROOT / "docs" / f"{pages[op]}.md", op, page)
    if own_page:
        own_page.write_text("\n".join([f"Measured on: {_used()}.", "", *whole]))
    yield from ("", f"written: {path}, and {own_page or 'docs/'}")


def _insert(page: Path, op: str, lines: list[str]) -> None:
    """Replace what lies between an op's marks on a page, which it gets at the end."""
    begin, end = f"<!-- bench: {op} -->", f"<!-- end: {op} -->"
    text = page.read_text()
    if begin not in text:
        text = f"{text.rstrip()}\n\n## `{op}`, measured\n\n{begin}{end}\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    measured = f"Measured on: {_used()}."
    page.write_text("\n".join([head + begin, measured, "", *lines[:-1], end + tail]))


def _used() -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in environment().items())


def _key(row: Row) -> tuple[str, ...]:
    return row.op, row.table, row.column, row.contender


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """Those of an op together, and those of a table, in the order in which they were first seen."""
    rows = [*rows]
    ops = [*dict.fromkeys(row.op for row in rows)]
    tables = [*dict.fromkeys((row.op, row.table) for row in rows)]
    return sorted(rows, key=lambda row: (ops.index(row.op), tables.index((row.op, row.table))))


@functools.cache
def _commit() -> str:
    command = ["git", "log", "-1", "--format=%h"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@functools.cache
def environment() -> dict[str, object]:
    device = torch.get_device_module(peers.device)
    gpu = {"gpu": device.get_device_name()} if hasattr(device, "get_device_name") else {}
    return dict(
        **gpu,
        cpu=cpuinfo.get_cpu_info()["brand_raw"],
        threads=torch.get_num_threads(),
        instruction_set=backend.isa(),
        torch=torch.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
    )


def _file_name() -> str:
    """Of the processor; many have the same name, and their instruction sets differ."""
    words = [*str(environment()["cpu"]).lower().split(), str(environment()["instruction_set"])]
    return "-".join(words) + f"-{environment()['threads']}-threads"


class Table:
    """One title's rows: contenders down, columns across."""

    def __init__(self, title: str, rows: Sequence[Row]) -> None:
        self.title = title
        self.columns = [*dict.fromkeys(row.column for row in rows)]
        self.contenders = [*dict.fromkeys(row.contender for row in rows)]
        self.at = {(row.contender, row.column): row for row in rows}

    def lines(self) -> list[str]:
        if self.title == "call overhead":
            return self._overhead()
        if not any(row.ms for row in self.at.values()):
            return self._errors()
        return self._growth() if self.title.startswith("growth") else self._speed()

    def _speed(self) -> list[str]:
        own = [self.at["rayfuse", column] for column in self.columns]
        cells = [
            ["time, extra MB", *self.columns],
            ["**rayfuse**, ms", *(f"{row.ms:.3g} {row.memory_mb:4.1f}" for row in own)],
            [
                "GB/s (of stream)",
                *(f"{row.gb_per_s:.0f} ({row.streaming_gb_per_s:.0f})" for row in own),
            ],
            ["x stream limit", *(f"{row.times_limit:.2f}" for row in own)],
        ]
        notes: dict[str, list[str]] = {}
        for name in self.contenders:
            line = [name]
            for column in self.columns:
                row = self.at.get((name, column))
                if row is None or row.ms is None:
                    line.append("-")
                    if row is not None:
                        notes.setdefault(f"{name} not run, {row.note}", []).append(column)
                    continue
                ratio = row.ms / self.at["rayfuse", column].ms
                digits = 0 if ratio >= 99.5 else 1 if ratio >= 9.95 else 2
                mark = "" if row.agrees else "!"
                line.append(f"{ratio:.{digits}f} x{mark} {row.memory_mb:4.0f}")
                if not row.agrees:
                    notes.setdefault(f"! {name} is off by {row.error:.0e}", []).append(column)
            if name != "rayfuse":
                cells.append(line)
        return _aligned(cells) + _notes(notes, self.columns)

    def _growth(self) -> list[str]:
        cells = [["ms, extra MB", *self.columns, "time ~", "memory ~"]]
        for name in self.contenders:
            rows = [self.at.get((name, column)) for column in self.columns]
            there = [row for row in rows if row]
            sizes = [float(row.column) for row in there]
            cells.append(
                [
                    name,
                    *(f"{row.ms:.3g} {row.memory_mb:6.1f}" if row else "-" for row in rows),
                    *(
                        f"^{_exponent(sizes, [getattr(row, what) for row in there]):.2f}"
                        for what in ("ms", "memory_mb")
                    ),
                ]
            )
        return _aligned(cells)

    def _overhead(self) -> list[str]:
        cells = [["microseconds", *self.columns]]
        for name in self.contenders:
            rows = (self.at[name, column] for column in self.columns)
            sign = "" if name == "raw kernel" else "+"
            cells.append([name, *(f"{sign}{row.ms * 1e3:.1f}" for row in rows)])
        return _aligned(cells)

    def _errors(self) -> list[str]:
        cells = [["largest relative error", *self.columns]]
        for name in self.contenders:
            cells.append([name, *(f"{self.at[name, column].error:.1e}" for column in self.columns)])
        return _aligned(cells)

    def plot(self, path: Path) -> bool:
        """Draw the table, if it is one that a plot makes clearer."""
        if self.title == "call overhead" or not any(row.ms for row in self.at.values()):
            return False
        with plt.rc_context(_STYLE):
            growth = self.title.startswith("growth")
            figure = self._growth_figure() if growth else self._speed_figure()
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        return True

    def _speed_figure(self) -> plt.Figure:
        figure, axes = plt.subplots(figsize=(8, 0.62 * len(self.columns) + 1.2))
        height = np.arange(len(self.columns))[::-1]
        limits = [row.ms / row.times_limit for row in (self.at["rayfuse", c] for c in self.columns)]
        axes.scatter(limits, height, marker="|", s=420, color=_INK, label="streaming limit")
        for name in self.contenders:
            rows = [self.at.get((name, column)) for column in self.columns]
            there = [(row.ms, y) for row, y in zip(rows, height, strict=True) if row and row.ms]
            if there:
                axes.scatter(*zip(*there, strict=True), label=name, **_mark(name))
        axes.set(xscale="log", xlabel="ms", yticks=height, yticklabels=self.columns)
        axes.set_ylim(-0.6, len(self.columns) - 0.4)
        # as numbers, and few: powers of ten run into each other where all lie in one decade
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.grid(axis="x")
        axes.set_title(self.title, loc="left")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        return figure

    def _growth_figure(self) -> plt.Figure:
        letter = self.title.removeprefix("growth with ").split(",")[0]
        figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
        for axes, what, unit in zip(panels, ("ms", "memory_mb"), ("ms", "extra MB"), strict=True):
            for name in self.contenders:
                rows = [self.at.get((name, column)) for column in self.columns]
                points = [(float(row.column), getattr(row, what)) for row in rows if row]
                axes.plot(*zip(*points, strict=True), label=name, **_mark(name, line=True))
            axes.set(xscale="log", yscale="log", xlabel=letter, ylabel=unit)
            ticks = [float(column) for column in self.columns]
            axes.set_xticks(ticks, self.columns)
            axes.minorticks_off()
            axes.grid()
        panels[0].legend()
        figure.suptitle(self.title, x=0.01, ha="left", fontsize=10)
        return figure


def _exponent(sizes: Sequence[float], measured: Sequence[float]) -> float:
    """p of the power law measured ~ sizes ** p that fits best."""
    return float(np.polyfit(np.log(sizes), np.log(measured), 1)[0])


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table that reads as plain text, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(
            f"{cell:{'<' if i == 0 else '>'}{width}}"
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in cells
    ]
    rule = (
        "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    )
    return [lines[0], rule, *lines[1:]]


def _notes(notes: dict[str, list[str]], columns: Sequence[str]) -> list[str]:
    return [
        f"- {note}" + ("" if len(where) == len(columns) else f" ({', '.join(where)})")
        for note, where in notes.items()
    ]


# one grey that is read on white and on black
_INK = "#808890"
_STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.transparent": True,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "legend.frameon": False,
    "svg.hashsalt": "rayfuse",
}
# Okabe and Ito without black and yellow, and a grey; contenders are told apart by shape as well
_COLOURS = ("#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
_SHAPES = "os^Dv<>Pp"


def _mark(name: str, line: bool = False) -> dict[str, object]:
    """How a contender is drawn, the same in every plot."""
    if name == "rayfuse":
        look = dict(color="#d55e00", marker="*", zorder=3)
    else:
        place = _PLACES.setdefault(name, len(_PLACES))
        look = dict(color=_COLOURS[place % len(_COLOURS)], marker=_SHAPES[place % len(_SHAPES)])
    size = (
        {"markersize": 9 if name == "rayfuse" else 5}
        if line
        else {"s": 110 if name == "rayfuse" else 32}
    )
    return look | size


_PLACES: dict[str, int] = {}
