"""The look of the report and the few pieces of HTML that it is made of. No scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif;
  --mono: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  --page: #ffffff; --panel: #f6f7f9; --ink: #161a21; --ink-soft: #3a414d; --muted: #6b7280;
  --line: #e3e6eb; --grid: #e9ecf0; --accent: #2f6fde; --good: #15803d; --attention: #b45309;
  --curve-1: #2f6fde; --curve-2: #d9730d; --curve-3: #12946a; --curve-4: #8a4fd0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --panel: #1a1e25; --ink: #e9ecf1; --ink-soft: #c3c9d3; --muted: #939cab;
    --line: #2a303a; --grid: #252b34; --accent: #7aa8ff; --good: #4ade80; --attention: #fbbf24;
    --curve-1: #7aa8ff; --curve-2: #ffa657; --curve-3: #4fd1a1; --curve-4: #c39bff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1040px; padding: 56px 32px 80px; background: var(--page); color: var(--ink);
  font: 16px/1.6 var(--font); -webkit-text-size-adjust: 100%; text-rendering: optimizeLegibility;
}
h1 { font-size: 40px; line-height: 1.15; letter-spacing: -0.022em; font-weight: 680; margin: 6px 0 10px;
  overflow-wrap: anywhere; }
h2 { font-size: 22px; line-height: 1.3; letter-spacing: -0.012em; font-weight: 640; margin: 64px 0 4px; }
p { margin: 0 0 12px; }
.kicker { color: var(--muted); font-size: 14px; margin: 0; }
.lead { color: var(--ink-soft); font-size: 18px; max-width: 46em; margin: 0; }
.note { color: var(--muted); max-width: 46em; margin: 4px 0 18px; }
.state { color: var(--attention); font-weight: 600; }
.state.finished { color: var(--good); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 36px 0 0;
  border: 1px solid var(--line); border-radius: 12px; background: var(--line); overflow: hidden; }
.figures > div { background: var(--page); padding: 18px 20px 16px; }
.figures b { display: block; font-size: 26px; line-height: 1.2; letter-spacing: -0.015em; font-weight: 640;
  font-variant-numeric: tabular-nums; }
.figures span { display: block; color: var(--muted); font-size: 13px; line-height: 1.4; margin-top: 4px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 28px; margin: 32px 0 0; font-size: 15px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th { color: var(--muted); font-weight: 500; font-size: 13px; text-align: left; }
th, td { padding: 9px 12px 9px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th:not(:first-child), td.number { text-align: right; padding: 9px 0 9px 24px; white-space: nowrap; }
td.strong { font-weight: 640; }
td small { color: var(--muted); font-size: 13px; margin-left: 6px; }
tr.group td { border-bottom: 0; padding: 22px 0 2px; font-weight: 600; }
tr:last-child td { border-bottom: 0; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 36px 40px; margin-top: 20px; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.plots figcaption { order: -1; }
.plots figure { display: flex; flex-direction: column; }
figcaption { color: var(--muted); font-size: 14px; line-height: 1.5; max-width: 60em; }
figcaption b { color: var(--ink); font-weight: 600; font-size: 15px; }
.plots figcaption { min-height: 3.1em; margin-bottom: 8px; }
.plots figure.wide figcaption { min-height: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
.picture { margin: 20px 0 36px; }
.picture img { display: block; width: 100%; height: auto; border-radius: 12px; border: 1px solid var(--line);
  background: #ffffff; margin-bottom: 12px; }
details { border-top: 1px solid var(--line); padding: 12px 0; }
details:first-of-type { margin-top: 16px; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 560; }
summary span { color: var(--muted); font-weight: 400; }
pre, code { font: 13px/1.6 var(--mono); }
pre { background: var(--panel); border-radius: 8px; padding: 16px 20px; overflow-x: auto; margin: 12px 0 4px; }
footer { color: var(--muted); font-size: 13px; margin-top: 64px; }
@media (max-width: 720px) {
  body { padding: 32px 18px 56px; } h1 { font-size: 30px; } .plots { grid-template-columns: 1fr; }
  .plots figcaption { min-height: 0; }
}
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document; `body` is HTML, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n"
        "</html>\n"
    )


def section(title: str, *parts: str, note: str = "") -> str:
    opening = f"<h2>{escape(title)}</h2>" + (f'<p class="note">{escape(note)}</p>' if note else "")
    return f"<section>{opening}{''.join(parts)}</section>"


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """The key figures as a row of tiles: (value, what it is)."""
    tiles = (f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for value, label in pairs)
    return f'<div class="figures">{"".join(tiles)}</div>' if pairs else ""


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{''.join(rows)}</dl>" if pairs else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], strong: int | None = None) -> str:
    """Rows of HTML cells, the first column text, the others numbers; a row of one cell heads a group."""
    lines = []
    for row in rows:
        if len(row) == 1:
            lines.append(f'<tr class="group"><td colspan="{len(head)}">{row[0]}</td></tr>')
            continue
        kinds = ["", *(' class="number strong"' if n == strong else ' class="number"' for n in range(1, len(row)))]
        lines.append("<tr>" + "".join(f"<td{k}>{cell}</td>" for k, cell in zip(kinds, row, strict=True)) + "</tr>")
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def plot_figure(svg: str, title: str, caption: str, wide: bool = False) -> str:
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}<figcaption><b>{escape(title)}</b><br>{escape(caption)}</figcaption></figure>"


def picture_figure(data_uri: str, title: str, caption: str) -> str:
    text = f"<b>{escape(title)}</b>" + (f" {escape(caption)}" if caption else "")
    image = f'<img src="{data_uri}" alt="{escape(title)}">'
    return f'<figure class="picture">{image}<figcaption>{text}</figcaption></figure>'


def folded(title: str, remark: str, text: str) -> str:
    return (
        f"<details><summary>{escape(title)} <span>{escape(remark)}</span></summary><pre>{escape(text)}</pre></details>"
    )
