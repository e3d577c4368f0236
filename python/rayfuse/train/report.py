"""The report of a training run: one HTML page that needs no other file.

Everything is read from the run directory. A file or value that is missing, cut short or not finite
costs one sentence in the page, never the page.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import shlex
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image

MAX_VIEWS = 8
MAX_IMAGE_SIDE = 720
# base64 adds a third: 4.5 MB of images and the plots stay under 8 MB of page
MAX_IMAGE_BYTES = 4_500_000
MAX_POINTS = 500
MAX_METRICS = 6
SERIES = 8
NONE = "\N{EN DASH}"
DASHES = ["solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))]
LEGEND_LINES = ["solid", "dashed", "dotted", "double"]

# matplotlib draws in these; the page swaps them for its own variables, so that a plot follows the
# light or dark scheme of the reader
_TEXT, _GRID, _INK = "#010101", "#020202", "#030303"
_THEME = {_TEXT: "var(--muted)", _GRID: "var(--line)", _INK: "var(--ink)"}
_THEME |= {f"#0a0a{i:02x}": f"var(--series-{i})" for i in range(SERIES)}

IMAGES = {
    "photo": "Photo",
    "render": "Render",
    "error": "Error",
    "depth": "Depth",
    "accumulation": "Accumulation",
    "normal": "Normals, from density",
    "predicted_normal": "Normals, predicted",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` from the files of a training run.

    Args:
        run_dir: directory with config.json, metrics.jsonl, evaluation.json, profile.json and the
            images that evaluation.json names; any of them may be missing.

    Returns:
        Path of the page. It holds its images and plots, asks for nothing over a network and
        needs no JavaScript.
    """
    run_dir = Path(run_dir)
    notes: list[str] = []
    config = _read_json(run_dir / "config.json", notes, "the set-up is not shown")
    evaluation = _read_json(run_dir / "evaluation.json", notes, "there are no held-out figures")
    profile = _read_json(run_dir / "profile.json", notes, "the time of a step is not shown")
    comparison = {}
    if config.get("compare_steps"):
        consequence = "reference and fused kernels are not compared"
        comparison = _read_json(run_dir / "compare.json", notes, consequence)
    log = _Log.read(run_dir / "metrics.jsonl", notes)

    def part(name: str, build: Callable[..., Any], *args: Any) -> Any:
        try:
            return build(*args)
        except Exception as error:  # a broken figure must not cost the page, nor the run behind it
            notes.append(f"{name} could not be shown: {type(error).__name__}: {error}")
            return None

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        scene=str(evaluation.get("scene") or run_dir.resolve().name),
        headline=part("The headline", _headline, evaluation, profile, log) or {},
        views=part("The held-out views", _views, run_dir, evaluation) or {},
        table=part("The table of views", _view_table, evaluation),
        losses=part("The losses", _losses, log),
        progress=part("The progress", _progress, log, evaluation),
        profile=part("The time of a step", _profile, profile),
        comparison=part("The comparison with the reference", _comparison, comparison),
        setup=part("The set-up", _setup, config) or {},
        resumed=", ".join(f"{step:,.0f}" for step in log.resumed),
        notes=notes,
        series=range(SERIES),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


# ---- reading


def _read_json(path: Path, notes: list[str], consequence: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: {consequence}.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read ({error}): {consequence}.")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path.name} must hold a JSON object: {consequence}.")
        return {}
    return value


@dataclass
class _Log:
    """The logged steps in order: a resumed run replaces what it trained again."""

    records: list[dict[str, Any]] = field(default_factory=list)
    step: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    resumed: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path, notes: list[str]) -> _Log:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            notes.append(f"{path.name} is missing: there are no curves.")
            return cls()
        log, broken = cls(), 0
        steps: list[float] = []
        seconds: list[float] = []
        before = 0.0
        for line in filter(str.strip, lines):
            try:
                record = json.loads(line)
                step, at = float(record["step"]), _number(record.get("seconds"))
            except (ValueError, TypeError, KeyError):
                broken += 1
                continue
            rewound = False
            while steps and steps[-1] >= step:
                for column in (log.records, steps, seconds):
                    column.pop()
                rewound = True
            # a clock that starts again goes on from the last kept step
            restarted = bool(seconds) and before + at < seconds[-1]
            if restarted:
                before = seconds[-1]
            if rewound or restarted:
                log.resumed.append(step)
            log.records.append(record)
            steps.append(step)
            seconds.append(before + at)
        if broken:
            notes.append(f"{path.name}: {_count(broken, 'line')} could not be read, left out.")
        if not log.records:
            notes.append(f"{path.name} holds no step: there are no curves.")
        log.step, log.seconds = np.array(steps), np.array(seconds)
        return log

    def names(self, group: str) -> list[str]:
        return list(dict.fromkeys(name for r in self.records for name in r.get(group) or {}))

    def column(self, group: str, name: str) -> np.ndarray:
        return np.array([_number((r.get(group) or {}).get(name)) for r in self.records])

    def gaps(self, group: str, name: str) -> list[float]:
        """Steps at which the value was logged and was not finite."""
        return [
            step
            for step, r in zip(self.step, self.records, strict=True)
            if name in (r.get(group) or {}) and not math.isfinite(_number(r[group][name]))
        ]


# ---- the parts of the page


def _headline(evaluation: dict, profile: dict, log: _Log) -> dict:
    psnr, baseline = _number(evaluation.get("psnr")), evaluation.get("baseline") or {}
    gain = psnr - _number(baseline.get("psnr"))
    held_out = "pixels" if evaluation.get("held_out") == "pixels" else "views"
    steps = _number(evaluation.get("steps", log.step[-1] if len(log.step) else None))
    spent = {k: _number(v) for k, v in (evaluation.get("seconds") or {}).items()}
    total = sum(v for v in spent.values() if math.isfinite(v)) if spent else math.nan

    tiles = []
    if evaluation:
        against = ""
        if math.isfinite(gain):
            sign = "above" if gain >= 0 else "below"
            against = f"{_fixed(abs(gain))} dB {sign} the baseline"
        tiles.append(("PSNR, held out", _fixed(psnr), "dB", against))
        if evaluation.get("ssim") is not None:
            tiles.append(("SSIM, held out", _fixed(evaluation["ssim"], 3), "", ""))
        if baseline:
            name = str(baseline.get("name") or "")
            tiles.append(("Baseline PSNR", _fixed(baseline.get("psnr")), "dB", name))
    if math.isfinite(total):
        tiles.append(("Time", _duration(total), "", _stages(spent)))
    if math.isfinite(steps):
        step_ms = _number(profile.get("step_ms"))
        pace = f"{_fixed(step_ms, 1)} ms per step" if math.isfinite(step_ms) else ""
        tiles.append(("Steps", f"{steps:,.0f}", "", pace))
    if "gaussians" in evaluation:
        tiles.append(("Gaussians", f"{_number(evaluation['gaussians']):,.0f}", "", ""))
    if "parameters" in evaluation:
        count = _number(evaluation["parameters"])
        tiles.append(("Parameters", *_scaled(count), f"{count:,.0f}" if count >= 1e6 else ""))
    if "peak_memory_mb" in evaluation:
        memory = _number(evaluation["peak_memory_mb"])
        size = (_fixed(memory / 1024), "GiB") if memory >= 1024 else (_fixed(memory, 0), "MiB")
        tiles.append(("Peak memory", *size, ""))

    sentence = ""
    if math.isfinite(psnr):
        sentence = f"{_fixed(psnr)} dB on held-out {held_out}"
        if math.isfinite(steps):
            sentence += f" after {steps:,.0f} steps"
        train = spent.get("train", math.nan)
        if math.isfinite(train):
            sentence += f" and {_duration(train)} of training"
    return {"tiles": tiles, "sentence": sentence, "held_out": held_out}


def _views(run_dir: Path, evaluation: dict) -> dict:
    views = evaluation.get("views") or []
    shown: list[tuple[int, dict]] = []
    missing: list[str] = []
    left = MAX_IMAGE_BYTES
    for index in _spread([_number(view.get("psnr")) for view in views], MAX_VIEWS):
        view = views[index]
        encoded, ratio = [], 1.5
        named = view.get("images") or {}
        for key in [*IMAGES, *(key for key in named if key not in IMAGES)]:
            if not named.get(key):
                continue
            try:
                data, ratio = _encode(run_dir / named[key])
            except (OSError, ValueError) as error:
                missing.append(f"{named[key]} ({type(error).__name__})")
                continue
            encoded.append((key, data))
        size = sum(len(data) for _, data in encoded)
        if not encoded or (shown and size > left):
            continue
        left -= size
        name = str(view.get("name", index))
        images = [
            {
                "label": _image_label(key),
                "range": str((view.get("ranges") or {}).get(key, "")),
                "alt": f"{_image_label(key)} of held-out view {name}",
                "uri": "data:image/webp;base64," + base64.b64encode(data).decode(),
            }
            for key, data in encoded
        ]
        shape = "portrait" if ratio < 1 else "landscape"
        figures = _figures(view)
        shown.append((index, {"name": name, "shape": shape, "images": images, **figures}))
    shown.sort(key=lambda pair: pair[0])
    notes = []
    if not views and evaluation:
        notes.append("The run held out no view, so there is nothing to compare.")
    if shown and len(shown) < len(views):
        notes.append(
            f"{len(shown)} of {len(views):,} held-out views are shown, spread evenly from the "
            "lowest PSNR to the highest; the table below has them all."
        )
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        notes.append(f"Could not be read: {', '.join(missing[:3])}{more}.")
    named = {key for view in views for key in view.get("images") or {}}
    return {
        "shown": [view for _, view in shown],
        "notes": notes,
        "normals": "normal" in named,
        "features": any(key not in IMAGES for key in named),
    }


def _view_table(evaluation: dict) -> list[dict] | None:
    views = evaluation.get("views") or []
    return [{"name": str(v.get("name", i)), **_figures(v)} for i, v in enumerate(views)]


def _figures(view: dict) -> dict:
    ssim = view.get("ssim")
    return {
        "psnr": _fixed(view.get("psnr")),
        "ssim": None if ssim is None else _fixed(ssim, 3),
    }


def _losses(log: _Log) -> dict | None:
    terms = log.names("losses")
    if not terms:
        return None
    weighted = {name: log.column("weighted", name) for name in terms}
    weights = {name: log.column("weights", name) for name in terms}
    last = {name: _last_mean(weighted[name]) for name in terms}
    # a share is one of what the terms add to the loss, so a NaN term does not hide the others
    whole = sum(abs(v) for v in last.values() if math.isfinite(v))
    rows = [
        {
            "name": name,
            "weight": _short(_last(weights[name])),
            "loss": _short(_last_mean(log.column("losses", name))),
            "weighted": _short(last[name]),
            "share": _percent(abs(last[name]), whole),
            "bar": _share(abs(last[name]), whole),
        }
        for name in terms
    ]
    unweighted = {name: log.column("losses", name) for name in terms}
    notes = []
    for name in terms:
        gaps = log.gaps("losses", name)
        if gaps:
            steps = _count(len(gaps), "logged step")
            notes.append(f"{name} was not finite at {steps}, first at step {gaps[0]:,.0f}.")
        elif not np.any(unweighted[name] > 0):
            notes.append(f"{name} was never above zero, so a log scale has no line for it.")
    plots = [
        _plot("Unweighted", log, log.step, unweighted, scale="log"),
        _plot("Weighted, as summed into the loss", log, log.step, weighted, scale="log"),
    ]
    return {"terms": rows, "plots": plots, "notes": notes, "legend": _legend(terms)}


def _progress(log: _Log, evaluation: dict) -> dict | None:
    if not log.records:
        return None
    plots = []
    psnr = log.column("metrics", "psnr")
    if np.isfinite(psnr).any():
        levels = {"held out, at the end": _number(evaluation.get("psnr"))}
        if baseline := evaluation.get("baseline"):
            levels[str(baseline.get("name") or "baseline")] = _number(baseline.get("psnr"))
        levels = {name: level for name, level in levels.items() if math.isfinite(level)}
        curve = {"training rays": psnr}
        plots.append(_plot("PSNR over steps (dB)", log, log.step, curve, levels=levels))
        if np.isfinite(log.seconds).any():
            plots.append(_plot("PSNR over time (dB)", log, log.seconds, curve, levels=levels))
        for plot in plots:
            plot["legend"] = _legend(curve, levels)
    rates = {name: log.column("lr", name) for name in log.names("lr")}
    if rates:
        plot = _plot("Learning rate", log, log.step, rates, scale="log", smooth=False)
        plots.append(plot | {"legend": _legend(rates)})
    weights = {name: log.column("weights", name) for name in log.names("weights")}
    if any(len(np.unique(weight[np.isfinite(weight)])) > 1 for weight in weights.values()):
        plot = _plot("Weights of the losses", log, log.step, weights, scale="log", smooth=False)
        plots.append(plot | {"legend": _legend(weights)})
    others = [name for name in log.names("metrics") if name != "psnr"]
    plots += [
        _plot(_label(name), log, log.step, {name: log.column("metrics", name)})
        for name in others[:MAX_METRICS]
    ]
    notes = []
    if len(others) > MAX_METRICS:
        notes.append(f"Left out, and in metrics.jsonl: {', '.join(others[MAX_METRICS:])}.")
    return {"plots": plots, "notes": notes}


def _profile(profile: dict) -> dict | None:
    if not profile:
        return None

    def row(entry: dict, whole: float) -> dict:
        forward, backward = (_number(entry.get(f"{way}_ms")) for way in ("forward", "backward"))
        both = sum(v for v in (forward, backward) if math.isfinite(v))
        return {
            "name": str(entry.get("name") or entry.get("op") or ""),
            "backend": entry.get("backend"),
            "forward": _fixed(entry.get("forward_ms")),
            "backward": _fixed(entry.get("backward_ms")),
            "both": _fixed(both),
            "share": _percent(both, whole),
            "ms": (forward, backward, both),
        }

    def with_bars(rows: list[dict]) -> list[dict]:
        # the longest bar fills its column, or those of fast ops could not be told apart
        longest = max((entry["ms"][2] for entry in rows), default=0)
        return [r | {"bars": [_share(part, longest) for part in r["ms"][:2]]} for r in rows]

    parts, ops = profile.get("parts") or [], profile.get("ops") or []
    added = sum(row(entry, 1)["ms"][2] for entry in parts)
    step_ms = _number(profile.get("step_ms"))
    notes = []
    if not math.isfinite(step_ms):
        step_ms = added
    elif added > 1.02 * step_ms:
        notes.append(
            f"The parts add up to {_fixed(added, 1)} ms, more than the step of "
            f"{_fixed(step_ms, 1)} ms: timing each part costs time. Shares are of the sum."
        )
    whole = max(step_ms, added)
    part_rows = [row(entry, whole) for entry in parts]
    rest = whole - added
    if part_rows and rest > 0.01 * whole:
        part_rows.append(row({"name": "everything else", "forward_ms": rest}, whole))
    return {
        "step_ms": _fixed(step_ms, 1),
        "notes": notes,
        "parts": with_bars(part_rows),
        "ops": with_bars(sorted((row(e, whole) for e in ops), key=lambda r: -r["ms"][2])),
    }


def _comparison(comparison: dict) -> dict | None:
    """Both sides of compare.json: curves, largest differences, time and memory."""
    if not comparison:
        return None
    sides = ("reference", "fused")
    steps = np.arange(1, comparison["steps"] + 1)
    log = _Log(step=steps)
    plots, terms = [], []
    for name, losses in comparison["losses"].items():
        curves = {side: np.array([_number(v) for v in losses[side]]) for side in sides}
        reference, fused = curves.values()
        scale = np.nanmax(np.abs(reference))
        difference = np.abs(fused - reference) / scale if scale > 0 else np.abs(fused - reference)
        at = int(np.nanargmax(difference))
        terms.append({"name": name, "difference": difference[at], "step": f"{steps[at]:,}"})
        plots.append(
            _plot(_label(name), log, steps, curves, scale="log", smooth=False, behind="reference")
        )
    largest = max(terms, key=lambda term: term["difference"])
    ops = {side: {op["op"]: op for op in comparison["ops"][side]} for side in sides}

    def milliseconds(op: dict) -> float:
        return _number(op.get("forward_ms")) + _number(op.get("backward_ms"))

    rows = []
    for name, op in ops["fused"].items():
        before, after = milliseconds(ops["reference"].get(name, {})), milliseconds(op)
        rows.append((name, op.get("backend"), before, after, before / after))
    step_ms, memory = comparison["step_ms"], comparison["extra_memory_mb"]
    return {
        "steps": f"{comparison['steps']:,}",
        "plots": plots,
        "legend": _legend(sides),
        "largest": {**largest, "difference": _short(largest["difference"])},
        "terms": [{**term, "difference": _short(term["difference"])} for term in terms],
        "figures": [
            ("Time of a step, ms", *(_fixed(step_ms[side], 1) for side in sides)),
            ("Memory a step adds at its peak, MB", *(_fixed(memory[side], 0) for side in sides)),
        ],
        "ops": [
            (name, backend, _fixed(before), _fixed(after), f"{_fixed(ratio, 1)} x")
            for name, backend, before, after, ratio in sorted(rows, key=lambda row: -row[2])
        ],
    }


def _setup(config: dict) -> dict:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in config.items():
        if name in ("command", "versions"):
            continue
        group = name if isinstance(value, dict) else ""
        for key, leaf in _leaves(value):
            groups.setdefault(group, []).append((key or name, _literal(leaf)))
    command = config.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    versions = config.get("versions") or {}
    return {
        "command": command,
        "versions": [(str(k), _literal(v)) for k, v in _leaves(versions)],
        "groups": sorted(groups.items(), key=lambda item: item[0] != ""),
        "count": sum(map(len, groups.values())),
    }


# ---- images and plots


def _encode(path: Path) -> tuple[bytes, float]:
    """The image as WebP, at most MAX_IMAGE_SIDE pixels a side, and its width over its height."""
    with Image.open(path) as file:
        image = file.convert("RGBA" if "A" in file.getbands() else "RGB")
    ratio = image.width / image.height
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=90)
    return buffer.getvalue(), ratio


def _plot(
    title: str,
    log: _Log,
    x: np.ndarray,
    curves: dict[str, np.ndarray],
    levels: dict[str, float] | None = None,
    scale: str = "linear",
    smooth: bool = True,
    behind: str = "",
) -> dict:
    """One plot as inline SVG, with an alternative text that says what the curves do.

    Args:
        x: `log.step` or `log.seconds`, [N].
        curves: name to values [N]; NaN breaks the line.
        levels: name to the height of a horizontal line.
        smooth: draw the raw values faintly and a running mean of them on top.
        behind: the curve that is drawn broad and faint, for another one to lie on.
    """
    over_time = x is log.seconds
    in_minutes = over_time and np.nanmax(x) >= 180
    x = x / 60 if in_minutes else x
    figure = Figure(figsize=(460 / 72, 270 / 72), layout="constrained")
    axes = figure.add_subplot()
    drawn = {}
    for index, (name, values) in enumerate(curves.items()):
        values = np.where(values > 0, values, np.nan) if scale == "log" else values
        values = np.where(np.isfinite(values), values, np.nan)
        if np.isnan(values).all():
            continue
        drawn[name] = _running_mean(values) if smooth else values
        style = _style(index)
        if smooth:
            axes.plot(*_thin(x, values), color=style["color"], linewidth=0.8, alpha=0.3)
        mark = "o" if np.isfinite(values).sum() == 1 else None
        line: dict[str, Any] = (
            {"linewidth": 6, "alpha": 0.4} if name == behind else {"linewidth": 1.8}
        )
        axes.plot(*_thin(x, drawn[name]), **style, **line, marker=mark)
    for index, level in enumerate((levels or {}).values()):
        axes.axhline(level, color=_INK, linewidth=1.2, linestyle=DASHES[1 + index % 2])
    for step in log.resumed:
        at = float(np.interp(step, log.step, x))
        axes.axvline(at, color=_TEXT, linewidth=0.8, linestyle=(0, (2, 3)))
    if drawn and scale == "log":
        _log_axis(axes, drawn.values())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    _dress(axes, "minutes" if in_minutes else "seconds" if over_time else "step")
    ends = [
        f"{name} from {_short(_first(values))} to {_short(_last(values))}"
        for name, values in drawn.items()
    ]
    ends += [f"{name} at {_short(level)}" for name, level in (levels or {}).items()]
    alt = f"{title}: {'; '.join(ends) or 'nothing to draw'}."
    return {"title": title, "svg": _svg(figure, alt), "alt": alt}


def _log_axis(axes: Axes, curves: Collection[np.ndarray]) -> None:
    least, greatest = min(map(np.nanmin, curves)), max(map(np.nanmax, curves))
    if least > 0 and greatest < 3 * least:
        # no room for powers of ten, and rounded numbers between them would repeat
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.ticklabel_format(axis="y", useOffset=False)
        return
    # the raw noise may reach far below the trend: the trend sets the range
    low = least / 2
    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    bottom = max(bottom, low)
    axes.set_ylim(bottom, top)
    subs = (1.0,) if top / bottom > 30 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _dress(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, color=_TEXT, fontsize=12)
    axes.xaxis.set_major_locator(
        MaxNLocator(5, steps=[1, 2, 5, 10], integer=label == "step", min_n_ticks=2)
    )
    if label == "step":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.tick_params(labelcolor=_TEXT, color=_GRID, labelsize=12, length=0, pad=6)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.patch.set_visible(False)


def _svg(figure: Figure, alt: str) -> str:
    figure.patch.set_visible(False)
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    # the page sets the size and the fonts
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r"font(-family|-size)?: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    # several plots share one page, and an id must be unique in it
    prefix = f"p{zlib.crc32(alt.encode()):x}"
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    return re.sub(r"#[0-9a-f]{6}", lambda match: _THEME.get(match[0], match[0]), svg)


def _style(index: int) -> dict[str, Any]:
    dash = DASHES[index // SERIES % len(DASHES)]
    return {"color": f"#0a0a{index % SERIES:02x}", "linestyle": dash}


def _legend(curves: Iterable[str], levels: Iterable[str] = ()) -> list[dict]:
    rows = [
        {
            "name": name,
            "color": f"var(--series-{i % SERIES})",
            "line": LEGEND_LINES[i // SERIES % 4],
        }
        for i, name in enumerate(curves)
    ]
    return rows + [
        {"name": name, "color": "var(--ink)", "line": LEGEND_LINES[1 + i % 2]}
        for i, name in enumerate(levels)
    ]


# ---- numbers


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean under a Gaussian a sixtieth of the run wide, over the finite values, gaps kept."""
    sigma = max(1.0, len(values) / 60)
    reach = np.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    finite = np.isfinite(values)
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[middle]
    weight = np.convolve(finite.astype(float), kernel)[middle]
    return np.where(finite, total / np.where(weight > 0, weight, 1.0), np.nan)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points that keep every bin's lowest, highest and missing value."""
    if len(x) <= MAX_POINTS:
        return x, y
    keep: set[int] = set()
    for chunk in np.array_split(np.arange(len(x)), MAX_POINTS // 3):
        part = y[chunk]
        gap = np.flatnonzero(np.isnan(part))
        keep.update(chunk[gap[:1]])
        if len(gap) < len(part):
            keep.update((chunk[np.nanargmin(part)], chunk[np.nanargmax(part)]))
    index = np.array(sorted(keep))
    return x[index], y[index]


def _spread(scores: Sequence[float], count: int) -> list[int]:
    """`count` indices evenly spread over the ranks of `scores`, from both ends inwards."""
    order = np.argsort(scores, kind="stable")
    picks = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    ends_first = sorted(picks, key=lambda pick: min(pick, len(order) - 1 - pick))
    return [int(order[pick]) for pick in ends_first]


def _first(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[0]) if len(finite) else math.nan


def _last(values: np.ndarray) -> float:
    return _first(values[::-1])


def _last_mean(values: np.ndarray) -> float:
    """Mean of the last twentieth of the run, so that one batch does not stand for it."""
    tail = values[-max(1, len(values) // 20) :]
    tail = tail[np.isfinite(tail)]
    return float(tail.mean()) if len(tail) else math.nan


# ---- words


def _fixed(value: Any, digits: int = 2) -> str:
    number = _number(value)
    if math.isfinite(number):
        return f"{number:,.{digits}f}"
    return NONE if value is None else {math.inf: "∞", -math.inf: "-∞"}.get(number, "not a number")


def _short(value: float) -> str:
    """Three significant digits, with a power of ten below a thousandth."""
    if not math.isfinite(value):
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, power = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    digits = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}" if mantissa == "1" else f"{mantissa}·10{digits}"


def _scaled(value: float) -> tuple[str, str]:
    for size, unit in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return _fixed(value / size), unit
    return _fixed(value, 0), ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _stages(spent: dict[str, float]) -> str:
    return ", ".join(f"{name} {_duration(t)}" for name, t in spent.items() if t >= 0.05)


def _share(part: float, whole: float) -> float:
    """Per cent for the length of a bar, 0 where it has no meaning."""
    return round(100 * part / whole, 2) if math.isfinite(part) and whole > 0 else 0.0


def _percent(part: float, whole: float) -> str:
    if not math.isfinite(part) or whole <= 0:
        return NONE
    return f"{100 * part / whole:.1f} %" if part >= 5e-4 * whole or part == 0 else "< 0.1 %"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _label(key: str) -> str:
    words = key.replace("_", " ")
    return words[:1].upper() + words[1:]


def _image_label(key: str) -> str:
    if re.fullmatch("feature(_.*)?", key):
        head = key.removeprefix("feature").removesuffix("_target").replace("_", " ")
        return f"Features{head}, {'target' if key.endswith('_target') else 'rendered'}"
    return IMAGES.get(key) or _label(key)


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    dot = f"{prefix}." if prefix else ""
    return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{dot}{key}")]


def _literal(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
