"""Curves as inline SVG. Its colours are CSS variables of the page, so that one drawing serves light, dark and print."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmjax import human
from llmjax.report.curves import Curve

# Matplotlib draws with placeholder colours. Variables of the style sheet then replace them.
SERIES = tuple(f"#0102{i:02x}" for i in range(1, 9))
_INK, _GRID, _BAD = "#010301", "#010302", "#010303"
_VARIABLES = {color: f"var(--series-{i})" for i, color in enumerate(SERIES, 1)}
_VARIABLES |= {_INK: "var(--muted)", _GRID: "var(--line)", _BAD: "var(--bad)"}


@dataclass(frozen=True)
class Line:
    """A curve to draw."""

    label: str
    curve: Curve
    series: int  # index of the colour
    points: bool = False  # draw a dot for each measurement, if there are few
    dashed: bool = False


def draw(
    name: str,
    lines: Sequence[Line],
    *,
    y_label: str,
    marks: Sequence[int] = (),
    log_y: bool = False,
    wide: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    robust: bool = False,
    width: float = 0.0,
    x_label: str = "step",
    sizes: Sequence[int] = (),
) -> str:
    """One plot over training steps, or another x, as an `<svg>` element.

    Args:
        name: unique on the page. It is the prefix of all ids in the drawing.
        marks: steps marked at the lower edge (skipped updates).
        robust: leave the highest 1% of values out of the y range, so that the first steps do not flatten the rest.
        width: in inches; 0: half the page, or all of it with `wide`.
        sizes: the values of x, which is then logarithmic.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "text.parse_math": False,  # names of runs and sources are not TeX
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "grid.color": _GRID,
        "path.simplify": True,
        "path.simplify_threshold": 0.5,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(width or (9.4 if wide else 4.7), 3.3 if wide else 2.5))
        for line in lines:
            _draw_line(axes, line)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if robust:
            _set_robust_limits(axes, lines)
        if from_zero:
            axes.set_ylim(0, 1.08 * max(float(line.curve.high.max()) for line in lines) or 1.0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        elif from_zero:
            axes.yaxis.set_major_formatter(lambda y, _: human.count(y) if y >= 1000 else f"{y:g}")
        if marks:
            axes.plot(marks, np.full(len(marks), 0.02), "|", color=_BAD, ms=8, mew=1.5, label="skipped update",
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if sizes:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6 if wide else 5, integer=x_label == "step"))
            axes.xaxis.set_major_formatter(lambda x, _: human.count(x) if abs(x) >= 10 else f"{x:g}")
        axes.grid(axis="y", linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
        if len(lines) > 1 or marks:
            axes.legend(frameon=False, ncols=2 if len(lines) > 3 else 1)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04, metadata={"Date": None}
        )
        plt.close(figure)
    return _inline(out.getvalue(), name)


def _draw_line(axes: Any, line: Line) -> None:
    curve, color = line.curve, SERIES[line.series % len(SERIES)]
    if (curve.high > curve.low).any():
        axes.fill_between(curve.step, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
    marker = {"marker": "o", "ms": 4} if line.points and len(curve.step) <= 60 else {}
    if len(curve.step) == 1:
        marker = {"marker": "o", "ms": 4}
    label = f"\u200b{line.label}" if line.label.startswith("_") else line.label  # matplotlib leaves out labels with _
    axes.plot(
        curve.step, curve.mean, color=color, linewidth=1.5, label=label, ls="--" if line.dashed else "-", **marker
    )


def _set_robust_limits(axes: Any, lines: Sequence[Line]) -> None:
    values = np.concatenate([line.curve.mean for line in lines])
    if axes.get_yscale() == "log":
        values = values[values > 0]
    if not len(values):
        return
    low, high = float(values.min()), float(np.percentile(values, 99))
    room = 0.06 * (high - low)
    if room > 0 and axes.get_yscale() == "linear":
        axes.set_ylim(low - room, high + room)


def _inline(svg: str, name: str) -> str:
    """The `<svg>` element alone, with unique ids, and the font and colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    # 0.1 points are finer than any screen, and coordinates are most of the page.
    svg = re.sub(r'\b(d|x|y)="[^"]*"', lambda found: re.sub(r"(\d\.\d)\d+", r"\1", found[0]), svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1).strip()


def sparkline(curve: Curve, *, width: int = 48) -> str:
    """A curve as one line of block characters."""
    blocks = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
    parts = [part.mean() for part in np.array_split(curve.mean, min(width, len(curve.mean)))]
    low, high = min(parts), max(parts)
    span = (high - low) or 1.0
    return "".join(blocks[round((value - low) / span * (len(blocks) - 1))] for value in parts)
