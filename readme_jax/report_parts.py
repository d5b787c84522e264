"""The pieces of the report page: escaping, tables, bars, heat maps, line charts, and the style sheet.

Charts are HTML boxes and inline SVG made here, so that the page needs no plotting package, reflows on a phone and
follows the reader's light or dark setting. Colours are Okabe and Ito's colour-blind-safe set; no figure is told by
colour alone (bars and cells carry their number, the strip the number of the expert).
"""

import html
import math
from typing import Any

# ---- pieces -----------------------------------------------------------------------------------

_CONTROL = {c: "\N{REPLACEMENT CHARACTER}" for c in (*range(9), 11, 12, *range(14, 32), *range(127, 160))}


def esc(text: Any) -> str:
    """Any text as HTML content or a quoted attribute; control characters become U+FFFD."""
    return html.escape(str(text).translate(_CONTROL), quote=True)


def section(title: str, body: str, note: str = "") -> str:
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{esc(title)}</h2>{note}{body}</section>"


def table(head: list[str], rows: list[list[str]], name: str, kind: str = "") -> str:
    """A table of HTML cells that scrolls sideways on its own; the first column holds the rows' headings."""
    top = "".join(f'<th scope="col">{c}</th>' for c in head)
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    kind = f' class="{kind}"' if kind else ""
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{esc(name)}">'
        f"<table{kind}>{top}<tbody>{body}</tbody></table></div>"
    )


def bar(
    label: str, share: float, value: str, kind: str, whisker: tuple[float, float] | None = None, tip: str = ""
) -> str:
    """One horizontal bar: `share` and the whisker's ends are 0 to 1 of the track."""
    line = ""
    if whisker:
        low, high = (min(max(x, 0.0), 1.0) for x in whisker)
        line = f'<i class="err" style="left:{low:.2%};width:{high - low:.2%}"></i>'
    return (
        f'<div class="bar" title="{esc(tip)}"><span class="name">{label}</span><span class="track">'
        f'<span class="fill {kind}" style="width:{max(share, 0.0):.2%}"></span>{line}</span>'
        f'<span class="val">{value}</span></div>'
    )


def heat(rows: list[str], columns: list[str], values: list[list[float]], low: float, name: str, corner: str) -> str:
    """A matrix of shares as a table of shaded cells; `low` gets no shade, 1 the full one."""
    body = []
    for label, line in zip(rows, values):
        cells = [esc(label)]
        for column, value in zip(columns, line):
            depth = min(max((value - low) / (1 - low), 0.0), 1.0) if low < 1 else 0.0
            tip = esc(f"{label} / {column}: {value:.1%}")
            high = " hi" if depth > 0.72 else ""
            cells.append(f'<td class="heat{high}" style="--a:{depth:.3f}" title="{tip}">{100 * value:.0f}</td>')
        body.append(cells)
    head = [esc(corner), *(f"<span>{esc(c)}</span>" for c in columns)]
    return table(head, body, name, kind="matrix many" if len(columns) > 9 else "matrix")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    span = (high - low) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(k for k in (1, 2, 5, 10) if span / (step * k) <= count + 0.5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: dict[str, tuple[str, list[list[float]]]]) -> str:
    """An inline SVG of loss over step. `lines`: label -> (CSS class of its colour, [[step, loss], ...] unsorted)."""
    lines = {label: (kind, sorted(points)) for label, (kind, points) in lines.items() if points}
    if not lines:
        return f'<figure><figcaption>{esc(title)}</figcaption><p class="note">No steps were recorded.</p></figure>'
    every = [p for _, points in lines.values() for p in points]
    x_low, x_high = min(p[0] for p in every), max(p[0] for p in every)
    y_low, y_high = min(p[1] for p in every), max(p[1] for p in every)
    pad = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = y_low - pad, y_high + pad
    width, height, left, bottom = 440, 250, 48, 36

    def at(step: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 14) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5)
        return x, (height - bottom) - (height - bottom - 10) * (loss - y_low) / (y_high - y_low)

    parts = []
    for tick in ticks(y_low, y_high):
        y = at(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 14}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(x_low, x_high):
        parts.append(
            f'<text x="{at(tick, y_low)[0]:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:,.4g}</text>'
        )
    parts.append(f'<text x="{(left + width - 14) / 2}" y="{height - 2}" text-anchor="middle">step</text>')
    for label, (kind, points) in lines.items():
        thin = points[:: max(1, len(points) // 600)]
        thin += [points[-1]] if thin[-1] is not points[-1] else []
        path = " ".join("{:.1f},{:.1f}".format(*at(*p)) for p in thin)
        parts.append(f'<polyline class="line {kind}" points="{path}"/>')
        for p in [points[-1]] if len(points) > 40 else points:
            tip = esc(f"{label}: step {p[0]:g}, loss {p[1]:.4g}")
            parts.append(
                '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>'.format(
                    kind, *at(*p), tip
                )
            )
    keys = "".join(
        f'<span><i class="swatch {kind}"></i>{esc(label)}, last {points[-1][1]:.4g}</span>'
        for label, (kind, points) in lines.items()
    )
    return (
        f'<figure><figcaption>{esc(title)}</figcaption><div class="legend">{keys}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(title)}">{"".join(parts)}</svg></figure>'
    )


# ---- style ------------------------------------------------------------------------------------
# ASCII, light and dark, one column on a phone. Arm colours: grey dense, orange static, green own domain, blue routed;
# the untuned arms are tinted and outlined, so a pair is told apart without colour. --e0 to --e7 are Okabe and Ito's,
# blue and black lightened on a dark page.

CSS = """
:root{--page:#f6f7f9;--card:#fff;--ink:#16191f;--soft:#5a6270;--line:#dfe3e9;--track:#eef0f4;--seq:0 93 176;
--onseq:#fff;--dense:#7b8391;--static:#d98200;--own:#009e73;--routed:#0072b2;--good:#00734f;--bad:#a83e00;--tint:26%;--shade:#0002;
--e0:#0072b2;--e1:#e69f00;--e2:#009e73;--e3:#d55e00;--e4:#56b4e9;--e5:#cc79a7;--e6:#f0e442;--e7:#3b3f46}
@media (prefers-color-scheme:dark){:root{--page:#0f1115;--card:#181b21;--ink:#e9ecf1;--soft:#a0a9b8;--line:#2c313a;
--track:#242932;--seq:70 150 220;--onseq:#0b1016;--dense:#9aa3b2;--static:#e69f00;--own:#10b184;--routed:#4aa3e0;
--good:#3ecf9c;--bad:#ff9a62;--tint:34%;--shade:#fff3;--e0:#2f86cc;--e2:#00a87a;--e3:#e0691a;--e4:#8fd0f5;--e7:#6a707c}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-text-size-adjust:100%}
main{max-width:1040px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:30px;line-height:1.15;margin:2px 0 4px;overflow-wrap:anywhere}
h2{font-size:19px;margin:0 0 4px}
h3,figcaption{font-size:14px;font-weight:600;margin:0 0 8px}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;margin:16px 0}
.kicker{color:var(--soft);font-size:13px;letter-spacing:.06em;text-transform:uppercase;margin:0}
.note{color:var(--soft);font-size:14px;margin:0 0 14px;max-width:76ch;overflow-wrap:anywhere}
header .note{margin:0}
.verdict{border-left:4px solid var(--good);padding:2px 0 2px 12px;margin:16px 0;font-size:17px}
.verdict b{color:var(--good)}
.verdict.loses{border-color:var(--bad)}.verdict.loses b{color:var(--bad)}
.verdict.noise{border-color:var(--soft)}.verdict.noise b{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:14px 16px;display:flex;
flex-direction:column}
.tile b{font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile span{font-size:14px}
.tile small,small{color:var(--soft);font-size:12.5px}
.scroll{overflow-x:auto;background:linear-gradient(270deg,var(--card) 40%,transparent) 100% 0/40px 100% no-repeat local,
linear-gradient(270deg,var(--shade),transparent) 100% 0/12px 100% no-repeat scroll}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
thead th{color:var(--soft);font-weight:500;vertical-align:bottom;white-space:normal}
tbody tr:last-child>*{border-bottom:0}
th:first-child,td:first-child{text-align:left;padding-left:0}
tbody th{font-weight:500}
.words td{text-align:left;white-space:normal}.words th{text-align:left;white-space:normal}
.pass,.fail{white-space:nowrap}
td.best{font-weight:700;color:var(--routed);background:rgb(var(--seq)/.12);border-radius:4px}
.bars{display:grid;gap:9px}
.bars.wide{margin:0 0 18px}
.bar{display:grid;grid-template-columns:minmax(90px,170px) 1fr 56px;gap:12px;align-items:center;font-size:14px}
.bar .name{overflow-wrap:anywhere}
.bar .val{font-variant-numeric:tabular-nums;text-align:right}
.track{position:relative;height:18px;background:var(--track);border-radius:4px}
.fill{position:absolute;inset:0 auto 0 0;border-radius:4px;background:var(--c)}
.err{position:absolute;top:50%;height:0;border-top:2px solid var(--ink)}
.err::before,.err::after{content:"";position:absolute;top:-6px;height:10px;border-left:2px solid var(--ink)}
.err::after{right:0}
.arm-dense{--c:var(--dense)}
.arm-static,.arm-static_tuned{--c:var(--static)}
.arm-own_domain{--c:var(--own)}
.arm-routed,.arm-routed_tuned{--c:var(--routed)}
.fill.arm-static,.fill.arm-routed,.fill.arm-own_domain{border:1.5px solid var(--c);
background:repeating-linear-gradient(135deg,var(--c) 0 3px,transparent 3px 7px);
background:color-mix(in srgb,var(--c) 34%,transparent)}
.two{display:grid;grid-template-columns:1fr 1fr;gap:28px}
.three{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:18px}
.matrix{width:auto;border-collapse:separate;border-spacing:2px}
.matrix th,.matrix td{border:0;padding:6px 4px}
.matrix th:first-child{padding-right:10px}
.matrix thead th{text-align:center;font-size:12.5px;overflow-wrap:anywhere}
.matrix thead th:first-child{text-align:left}.matrix thead th+th{width:82px}
.many thead th+th{width:auto}.many thead th+th span{display:inline-block;writing-mode:vertical-rl;
transform:rotate(180deg);white-space:nowrap;max-height:150px;overflow:hidden}
.many td.heat{min-width:38px}
td.heat{text-align:center;border-radius:4px;background:rgb(var(--seq)/var(--a))}
td.heat.hi{color:var(--onseq)}
figure,.two>*{margin:0;min-width:0}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12.5px}
.grid{stroke:var(--line);stroke-width:1}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.line.arm-static_tuned{stroke-dasharray:6 3}
.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13.5px;margin:0 0 10px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.swatch{width:14px;height:14px;border-radius:3px;background:var(--c);flex:none}
.e0{--c:var(--e0)}.e1{--c:var(--e1)}.e2{--c:var(--e2)}.e3{--c:var(--e3)}
.e4{--c:var(--e4)}.e5{--c:var(--e5)}.e6{--c:var(--e6)}.e7{--c:var(--e7)}
.strip{margin:0;font:14.5px/2.15 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.t{padding:2px 0;border-bottom:3px solid var(--c);background:var(--c);
background:color-mix(in srgb,var(--c) var(--tint),transparent)}
.again1{border-bottom-style:dashed}.again2{border-bottom-style:dotted}
.swatch.again1,.swatch.again2{background:none;border:3px dashed var(--c)}.swatch.again2{border-style:dotted}
.t sup{font-size:10px;font-weight:700;line-height:0;margin:0 1px;user-select:none}
dl{margin:8px 0 16px;display:grid;grid-template-columns:170px 1fr;gap:8px 16px;font-size:14.5px}
dt{font-weight:600}dd{margin:0}
dl+.note{margin:0}
article{border-top:1px solid var(--line);padding:14px 0}
article:first-of-type{border-top:0;padding-top:0}
.prompt{font-weight:600;margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere}
.text{margin:0;font-size:14px;white-space:pre-wrap;overflow-wrap:anywhere}
.three h3{color:var(--soft);font-weight:500;margin:0 0 3px;font-size:13px}
.pass{color:var(--good);font-weight:600}.fail{color:var(--bad);font-weight:700}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow-x:auto;margin:8px 0 0}
summary{cursor:pointer;padding:6px 0;font-weight:500}
@media (max-width:720px){
main{padding:18px 12px 40px}section{padding:16px 14px}
.tiles,.two{grid-template-columns:1fr 1fr}.two{grid-template-columns:1fr}
h1{font-size:25px}.tile{padding:11px 12px}.tile b{font-size:24px}
.bar{grid-template-columns:1fr auto;gap:3px 10px}.bar .track{grid-column:1/-1;grid-row:2}
dl{grid-template-columns:1fr;gap:2px}dd{margin:0 0 10px}
.facts th,.facts td{white-space:normal}th,td{padding:6px 7px}
table{font-size:13.5px}.matrix th,.matrix td{padding:6px 3px}td.heat{min-width:36px}
.matrix thead th+th{width:auto}.matrix thead th+th span{display:inline-block;writing-mode:vertical-rl;
transform:rotate(180deg);white-space:nowrap;max-height:130px;overflow:hidden}
.matrix th:first-child,.scroll th:first-child{position:sticky;left:0;background:var(--card)}}
@media print{body{background:#fff}section{break-inside:avoid}}
"""
