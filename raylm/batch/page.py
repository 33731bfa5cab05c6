"""Page: a report as one HTML file, which needs no script and no network.

Every text that is not of this file goes through `_text`. Plots are SVG of the page's width: horizontal places are
shares of it, vertical ones are pixels, so that letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from raylm._version import __version__
from raylm.batch.report import (
    Distribution,
    Report,
    RunReport,
    Saying,
    Throughput,
    aside,
    duration,
    engine_words,
    moment,
    number,
    percentiles,
    plural,
    printable,
    shares,
    span,
    state_words,
)

_MOST_SLOTS = 64
_MOST_LETTERS = 32
_MOST_MARKS = 8
_HEIGHT = 200
_TOP, _BASE = 34, _HEIGHT - 26
"""Where a plot's greatest value and its zero are, in pixels from its top."""

_TIME_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)


def to_html(report: Report) -> bytes:
    """Return the page of a report, in UTF-8."""
    name = _text(report.output)
    unfinished = ""
    if report.state != "finished":
        unfinished = f'<p class="note"><strong>Not finished:</strong> {_text(state_words(report))}.</p>'
    simulated = ""
    if report.simulated:
        of_all = "" if report.simulated == report.answered else f"{report.simulated:,} of these answers are of it. "
        simulated = (
            f'<p class="note"><strong>Simulated engine.</strong> {of_all}It is a clock that writes words at a set '
            "rate: these figures show how the job ran, and nothing of a model&rsquo;s speed.</p>"
        )
    engines = " &middot; ".join(
        _text(engine_words(engine)) + (f" ({engine.rows:,} rows)" if len(report.engines) > 1 else "")
        for engine in report.engines
    )
    latency = "Rows by the time from first sending to answer, queue and retries included."
    answers = f"Rows by tokens generated. Ended by {_text(shares(report.finish_reasons) or 'nothing')}."
    body = f"""
<header>
<p class="kind">raylm batch report</p>
<h1>{name}</h1>
<p class="muted">{engines or "nothing was answered yet"}</p>
<p class="muted">As of {_text(moment(report.made_at))}</p>
</header>
{unfinished}
{simulated}
{_rows(report)}
{_tiles(report)}
{_throughput(report)}
<div class="pair">
{_distribution("latency", "Latency", latency, report.latency_s, span)}
{_distribution("queue", "Queue", "Rows by their time in the pool&rsquo;s queue.", report.queue_s, span)}
{_distribution("prompts", "Prompt lengths", "Rows by tokens of the prompt.", report.prompt_lengths, number, whole=True)}
{_distribution("answers", "Answer lengths", answers, report.answer_lengths, number, whole=True)}
</div>
{_slots(report)}
{_failures(report)}
{_runs(report.runs, report.num_runs)}
<footer class="muted">raylm {__version__}. Made of this job&rsquo;s ledger; the time between runs is left out.</footer>
"""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name} - raylm batch report</title>
<link rel="icon" href="data:,">
<style>{_STYLE}</style>
</head>
<body>
<main>{body}</main>
</body>
</html>
"""
    return page.encode()


def _text(text: object) -> str:
    return escape(printable(text))


# Parts


def _rows(report: Report) -> str:
    total = max(report.rows, report.total or 0)
    left = total - report.rows
    if not total:
        said = "No row has ended yet."
    elif report.answered == total:
        said = f"All {total:,} rows answered." if total > 1 else "The one row is answered."
    else:
        parts = [f"{report.failed:,} failed"] if report.failed else []
        parts += [f"{left:,} to come"] if left else []
        said = f"{report.answered:,} of {total:,} rows answered, {', '.join(parts)}."
    kinds = (
        ("good", report.answered - report.shared, "answered"),
        ("same", report.shared, "the same as another row"),
        ("bad", report.failed, "failed"),
        ("left", left, "to come"),
    )
    bar, at = "", 0.0
    for kind, count, what in kinds:
        if count:
            share = 100 * count / total
            bar += (
                f'<rect class="{kind}" x="{at:.3f}%" y="0" width="{share:.3f}%" height="14">'
                f"<title>{count:,} {what}</title></rect>"
            )
            at += share
    legend = "".join(f'<li><i class="{kind}"></i>{count:,} {what}</li>' for kind, count, what in kinds if count)
    told = aside(report)
    more = f'<p class="muted">{_text(", ".join(told))}</p>' if told else ""
    return f"""<section aria-label="Rows">
<p class="verdict">{said}</p>
<svg class="strip" height="14" role="img" aria-label="{said}">{bar}</svg>
<ul class="legend">{legend}</ul>
{more}
</section>"""


def _tiles(report: Report) -> str:
    tiles = [
        ("Tokens generated", f"{report.completion_tokens:,}", f"{report.prompt_tokens:,} read"),
        (
            "Tokens a second",
            number(round(report.tokens_per_s, 1)),
            f"{number(round(report.rows_per_s, 2))} rows a second",
        ),
        ("Time", duration(report.seconds), f"in {plural(report.num_runs, 'run')}"),
    ]
    if report.latency_s.num:
        tiles.append(("Median latency", span(report.latency_s.p50), f"p99 {span(report.latency_s.p99)}"))
    if report.cached_tokens:
        share = report.cached_tokens / max(1, report.prompt_tokens)
        tiles.append(("Prompt cache", f"{share:.0%}", f"{report.cached_tokens:,} tokens"))
    cells = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd><dd class='muted'>{_text(more)}</dd></div>"
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _throughput(report: Report) -> str:
    found = report.throughput
    rates = found.tokens_per_s
    what = "Tokens generated a second, while a run was at work. The dashed line is the mean."
    if not report.completion_tokens or not report.seconds:
        return _figure("throughput", "Throughput", what, _nothing("No token was generated yet."), "")
    most, mean = max(rates), report.tokens_per_s
    caption = (
        f"{mean:,.0f} tokens/s over {duration(report.seconds)}, {most:,.0f} at most"
        f"{_fading(found, report.num_runs)}. Each step is the mean of {span(found.step_s)}."
    )
    top = _top(most)
    height = _BASE - _TOP
    steps = "".join(f"H{index}V{_share(top - rate, top):.2f}H{index + 1}" for index, rate in enumerate(rates))
    line = f"M0 100{steps}V100"
    area = (
        f'<svg class="inner" x="0" y="{_TOP}" width="100%" height="{height}" viewBox="0 0 {len(rates)} 100" '
        f'preserveAspectRatio="none"><path class="area" d="{line}Z"/><path class="line" d="{line}"/></svg>'
    )
    width = 100 / len(rates)
    hints = "".join(
        f'<rect class="hint" x="{index * width:.3f}%" y="{_TOP}" width="{width:.3f}%" height="{height}">'
        f"<title>{_clock(index * found.step_s)} to {_clock((index + 1) * found.step_s)}: {rate:,.0f} tokens/s</title>"
        "</rect>"
        for index, rate in enumerate(rates)
    )
    marks = ""
    if len(found.runs_at_s) > 1:
        labelled = len(found.runs_at_s) <= _MOST_MARKS
        for run, at_s in enumerate(found.runs_at_s, 1):
            at = 100 * at_s / report.seconds
            label = f'<text class="mark" x="{at:.3f}%" y="24" dx="4">run {run}</text>' if labelled else ""
            marks += f'<line class="mark" x1="{at:.3f}%" x2="{at:.3f}%" y1="14" y2="{_BASE}"/>{label}'
    y_mean = _BASE - _share(mean, top) * height / 100
    marks += f'<line class="mean" x1="0" x2="100%" y1="{y_mean:.1f}" y2="{y_mean:.1f}"/>'
    plot = _plot(caption, top, number, area + hints + marks + _time_axis(report.seconds))
    table = _table(
        ("Time of work", "Tokens/s"),
        ((_clock(index * found.step_s), f"{rate:,.1f}") for index, rate in enumerate(rates)),
    )
    return _figure("throughput", "Throughput", what, plot, caption, table)


def _fading(found: Throughput, num_runs: int) -> str:
    """Return what there is to say about the course, so that the plot need not be seen."""
    rates = found.tokens_per_s
    if len(rates) < 6:
        return ""
    third = len(rates) // 3
    parts = [sum(part) / len(part) for part in (rates[:third], rates[third:-third], rates[-third:])]
    said = ", ".join(f"{part:,.0f}" for part in parts)
    runs = f", in {num_runs} runs" if num_runs > 1 else ""
    return f"; {said} in its first, second and last third{runs}"


def _distribution(name: str, title: str, what: str, found: Distribution, said: Saying, *, whole: bool = False) -> str:
    if not found.num:
        return _figure(name, title, what, _nothing("No row was answered yet."), "")
    tokens = " tokens" if whole else ""
    caption = f"{percentiles(found, said)}{tokens}; mean {said(found.mean)}, min {said(found.min)}, {found.num:,} rows."
    edges, counts = found.edges, found.counts
    top = _top(max(counts))
    width = 100 / len(counts)
    bars = []
    for index, count in enumerate(counts):
        if count:
            height = max(1.0, _share(count, top) * (_BASE - _TOP) / 100)
            bars.append(
                f'<rect class="bar" x="{index * width:.3f}%" y="{_BASE - height:.1f}" width="{width:.3f}%" '
                f'height="{height:.1f}">'
                f"<title>{_range(edges, index, said, whole=whole)}{tokens}: {count:,} rows</title></rect>"
            )
    marks = "".join(
        f'<line class="mark" x1="{at:.3f}%" x2="{at:.3f}%" y1="{y - 8}" y2="{_BASE}"/>'
        f'<text class="mark" x="{at:.3f}%" y="{y}" {"dx=-4 text-anchor=end" if at > 50 else "dx=4"}>{label}</text>'
        for label, y, at in (
            ("p50", 10, _place(edges, found.p50, whole=whole)),
            ("p90", 21, _place(edges, found.p90, whole=whole)),
            ("p99", 32, _place(edges, found.p99, whole=whole)),
        )
    )
    plot = _plot(caption, top, number, "".join(bars) + marks + _edge_axis(edges, said, whole=whole))
    table = _table(
        ("Tokens" if whole else "Time", "Rows"),
        ((_range(edges, index, said, whole=whole), f"{count:,}") for index, count in enumerate(counts) if count),
    )
    return _figure(name, title, what, plot, caption, table)


def _slots(report: Report) -> str:
    slots = report.slots
    what = "Share of the generated tokens. The dashed lines are an even share."
    if not slots:
        return _figure("slots", "Actors", what, _nothing("No row was answered yet."), "")
    least, most = min(slots, key=lambda slot: slot.share), max(slots, key=lambda slot: slot.share)
    caption = (
        f"{plural(len(slots), 'slot')}; slot {least.slot} has the least with {least.share:.1%}, slot {most.slot} the "
        f"most with {most.share:.1%}."
        if len(slots) > 1
        else f"One slot has answered all {plural(slots[0].rows, 'row')}."
    )
    shown = slots[:_MOST_SLOTS]
    full = max(most.share, 1 / len(slots), 1e-9)
    even = 100 / len(slots) / full
    bars = []
    for index, slot in enumerate(shown):
        y = index * 36
        node = f"slot {slot.slot} on {_text(slot.node)}"
        short = slot.node if len(slot.node) <= _MOST_LETTERS else f"{slot.node[: _MOST_LETTERS - 3]}..."
        actors = f", {slot.actors} actors" if slot.actors > 1 else ""
        told = f"{slot.rows:,} rows, {slot.tokens:,} tokens, {slot.share:.1%}{actors}"
        bars.append(
            f'<text x="0" y="{y + 12}">slot {slot.slot} on {_text(short)}</text>'
            f'<text class="muted" x="100%" y="{y + 12}" text-anchor="end">{slot.share:.1%}</text>'
            f'<rect class="track" x="0" y="{y + 18}" width="100%" height="10"/>'
            f'<rect class="bar" x="0" y="{y + 18}" width="{100 * slot.share / full:.3f}%" height="10">'
            f"<title>{node}: {told}</title></rect>"
            f'<line class="mean" x1="{even:.3f}%" x2="{even:.3f}%" y1="{y + 15}" y2="{y + 31}"/>'
        )
    height = len(shown) * 36
    plot = f'<svg class="shares" height="{height}" role="img" aria-label="{_text(caption)}">{"".join(bars)}</svg>'
    if len(slots) > len(shown):
        plot += f'<p class="muted">and {plural(len(slots) - len(shown), "more slot")}</p>'
    table = _table(
        ("Slot", "Node", "Actors", "Rows", "Tokens", "Share"),
        (
            (str(slot.slot), slot.node, str(slot.actors), f"{slot.rows:,}", f"{slot.tokens:,}", f"{slot.share:.1%}")
            for slot in slots
        ),
    )
    return _figure("slots", "Actors", what, plot, caption, table)


def _failures(report: Report) -> str:
    if not report.failures:
        return ""
    kinds = "".join(
        f"<dt><code>{_text(failure.type)}</code><span>{plural(failure.rows, 'row')}</span></dt><dd>"
        + "".join(
            f"<p><strong>{_text(example.id)}</strong> {_text(example.message)}</p>" for example in failure.examples
        )
        + "</dd>"
        for failure in report.failures
    )
    return f"""<section aria-labelledby="failures">
<h2 id="failures">Failures</h2>
<p class="muted">The first rows of each type of error, by their ids.</p>
<dl class="failures">{kinds}</dl>
</section>"""


def _runs(runs: Sequence[RunReport], num_runs: int) -> str:
    if not runs:
        return ""
    first = num_runs - len(runs) + 1
    more = f'<p class="muted">The last {len(runs)} of {num_runs:,}.</p>' if first > 1 else ""
    table = _table(
        ("Run", "Begun", "By", "Time", "Rows", "Tokens"),
        (
            (
                f"{place:,}",
                moment(run.started_at),
                f"process {run.pid} on {run.host}",
                duration(run.seconds),
                f"{run.rows:,}",
                f"{run.tokens:,}",
            )
            for place, run in enumerate(runs, first)
        ),
    )
    return f'<section aria-labelledby="runs"><h2 id="runs">Runs</h2>{more}{table}</section>'


# Plots


def _figure(name: str, title: str, what: str, plot: str, caption: str, table: str = "") -> str:
    told = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    data = f"<details><summary>Figures of this plot</summary>{table}</details>" if table else ""
    return f"""<figure id="{name}" aria-labelledby="{name}-title">
<h2 id="{name}-title">{title}</h2>
<p class="muted">{what}</p>
{plot}
{told}
{data}
</figure>"""


def _nothing(said: str) -> str:
    return f'<p class="nothing">{said}</p>'


def _plot(label: str, top: float, said: Saying, content: str) -> str:
    lines = []
    for part in (0, 1, 2):
        y = _BASE - part * (_BASE - _TOP) / 2
        lines.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="0" dx="-8" y="{y + 4:.1f}" text-anchor="end">{said(top * part / 2)}</text>'
        )
    return (
        f'<svg class="plot" height="{_HEIGHT}" role="img" aria-label="{_text(label)}">{"".join(lines)}{content}</svg>'
    )


def _top(most: float) -> float:
    """Return a round number at or a little above the greatest value; its half is round too."""
    if not most:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most))
    return float(
        f"{next(power * digit for digit in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if power * digit >= most):.12g}"
    )


def _share(value: float, top: float) -> float:
    return 100 * value / top


def _time_axis(seconds: float) -> str:
    step = next((step for step in _TIME_STEPS if seconds / step <= 4.5), 86400 * math.ceil(seconds / 86400 / 4))
    ticks = []
    for index in range(int(seconds / step) + 1):
        at = 100 * index * step / seconds
        anchor = "start" if index == 0 else "end" if at > 96 else "middle"
        ticks.append(f'<text x="{at:.3f}%" y="{_BASE + 18}" text-anchor="{anchor}">{_clock(index * step)}</text>')
    return "".join(ticks)


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _edge_axis(edges: Sequence[float], said: Saying, *, whole: bool) -> str:
    """Label some of the limits of bars; a bar of one whole number has it below its middle."""
    num = len(edges) - 1
    stride = max(1, math.ceil(num / 4))
    ticks = []
    for index in range(0, num + 1, stride):
        if whole and index < num and edges[index + 1] - edges[index] == 1:
            at, anchor = 100 * (index + 0.5) / num, "middle"
        elif whole and index == num and edges[index] - edges[index - 1] == 1:
            continue
        else:
            at = 100 * index / num
            anchor = "start" if index == 0 else "end" if index == num else "middle"
        ticks.append(f'<text x="{at:.3f}%" y="{_BASE + 18}" text-anchor="{anchor}">{said(edges[index])}</text>')
    return "".join(ticks)


def _place(edges: Sequence[float], value: float, *, whole: bool) -> float:
    """Return where a value is among bars of equal width, in percent."""
    num = len(edges) - 1
    index = next((index for index in range(num) if value < edges[index + 1]), num - 1)
    low, high = edges[index], edges[index + 1]
    within = (value + (0.5 if whole else 0.0) - low) / (high - low)
    return 100 * (index + min(max(within, 0.0), 1.0)) / num


def _range(edges: Sequence[float], index: int, said: Saying, *, whole: bool) -> str:
    low, high = edges[index], edges[index + 1]
    if not whole:
        return f"{said(low)} to {said(high)}"
    return said(low) if high - low == 1 else f"{said(low)} to {said(high - 1)}"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose last columns are numbers. `rows` are texts of any kind."""
    plain = {
        "Slot",
        "Node",
        "Run",
        "Begun",
        "By",
        "Tokens" if len(names) == 2 else "",
        "Time" if len(names) == 2 else "",
    }
    kinds = ["" if name in plain else ' class="num"' for name in names]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


_STYLE = """
:root {
  color-scheme: light dark;
  --page: light-dark(#f6f7f8, #101416);
  --surface: light-dark(#ffffff, #171c1f);
  --sunken: light-dark(#e6e9ec, #262d32);
  --line: light-dark(#dcdfe3, #2a3136);
  --text: light-dark(#171b1f, #e4e8ea);
  --muted: light-dark(#59626b, #98a3ab);
  --accent: light-dark(#0b6b70, #58c4c6);
  --accent-soft: light-dark(#cfe6e6, #1d4544);
  --bar: light-dark(#3d9297, #46a3a6);
  --same: light-dark(#a3cfd1, #2b6466);
  --warn: light-dark(#8a5300, #e6b455);
  --warn-soft: light-dark(#fdf3e0, #2b2312);
  --bad: light-dark(#b3261e, #ff9089);
}
*, *::before, *::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 40px; }
h1, h2, p, ul, dl, dd, figure { margin: 0; padding: 0; }
h1 { font-size: 26px; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 15px; }
header p { overflow-wrap: anywhere; }
.kind { color: var(--accent); font-size: 12px; font-weight: 600; letter-spacing: .04em; text-transform: uppercase; }
.muted, figcaption, footer { color: var(--muted); }
.note {
  margin-top: 16px; padding: 10px 14px; border-left: 3px solid var(--warn); border-radius: 4px;
  background: var(--warn-soft);
}
.note strong { color: var(--warn); }
section, figure {
  margin-top: 16px; padding: 16px 18px; border: 1px solid var(--line); border-radius: 8px; background: var(--surface);
}
.verdict { margin-bottom: 10px; font-size: 18px; font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0 0; list-style: none; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 2px; }
i.good { background: var(--bar); } rect.good { fill: var(--bar); }
i.same { background: var(--same); } rect.same { fill: var(--same); }
i.bad { background: var(--bad); } rect.bad { fill: var(--bad); }
i.left { background: var(--sunken); } rect.left { fill: var(--sunken); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); gap: 16px; margin-top: 16px; }
.tiles div { padding: 12px 16px; border: 1px solid var(--line); border-radius: 8px; background: var(--surface); }
.tiles dt { color: var(--muted); font-size: 12px; }
.tiles dd { font-size: 22px; font-weight: 600; line-height: 1.35; }
.tiles dd.muted { font-size: 12px; font-weight: 400; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); column-gap: 16px; }
.pair figure { min-width: 0; }
svg { display: block; overflow: visible; }
svg.strip { width: 100%; border-radius: 4px; overflow: hidden; }
svg.shares { width: 100%; margin-top: 12px; overflow: hidden; }
svg.plot { width: calc(100% - 52px); margin: 10px 0 2px 52px; }
svg.inner { overflow: hidden; }
svg text { fill: var(--muted); font-size: 11.5px; }
svg.shares text:not(.muted) { fill: var(--text); font-size: 13px; }
svg.shares text { font-size: 13px; }
.grid { stroke: var(--line); }
.bar { fill: var(--bar); stroke: var(--surface); stroke-width: 1px; }
.shares .bar { stroke: none; }
.track { fill: var(--sunken); }
.bar:hover { fill: var(--accent); }
.area { fill: var(--accent-soft); }
.line { fill: none; stroke: var(--accent); stroke-width: 1.5px; vector-effect: non-scaling-stroke; }
.hint { fill: transparent; }
.hint:hover { fill: var(--accent); fill-opacity: .18; }
line.mark { stroke: var(--text); stroke-opacity: .5; stroke-dasharray: 2 3; }
svg text.mark { fill: var(--text); }
line.mean { stroke: var(--text); stroke-width: 1.5px; stroke-dasharray: 5 4; }
figcaption { margin-top: 4px; font-size: 13px; }
details { margin-top: 8px; }
summary { width: fit-content; color: var(--accent); font-size: 13px; cursor: pointer; }
.nothing { padding: 28px 0; color: var(--muted); text-align: center; }
.wide { overflow-x: auto; }
details .wide { max-height: 320px; overflow-y: auto; }
table { width: 100%; margin-top: 8px; border-collapse: collapse; font-size: 13px; }
th { color: var(--muted); font-weight: 600; text-align: left; white-space: nowrap; }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; }
.wide td { white-space: nowrap; }
code { font: 12px/1.5 ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.failures {
  display: grid; grid-template-columns: minmax(180px, auto) minmax(0, 1fr); margin-top: 10px; font-size: 13px;
}
.failures > * { padding: 8px 24px 8px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.failures > dd { padding-right: 0; }
.failures code, .failures span { display: block; }
.failures span { color: var(--muted); }
.failures p + p { margin-top: 4px; }
footer { margin-top: 20px; font-size: 12px; }
@media (max-width: 560px) {
  main { padding: 20px 12px 32px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  section, figure { padding: 14px 12px; }
  .failures { grid-template-columns: minmax(0, 1fr); }
  .failures > dt { padding: 8px 0 0; }
  .failures > dd { padding-top: 4px; border-top: 0; }
}
@media print {
  section, figure, .tiles div { break-inside: avoid; }
  details { display: none; }
}
"""
