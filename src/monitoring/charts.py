"""The charts of report.py: curves smoothed, thinned out and drawn, as PNG and SVG.

A run here is a report.Run. Colours can be told apart with any colour vision, dashes and markers
also in grey print. Averages are computed from all points; only drawing thins out.

Sections: Curves · Drawing · Charts
"""

import io
import itertools
import math
from dataclasses import dataclass

import numpy as np

# matplotlib is imported where it is needed: report.py --help answers at once.

# --- Curves ---------------------------------------------------------------------------------------

PIXELS = 1000  # no curve is drawn from more than this many places along the axis


def smooth(curve, window: int, average=np.mean) -> tuple[np.ndarray, np.ndarray]:
    """(indices, centred average over `window` steps there), at PIXELS places or at every point.

    At the beginning it is taken over less, as much as there is on both sides, so that a steep fall
    is not flattened; at the end over what there is. np.median where single outliers are so far out
    that they would make plateaus of a mean.
    """
    places = np.unique(np.linspace(0, len(curve) - 1, PIXELS).astype(int))
    steps = curve.steps[places]
    half = np.minimum(window / 2, steps - curve.steps[0])
    low = np.searchsorted(curve.steps, steps - half)
    high = np.searchsorted(curve.steps, steps + half, "right")
    return places, np.array([average(curve.values[a:b]) for a, b in zip(low, high, strict=True)])


def spacing(curve) -> float:
    """Steps from one point to the next."""
    return float(np.median(np.diff(curve.steps))) if len(curve) > 1 else 1.0


def is_noisy(curve, window: int) -> bool:
    """Whether a mean over the window is a mean of anything."""
    return window > 1 and len(curve) >= 20 and spacing(curve) * 3 <= window


def extremes(x, y):
    """Curve thinned out for drawing: of each stretch the lowest and the highest point stay, so no
    spike is lost."""
    if len(x) <= 2 * PIXELS:
        return x, y
    bounds = np.linspace(0, len(x), PIXELS + 1).astype(int)
    keep = np.concatenate(
        [sorted((a + y[a:b].argmin(), a + y[a:b].argmax())) for a, b in itertools.pairwise(bounds)]
    )
    return x[keep], y[keep]


# --- Drawing --------------------------------------------------------------------------------------

GPT2_LOSS = 3.292  # GPT-2 124M by OpenAI on FineWeb-Edu's validation shard (llm.c's figure)
GPT2_HELLASWAG, CHANCE = 0.2955, 0.25
WIDTH, HEIGHT = 6.4, 3.5  # inches: the text width of a page
FAINT_RUNS = 3  # with more runs in a chart, raw curves behind the smooth ones would hide them
BEADS = 40  # a curve with more points than these has no markers, or only some
OTHER_CHARTS = 12
LEGEND_ROW = 12 / 72  # inches
LABEL_CHARS = 75  # what fits beside a line of a legend
# Okabe and Ito's palette but its yellow, which is too light for lines on paper.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1.5, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "h")
GREY = "#555555"  # what holds for all runs of a chart
LOOKS = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "lines.markeredgewidth": 0.6,
    "lines.dash_capstyle": "butt",
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "figure.dpi": 200,
    "svg.hashsalt": "report",  # the same runs give the same file
}
UNITS = {
    "tokens": ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands")),
    "hours": ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")),
}


@dataclass
class Style:
    """How a run looks in every chart. Colours are Okabe and Ito's, told apart with any colour
    vision; dashes and markers differ too, for print in grey."""

    color: str
    dash: object
    marker: str


def style(i: int) -> Style:
    """Of the i-th run in a chart: none of the first 28 looks like another."""
    n = len(COLORS)  # and with each round through them the dashes are one further on
    return Style(COLORS[i % n], DASHES[(i + 2 * (i // n)) % len(DASHES)], MARKERS[i % n])


@dataclass
class Chart:
    """A finished chart."""

    name: str  # of its files
    title: str
    caption: str
    png: bytes
    svg: bytes


def legend_line(label: str, **looks):
    """A line of a legend, whatever is in its words: matplotlib takes $…$ for a formula, and leaves
    out what begins with _."""
    from matplotlib.lines import Line2D

    if len(label) > LABEL_CHARS:
        half = LABEL_CHARS // 2
        label = f"{label[:half]}…{label[-half:]}"
    label = label.replace("$", r"\$")
    label = f" {label}" if label.startswith("_") else label
    return Line2D([], [], label=label, **({"mec": "white"} | looks))


def legend_columns(lengths: list[int]) -> int:
    """How many columns of a legend fit, by the characters of its labels: 415 points of room beside
    the axis' numbers, 45 for a line and its margins, 4.9 a character."""
    for columns in range(len(lengths), 1, -1):
        widths = [45 + 4.9 * max(column) for column in np.array_split(lengths, columns)]
        if sum(widths) <= 415:
            return columns
    return 1


class Plot:
    """A chart in the making: the runs that have something to show in it, its axes, and notes of
    what the legend and the caption have to say."""

    def __init__(self, runs, kind="steps", window=1, height=HEIGHT, rows=1, columns=1):
        from matplotlib.figure import Figure  # without pyplot: no windows, no global state

        self.runs, self.kind, self.window = runs, kind, window
        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes = self.figure.subplots(rows, columns, squeeze=False, sharex=columns == 1)
        self.ax = self.axes[0, 0]
        self.faint = len(runs) <= FAINT_RUNS
        self.average = None  # the name of the average that was drawn
        self.thinned = False
        self.incidents = []  # legend handles
        self.notes: list[str] = []
        self.unit, self.x_label = 1.0, "step"
        self.top = max(float(self.raw_x(r, np.array([r.last_step]))[0]) for r in runs)
        if kind in UNITS:
            fits = [unit for unit in UNITS[kind] if self.top >= 2 * unit[0]]
            self.unit, word = (fits or UNITS[kind][-1:])[0]
            self.x_label = f"training {'tokens' if kind == 'tokens' else 'time'} ({word})"
            self.top /= self.unit

    # -- along the chart --------------------------------------------------------------------------

    def raw_x(self, run, steps):
        if self.kind == "tokens":
            return run.tokens_at(steps)
        return run.seconds_at(steps) if self.kind == "hours" else steps.astype(float)

    def x(self, run, steps):
        return self.raw_x(run, steps) / self.unit

    def finish_x(self, ax) -> None:
        """Range, ticks and name of the horizontal axis. It begins at 0 unless all runs begin far
        from it, as one that goes on from another's checkpoint."""
        first = [min(curve.steps[0] for curve in run.curves.values()) for run in self.runs]
        start = min(
            float(self.x(run, np.array([step]))[0])
            for run, step in zip(self.runs, first, strict=True)
        )
        left = 0.0 if start < 0.3 * self.top else start
        margin = 0.01 * (self.top - left) or 0.5
        ax.set_xlim(left - margin, self.top + margin)
        ax.set_xlabel(self.x_label)
        if self.kind == "steps":
            ax.xaxis.set_major_formatter("{x:,.0f}")
            ax.xaxis.get_major_locator().set_params(integer=True)

    # -- lines ------------------------------------------------------------------------------------

    def line(self, ax, run, curve, average: str = "", scale=1.0, beads=False) -> None:
        """A run's curve. average: "mean" or "median" over the window, with the raw curve faint
        behind it, if there are enough points; "" draws it as it is. beads: mark the points."""
        style, x, y = run.style, self.x(run, curve.steps), curve.values * scale
        looks = {"color": style.color, "ls": style.dash, "zorder": 3}
        if beads:
            looks |= {"marker": style.marker, "mec": "white", "clip_on": False}
        self.thinned |= len(curve) > 2 * PIXELS
        if average and is_noisy(curve, self.window):
            self.average = average
            if self.faint:
                alpha = 0.3 if len(self.runs) == 1 else 0.22
                ax.plot(*extremes(x, y), color=style.color, lw=0.5, alpha=alpha, zorder=1)
            places, y = smooth(curve, self.window, getattr(np, average))
            ax.plot(x[places], y * scale, **looks)
        else:
            ax.plot(*extremes(x, y), **looks)

    def reference(self, ax, y: float, text: str) -> None:
        """A horizontal line to compare with, named at its right end, outside the curves."""
        ax.axhline(y, color=GREY, lw=0.8, ls=(0, (1, 2)), zorder=1.5)
        ax.annotate(
            text, (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0), color="#333333",
            textcoords="offset points", va="center", fontsize=7.5, linespacing=1.1,
        )  # fmt: skip

    def mark_incidents(self, ax) -> None:
        """Skipped updates and roll-backs, at the foot of the chart."""
        kinds = (
            ("skips", "update skipped", "updates skipped", "x", 1.1),
            ("rollbacks", "roll-back", "roll-backs", "*", 0.4),
        )
        counts = []
        for what, one, many, marker, edge in kinds:
            looks = {"marker": marker, "ms": 5.5, "mew": edge, "ls": "none"}
            count = 0
            for run in self.runs:
                steps = run.increases(what)
                if not len(steps):
                    continue
                color = run.style.color if len(self.runs) > 1 else "black"
                x, foot = self.x(run, steps), np.full(len(steps), 0.025)
                place = {"transform": ax.get_xaxis_transform(), "clip_on": False, "zorder": 5}
                ax.plot(x, foot, color=color, mec=color, **looks, **place)
                if what == "rollbacks":
                    for at in x:
                        ax.axvline(at, color=color, lw=0.6, ls=(0, (3, 3)), zorder=1)
                count += round(run.curve(what).values[-1])
            if count:
                color = GREY if len(self.runs) > 1 else "black"
                self.incidents.append(legend_line(one, color=color, mec=color, **looks))
                counts.append(f"{many}: {count}")
        if counts:
            self.notes.append(f"Marked at the foot: {', '.join(counts)}.")

    # -- words ------------------------------------------------------------------------------------

    def run_lines(self, beads: bool = False) -> list:
        """Legend: which line is which run, where there are several."""
        if len(self.runs) == 1:
            return []
        return [
            legend_line(run.label, color=run.style.color, ls=run.style.dash,
                        marker=run.style.marker if beads else "")
            for run in self.runs
        ]  # fmt: skip

    def average_lines(self, what: str = "") -> list:
        """Legend: what is an average, and what is not."""
        if not self.average:
            return []
        color = GREY if len(self.runs) > 1 else self.runs[0].style.color
        lines = [legend_line(f"{what}{self.average} of {self.window:,} steps", color=color)]
        if self.faint:
            lines.append(legend_line(f"{what}as logged", color=color, lw=0.6, alpha=0.45))
        return lines

    def legend_above(self, *groups: list) -> None:
        """Above the chart, where it hides no curve: groups of lines, one above the other. The
        figure grows by as much."""
        from matplotlib.legend import Legend
        from matplotlib.transforms import ScaledTranslation

        if len(self.axes[0]) > 1:  # over all the columns
            groups = [[line for group in groups for line in group]]
        height = 0.0  # inches above the axes so far
        for lines in reversed([group for group in groups if group]):
            columns = legend_columns([len(line.get_label()) for line in lines])
            looks = {"ncols": columns, "borderaxespad": 0, "borderpad": 0.2}
            if len(self.axes[0]) > 1:
                self.figure.legend(handles=lines, loc="outside upper left", **looks)
            else:
                up = ScaledTranslation(0, 0.03 + height, self.figure.dpi_scale_trans)
                legend = Legend(
                    self.ax, lines, [line.get_label() for line in lines], loc="lower left",
                    bbox_to_anchor=(0, 1), bbox_transform=self.ax.transAxes + up, **looks,
                )  # fmt: skip
                self.ax.add_artist(legend)
                legend.set_clip_on(False)  # or the layout would leave no room for it
            height += LEGEND_ROW * math.ceil(len(lines) / columns)
        width, old = self.figure.get_size_inches()
        self.figure.set_size_inches(width, old + height)

    def finish(self, name: str, title: str, all_runs: list) -> Chart:
        how = []
        if self.average:
            how.append(f"Lines: centred {self.average} of {self.window:,} steps, of fewer at the")
            how[0] += " ends" + ("; faint: as logged" if self.faint else "")
        if self.thinned:
            where = f"Each of {PIXELS:,} stretches is drawn by its lowest and its highest value"
            how.append(where if self.faint or not self.average else "")
        sentences = [f"{sentence}." for sentence in how if sentence] + self.notes
        missing = [run.name for run in all_runs if run not in self.runs]
        if missing:
            sentences.append(f"Not logged by {', '.join(missing)}.")
        png, svg = io.BytesIO(), io.BytesIO()
        self.figure.savefig(png, format="png")
        self.figure.savefig(svg, format="svg", metadata={"Date": None})
        return Chart(name, title, " ".join(sentences), png.getvalue(), svg.getvalue())


# --- Charts ---------------------------------------------------------------------------------------


def having(runs: list, *whats: str) -> list:
    return [run for run in runs if any(run.curve(what) for what in whats)]


def loss_chart(runs: list, kind: str, title: str, window: int) -> Chart | None:
    """Training and validation together."""
    shown = having(runs, "train", "validation")
    if kind == "tokens":
        shown = [run for run in shown if run.tokens_at(np.array([run.last_step])) is not None]
    if not shown:
        return None
    plot = Plot(shown, kind, window)
    if plot.top == 0:  # only step 0 so far
        return None
    ax, single = plot.ax, len(shown) == 1
    drawn = []  # (x, values, whether they are averages) of every line
    for run in shown:
        style, train, validation = run.style, run.curve("train"), run.curve("validation")
        if train:
            plot.line(ax, run, train, "mean")
            x = plot.x(run, train.steps)
            drawn.append((x, train.values, False))
            places, means = smooth(train, window)
            drawn.append((x[places], means, True))
        if validation:
            x, few = plot.x(run, validation.steps), max(1, len(validation) // 12)
            ax.plot(
                *extremes(x, validation.values), marker=style.marker, mec="white", zorder=4,
                color=COLORS[1] if single else style.color, ls=DASHES[1] if single else "none",
                markevery=few,
            )  # fmt: skip
            drawn.append((x, validation.values, True))
    goals = [GPT2_LOSS] if all(run.is_fineweb_edu for run in shown) else []
    for goal in goals:
        plot.reference(ax, goal, f"GPT-2 124M\n{goal}")
    limit_loss(plot, drawn, goals)
    if kind == "hours":
        ways = sorted({run.clock[2] for run in shown})
        plot.notes.append(f"Training time: {'; or '.join(ways)}.")
    plot.finish_x(ax)
    ax.set_ylabel("loss (nats per token)")
    plot.mark_incidents(ax)
    lines = plot.average_lines("training, ")
    if having(shown, "train") and not lines:
        lines.append(legend_line("training", color=COLORS[0] if single else GREY))
    if having(shown, "validation"):
        looks = {"color": COLORS[1], "ls": DASHES[1]} if single else {"color": GREY, "ls": "none"}
        lines.append(legend_line("validation", marker="o", **looks))
    inside = {"frameon": True, "framealpha": 0.85, "edgecolor": "none", "borderpad": 0.2}
    plot.legend_above(plot.run_lines(beads=bool(having(shown, "validation"))))
    ax.legend(handles=lines + plot.incidents, loc="upper right", **inside)
    return plot.finish(f"loss_{kind}", title, runs)


def limit_loss(plot: Plot, drawn: list[tuple], goals: list[float]) -> None:
    """The range of the loss: without the steep fall of the first 2% and single spikes, which would
    leave little to see of the rest; but the whole where that is not much more."""
    rest = [np.array(goals)]
    for x, values, averages in drawn:
        later = values[x > 0.02 * plot.top] if len(values) >= 50 else values
        rest.append(later if averages or len(later) < 50 else np.percentile(later, [0.2, 99.8]))
    low, high = min(v.min() for v in rest if len(v)), max(v.max() for v in rest if len(v))
    top = max(values.max() for _, values, _ in drawn)
    if top < high + 0.35 * (high - low):
        high = top
    margin = 0.05 * (high - low) or 0.1
    plot.ax.set_ylim(low - margin, high + margin)
    if top > high + margin:
        plot.notes.append(f"The highest values, up to {top:.2f}, are above the chart.")


def lr_chart(runs: list, window: int) -> Chart | None:
    shown = having(runs, "lr")
    if not shown:
        return None
    plot = Plot(shown, height=0.75 * HEIGHT)
    top = max(run.curve("lr").values.max() for run in shown)
    power = math.floor(math.log10(top)) if top > 0 else 0
    for run in shown:
        plot.line(plot.ax, run, run.curve("lr"), scale=10.0**-power)
    plot.finish_x(plot.ax)
    plot.ax.set_ylim(0, 1.05 * top * 10.0**-power or 1)
    plot.ax.set_ylabel(rf"learning rate ($\times 10^{{{power}}}$)" if power else "learning rate")
    plot.legend_above(plot.run_lines())
    return plot.finish("learning_rate", "Learning rate", runs)


def norm_chart(runs: list, window: int) -> Chart | None:
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = having(runs, "norm")
    if not shown:
        return None
    plot = Plot(shown, window=window)
    ax, clips = plot.ax, set()
    for run in shown:
        curve, clip = run.curve("norm"), run.params.get("grad_clip")
        plot.line(ax, run, curve, "median")
        if isinstance(clip, int | float) and clip > 0:
            clips.add(clip)
            whose = f" ({run.label})" if len(shown) > 1 else ""
            plot.notes.append(f"Clipped: {np.mean(curve.values > clip):.1%} of updates{whose}.")
    for clip in sorted(clips):
        plot.reference(ax, clip, f"clipped\nat {clip:g}")
    norms = np.concatenate([run.curve("norm").values for run in shown] + [list(clips)])
    norms = norms[norms > 0]
    if len(norms) and norms.max() > 8 * np.median(norms):
        low, high = np.percentile(norms, 0.1), norms.max()
        ax.set_yscale("log")
        ax.set_ylim(0.9 * low, 1.15 * high)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    elif len(norms):
        ax.set_ylim(0, 1.08 * norms.max())
    plot.finish_x(ax)
    applied = any(run.tag("norm") == "Gradient/norm" for run in shown)
    ax.set_ylabel("gradient norm" if applied else "gradient norm before clipping")
    plot.mark_incidents(ax)
    plot.legend_above(plot.run_lines(), plot.average_lines() + plot.incidents)
    return plot.finish("gradient_norm", "Gradient norm", runs)


def hellaswag_chart(runs: list, window: int) -> Chart | None:
    shown = having(runs, "hellaswag")
    if not shown:
        return None
    plot = Plot(shown, window=window)
    curves = [run.curve("hellaswag") for run in shown]
    beads = max(map(len, curves)) <= BEADS
    for run, curve in zip(shown, curves, strict=True):
        plot.line(plot.ax, run, curve, "" if beads else "mean", beads=beads)
    plot.reference(plot.ax, CHANCE, f"chance\n{CHANCE}")
    plot.reference(plot.ax, GPT2_HELLASWAG, f"GPT-2 124M\n{GPT2_HELLASWAG}")
    low = min(CHANCE, *(curve.values.min() for curve in curves))
    high = max(GPT2_HELLASWAG, *(curve.values.max() for curve in curves))
    plot.ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    plot.finish_x(plot.ax)
    plot.ax.set_ylabel("HellaSwag accuracy")
    plot.legend_above(plot.run_lines(beads), plot.average_lines())
    return plot.finish("hellaswag", "HellaSwag", runs)


def throughput_chart(runs: list, window: int) -> Chart | None:
    from matplotlib.ticker import PercentFormatter

    panels = [what for what in ("rate", "mfu") if having(runs, what)]
    shown = having(runs, *panels)
    if not shown:
        return None
    plot = Plot(shown, window=window, height=(0.35 + 0.5 * len(panels)) * HEIGHT, rows=len(panels))
    for ax, what in zip(plot.axes[:, 0], panels, strict=True):
        tops = []
        for run in having(shown, what):
            scale = 0.01 if run.tag(what) == "mfu(%)" else 1.0
            plot.line(ax, run, run.curve(what), "median", scale)
            tops.append(scale * np.percentile(run.curve(what).values, 99.5))
        ax.set_ylim(0, 1.12 * max(tops) or 1)
        ax.yaxis.get_major_locator().set_params(nbins=5)
        ax.set_ylabel("tokens per second" if what == "rate" else "MFU")
        percent = PercentFormatter(1.0, 0 if max(tops) > 0.05 else None)
        ax.yaxis.set_major_formatter("{x:,.0f}" if what == "rate" else percent)
    plot.finish_x(plot.axes[-1, 0])
    if "mfu" in panels:
        plot.notes.append("MFU: the share of the machine's arithmetic that is useful.")
    plot.legend_above(plot.run_lines(), plot.average_lines())
    return plot.finish("throughput", "Throughput", runs)


def other_charts(runs: list, window: int) -> Chart | None:
    """What is in the files beyond the tags above, small."""
    tags = sorted(set().union(*(run.other_tags for run in runs)))
    if not tags:
        return None
    columns = min(3, len(tags))
    rows = math.ceil(min(len(tags), OTHER_CHARTS) / columns)
    plot = Plot(runs, height=0.5 + 1.4 * rows, rows=rows, columns=columns)
    for i, ax in enumerate(plot.axes.flat):
        if i >= len(tags):
            ax.set_visible(False)
            continue
        for run in runs:
            curve = run.curves[tags[i]].finite() if tags[i] in run.curves else None
            if curve:
                plot.line(ax, run, curve)
        title = tags[i] if len(tags[i]) <= 34 else f"…{tags[i][-33:]}"
        ax.set_title(title, fontsize=7.5, loc="left", parse_math=False)
        ax.tick_params(labelsize=7)
        plot.finish_x(ax)
        ax.xaxis.get_major_locator().set_params(nbins=4)
        ax.yaxis.get_major_locator().set_params(nbins=4)
        ax.set_xlabel("step" if i + columns >= len(tags[:OTHER_CHARTS]) else "", fontsize=8)
    plot.legend_above(plot.run_lines())
    if len(tags) > OTHER_CHARTS:
        plot.notes.append(f"{len(tags) - OTHER_CHARTS} more tags are in scalars.csv.")
    return plot.finish("other", "Other scalars", runs)


def all_charts(runs: list, window: int) -> list[Chart]:
    """Every chart that has something to show."""
    import matplotlib

    losses = {"steps": "by step", "tokens": "by tokens", "hours": "by training time"}
    others = (lr_chart, norm_chart, hellaswag_chart, throughput_chart, other_charts)
    with matplotlib.rc_context(LOOKS):
        charts = [loss_chart(runs, k, f"Loss {words}", window) for k, words in losses.items()]
        charts += [make(runs, window) for make in others]
    return [chart for chart in charts if chart is not None]


NAMES = (
    "loss_steps loss_tokens loss_hours learning_rate gradient_norm hellaswag throughput other"
).split()
