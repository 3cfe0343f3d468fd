"""The charts of report.py: curves smoothed, thinned out and drawn, as HTML that fits any screen.

A chart is an SVG that its page stretches to any width, under words that are HTML: they keep their
size on a phone, take the page's colours, dark or light, and print sharply. `run` is a runs.Run; its
style is the number of a colour of its own among 12 and, for eyes that see few colours and for print
in grey, of a dash.

Sections: Curves · Drawing · Charts
"""

import html
import itertools
import math

import numpy as np

from basics.words import count

# --- Curves ---------------------------------------------------------------------------------------

PLACES = 700  # along the axis: no curve is drawn from more than two points in each


def smooth(curve, window: int, average=np.mean) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices, centred average over `window` steps there), at PLACES or at every point.

    At the beginning it is taken over less, as much as there is on both sides, so that a steep fall
    is not flattened; at the end over what there is. np.median where single outliers are so far out
    that they would make plateaus of a mean.
    """
    places = np.unique(np.linspace(0, len(curve) - 1, PLACES).astype(int))
    steps = curve.steps[places]
    half = np.minimum(window / 2, steps - curve.steps[0])
    low = np.searchsorted(curve.steps, steps - half)
    high = np.searchsorted(curve.steps, steps + half, "right")
    return places, np.array([average(curve.values[a:b]) for a, b in zip(low, high, strict=True)])


def spacing(curve) -> float:
    """Return the steps from one point to the next."""
    return float(np.median(np.diff(curve.steps))) if len(curve) > 1 else 1.0


def is_noisy(curve, window: int) -> bool:
    """Tell if a mean over the window is a mean of anything."""
    return window > 1 and len(curve) >= 20 and spacing(curve) * 3 <= window


def extremes(x, y):
    """Thin a curve out for drawing: of each stretch the lowest and the highest point stay, so no
    spike is lost."""
    if len(x) <= 2 * PLACES:
        return x, y
    bounds = np.linspace(0, len(x), PLACES + 1).astype(int)
    keep = np.concatenate(
        [sorted((a + y[a:b].argmin(), a + y[a:b].argmax())) for a, b in itertools.pairwise(bounds)]
    )
    return x[keep], y[keep]


# --- Drawing --------------------------------------------------------------------------------------

UNITS = 4000  # of the drawing, in both directions
FAINT_RUNS = 3  # with more runs in a chart, raw curves behind the smooth ones would hide them
BEADS = 40  # a curve with more points than these has no dots
COLORS = 12  # in page.css


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers between the two, at most so many."""
    raw = (high - low) / most or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """Write a tick as one would."""
    return f"{round(value):,}" if abs(value) >= 1000 else f"{value:.6g}"


class Chart:
    """Collects lines, in the units of its axes, and the words around them.

    by: what its horizontal axis is, "steps", "tokens" or "time". It begins at 0 unless all runs
    begin far from it, as one that goes on from another's checkpoint.
    """

    def __init__(self, title: str, runs: list, window: int = 1, by: str = "steps"):
        self.title, self.runs, self.window, self.by = title, runs, window, by
        self.lines: list[tuple] = []  # (CSS classes, x, y)
        self.legend: list[tuple[str, str]] = []  # (CSS classes, words)
        self.goals: list[tuple[float, str]] = []  # horizontal lines with a name
        self.marks: list[float] = []  # x of what is marked at the foot
        self.notes: list[str] = []
        self.y_range = 0.0, 1.0
        self.unit, self.x_name = 1.0, {"steps": "step"}.get(by, by)
        ends = [self.x(run, np.array([run.first_step, run.last_step])) for run in runs]
        low, high = min(x[0] for x in ends), max(x[1] for x in ends)
        if by == "time":
            self.x_name, self.unit = next((t for t in TIMES if high >= 2 * t[1]), TIMES[-1])
            self.x_name = f"{self.x_name} of training"
        low, high = low / self.unit, high / self.unit
        low = 0.0 if low < 0.3 * high else low
        self.x_range = low, high if high > low else low + 1.0
        if len(runs) > 1:
            self.legend = [(color(run), run.label) for run in runs]

    def x(self, run, steps):
        return run.along(self.by, steps) / self.unit

    def line(self, run, curve, average: str = "") -> str:
        """Draw a run's curve. average: "mean" or "median" over the window, with the curve as logged
        faint behind it, if there are enough points; "" draws it as it is. Return what was drawn."""
        css, x, y = color(run), self.x(run, curve.steps), curve.values
        if not average or not is_noisy(curve, self.window):
            dots = " dots" if len(curve) <= BEADS else ""
            self.lines.append((css + dots, *extremes(x, y)))
            return ""
        if len(self.runs) <= FAINT_RUNS:
            self.lines.insert(0, (f"{css} faint", *extremes(x, y)))
        places, y = smooth(curve, self.window, getattr(np, average))
        self.lines.append((css, x[places], y))
        return f"{average} of {self.window:,} steps"

    def explain(self, drawn: str, what: str = "") -> None:
        """Say in the legend what is an average, and what is not."""
        css = "grey" if len(self.runs) > 1 else color(self.runs[0])
        if drawn or what:
            self.legend.append((css, ", ".join(filter(None, (what, drawn)))))
        if drawn and len(self.runs) <= FAINT_RUNS:
            self.legend.append((f"{css} faint", "as logged"))

    def mark_incidents(self) -> None:
        """Mark skipped updates and roll-backs at the foot of the chart."""
        for what, name in (("skips", "updates skipped"), ("rollbacks", "roll-backs")):
            places = np.concatenate([self.x(run, run.increases(what)) for run in self.runs])
            if len(places):
                self.marks += places.tolist()
                self.legend.append(("marks", f"{name}: {len(places)}"))

    def fit(self, zero: bool = False, outliers: bool = True) -> None:
        """Show every value and every goal, from 0 on if `zero`; but without `outliers` neither the
        steep fall of the first 2% nor single spikes, where little could be seen of the rest."""
        goals = [y for y, _ in self.goals]
        whole = np.concatenate([goals, *(y for _, _, y in self.lines)])
        shown = [whole]
        if not outliers:
            shown = [goals]
            for css, x, y in self.lines:
                later = y[x > 0.02 * self.x_range[1]] if len(y) >= 50 else y
                raw = "faint" in css and len(later) >= 50
                shown.append(np.percentile(later, [0.2, 99.8]) if raw else later)
        shown = np.concatenate(shown)
        low, high, top = float(shown.min()), float(shown.max()), float(whole.max())
        if top < high + 0.35 * (high - low):
            high = top
        gap = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        self.y_range = (0.0 if zero else low - gap), high + gap
        if top > high + gap:
            self.notes.append(f"The highest values, up to {top:.2f}, are above the chart.")

    # -- to HTML ----------------------------------------------------------------------------------

    def _height(self, y):
        """Return heights as shares of the chart's."""
        return (np.asarray(y, float) - self.y_range[0]) / (self.y_range[1] - self.y_range[0])

    def _along(self, x):
        return (np.asarray(x, float) - self.x_range[0]) / (self.x_range[1] - self.x_range[0])

    def _path(self, css: str, x, y) -> str:
        x = np.round(UNITS * self._along(x)).astype(int).tolist()
        y = np.round(UNITS * (1 - np.clip(self._height(y), -1, 2))).astype(int).tolist()
        points = [f"{a} {b}" for a, b in zip(x, y, strict=True)]
        path = ""
        if len(points) > 1 and "alone" not in css:
            path = f'<path class="{css.replace(" dots", "")}" d="M{"L".join(points)}"/>'
        if "dots" in css or len(points) == 1:
            dots = "".join(f"M{point}h.1" for point in points)
            path += f'<path class="{css} dots" d="{dots}"/>'
        return path

    def html(self) -> str:
        """Return the figure."""
        esc, y_ticks = html.escape, ticks(*self.y_range)
        format_x = count if self.by == "tokens" else tick_label
        paths, words = [], []
        for css, heights in (("grid", y_ticks), ("goal", [y for y, _ in self.goals])):
            for y in heights:
                down = UNITS * (1 - self._height(y))
                paths.append(f'<path class="{css}" d="M0 {down:.0f}h{UNITS}"/>')
        paths += [self._path(*line) for line in self.lines]
        if self.marks:
            feet = [f"M{x:.0f} {UNITS}v-250" for x in UNITS * self._along(self.marks)]
            paths.append(f'<path class="marks" d="{"".join(feet)}"/>')
        for css, y, name in [
            *(("y", y, tick_label(y)) for y in y_ticks),
            *(("goalname", *goal) for goal in self.goals),
        ]:
            bottom = 100 * self._height(y)
            words.append(f'<span class="{css}" style="bottom:{bottom:.2f}%">{esc(name)}</span>')
        for x in ticks(*self.x_range, 5):
            left = 100 * self._along(x)
            words.append(f'<span class="x" style="left:{left:.2f}%">{format_x(x)}</span>')
        words.append(f'<span class="name">{esc(self.x_name)}</span>')
        keys = []
        for css, label in self.legend:
            line = "14 5h.1" if "dots" in css else "14 10v-9" if "marks" in css else "0 5h28"
            key = f'<svg viewBox="0 0 28 10"><path class="{css}" d="M{line}"/></svg>'
            keys.append(f"<li>{key}{esc(label)}</li>")
        note = f"<p>{esc(' '.join(self.notes))}</p>" if self.notes else ""
        return (
            f"<figure><figcaption>{esc(self.title)}</figcaption>"
            f'<ul class="legend">{"".join(keys)}</ul><div class="plot">'
            f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" '
            f'aria-label="{esc(self.title)}">{"".join(paths)}</svg>{"".join(words)}</div>'
            f"{note}</figure>\n"
        )


def color(run) -> str:
    return f"c{run.style % COLORS}"


# --- Charts ---------------------------------------------------------------------------------------

GPT2_LOSS = 3.292  # GPT-2 124M by OpenAI on FineWeb-Edu's validation shard (llm.c's figure)
GPT2_HELLASWAG, CHANCE = 0.2955, 0.25
TIMES = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def loss_chart(runs: list, window: int, by: str, title: str) -> str:
    """Draw the losses of training and validation together."""
    shown = [run for run in runs if run.curve("train") or run.curve("validation")]
    if by == "tokens":
        shown = [run for run in shown if run.tokens is not None]
    if not any(run.last_step for run in shown):  # only step 0 so far
        return ""
    chart, drawn = Chart(title, shown, window, by), ""
    single = len(shown) == 1
    for run in shown:
        train, validation = run.curve("train"), run.curve("validation")
        if train:
            drawn = chart.line(run, train, "mean") or drawn
        if validation:
            css = "c1 dots" if single else f"{color(run)} dots alone"
            points = extremes(chart.x(run, validation.steps), validation.values)
            chart.lines.append((css, *points))
    if any(run.curve("train") for run in shown):
        chart.explain(drawn, "training")
    if any(run.curve("validation") for run in shown):
        chart.legend.append(("c1 dots" if single else "grey dots", "validation"))
    if all(run.is_fineweb_edu for run in shown):
        chart.goals.append((GPT2_LOSS, f"GPT-2 124M: {GPT2_LOSS}"))
    chart.fit(outliers=False)
    chart.mark_incidents()
    if by == "time":
        chart.notes += [f"Time: {'; or '.join(sorted({run.clock[2] for run in shown}))}."]
    return chart.html()


def chart_of(runs: list, window: int, what: str, title: str, average: str = "") -> str:
    """Draw one quantity, as runs.TAGS names it."""
    shown = [run for run in runs if run.curve(what)]
    if not shown:
        return ""
    chart = Chart(title, shown, window)
    chart.explain(max(chart.line(run, run.curve(what), average) for run in shown))
    if what == "hellaswag":
        chart.goals = [(CHANCE, "chance"), (GPT2_HELLASWAG, f"GPT-2 124M: {GPT2_HELLASWAG}")]
    if what == "norm":
        chart.mark_incidents()
        for run in shown:
            clip = run.params.get("grad_clip")
            if isinstance(clip, int | float) and clip > 0:
                chart.goals.append((clip, f"clipped at {clip:g}"))
                whose = f" ({run.label})" if len(shown) > 1 else ""
                share = np.mean(run.curve(what).values > clip)
                chart.notes.append(f"Clipped: {share:.1%} of updates{whose}.")
        chart.goals = sorted(set(chart.goals))
    chart.fit(zero=what != "hellaswag", outliers=what != "norm")
    return chart.html()


def all_charts(runs: list, window: int) -> str:
    """Return every chart that has something to show, as HTML."""
    kinds = [("steps", "Loss")]
    if len(runs) > 1:  # one run's would differ in nothing but the numbers below
        kinds = [("steps", "Loss by step"), ("tokens", "Loss by tokens"), ("time", "Loss by time")]
    figures = [loss_chart(runs, window, *kind) for kind in kinds]
    norms = {run.tag("norm") for run in runs}
    norm = "Gradient norm" + (" before clipping" if "Gradient/norm" not in norms else "")
    figures += [
        chart_of(runs, window, "hellaswag", "HellaSwag accuracy", "mean"),
        chart_of(runs, window, "norm", norm, "median"),
        chart_of(runs, window, "lr", "Learning rate"),
        chart_of(runs, window, "rate", "Tokens per second", "median"),
    ]
    return "".join(figures)
