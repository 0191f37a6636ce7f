"""The page's colours, light and dark, and its style sheet. Nothing is fetched: no font, no image.

A heat map's cell has one of nine levels: `none` and `cold` stand apart from the blue ramp `l0` …
`l6`, so that an expert without a token cannot be taken for one with few.
"""

from __future__ import annotations

LIGHT = {
    "page": "#f6f6f3", "card": "#ffffff", "ink": "#1d2024", "muted": "#62686f",
    "line": "#e2e3df", "rule": "#edeeeb", "mark": "#2b66ad", "mark2": "#b4630b",
    "before": "#c4c9ce", "good": "#1b7a4a", "bad": "#c4122f",
    "none": "#d3103a", "cold": "#f5a623",
    "l0": "#e7eff7", "l1": "#d6e5f3", "l2": "#bfd7ed", "l3": "#a4c5e4",
    "l4": "#82acd7", "l5": "#447ab6", "l6": "#275a98",
    "on-low": "#16324f", "on-high": "#ffffff", "on-none": "#ffffff", "on-cold": "#3a2500",
}  # fmt: skip

DARK = {
    "page": "#121416", "card": "#1a1d20", "ink": "#e6e8ea", "muted": "#9aa2aa",
    "line": "#2e3338", "rule": "#262a2f", "mark": "#6fabec", "mark2": "#e0974a",
    "before": "#50575e", "good": "#55c08a", "bad": "#ff6b7c",
    "none": "#ff3d5a", "cold": "#ffb43d",
    "l0": "#1d2732", "l1": "#203246", "l2": "#24415d", "l3": "#285178",
    "l4": "#2f6597", "l5": "#4a8cc8", "l6": "#74b0e8",
    "on-low": "#dce9f6", "on-high": "#0d1f33", "on-none": "#2b0008", "on-cold": "#3a2500",
}  # fmt: skip

_FONTS = {
    "sans": '-apple-system,"Segoe UI",Roboto,"Noto Sans","Helvetica Neue","Liberation Sans",'
    "system-ui,sans-serif",
    "mono": 'ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono","DejaVu Sans Mono",monospace',
}

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;font-size:15px;
font-family:var(--sans);
font-variant-numeric:tabular-nums;overflow-wrap:anywhere;-webkit-text-size-adjust:100%}
.page{max-width:1080px;margin:0 auto;padding:36px 24px 48px}
h1{font-size:30px;line-height:1.2;margin:2px 0 6px;letter-spacing:-.01em;font-weight:650}
h2{font-size:18px;margin:0 0 4px;font-weight:650}
h3{font-size:14px;margin:22px 0 6px;font-weight:650}
p{margin:0 0 10px;max-width:78ch}
.kicker,.muted,caption,figcaption span{color:var(--muted)}
.kicker{font-size:13px;margin:0}
.small{font-size:13px}
code,pre,.name{font-family:var(--mono);font-size:12.5px}
.verdict{margin:14px 0 0;font-weight:600}
.verdict.good{color:var(--good)}.verdict.bad,.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:12px;margin:18px 0}
.tile,section{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:12px 16px 13px}
.tile b{display:block;font-size:21px;line-height:1.3;font-weight:650;letter-spacing:-.01em}
.tile span{display:block;font-size:13px;color:var(--muted)}
section{padding:20px 22px 22px;margin:0 0 16px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:0 16px;
}
.scroll{overflow-x:auto}p.wide{max-width:none}.together{white-space:nowrap}
section>:last-child{margin-bottom:0}
svg{display:block;font:11px var(--sans);font-variant-numeric:tabular-nums}
svg text{fill:var(--muted)}
svg .strong{fill:var(--ink)}
svg .bad{fill:var(--bad);font-weight:600}svg .warn{fill:var(--mark2);font-weight:600}
.grid{stroke:var(--rule)}.axis{stroke:var(--line)}
.band{fill:var(--mark);opacity:.17}.line{fill:none;stroke:var(--mark);stroke-width:1.75}
.dot{fill:var(--mark)}.whisker{stroke:var(--mark);opacity:.4;stroke-width:2}
.second .band{fill:var(--mark2)}.second .line,.second .whisker{stroke:var(--mark2)}
.second .dot{fill:var(--mark2)}
.hover{fill:transparent}.hover:hover{fill:var(--ink);fill-opacity:.07}
rect.cell:hover{stroke:var(--ink);stroke-width:1.5}
.key0{color:var(--muted);font-weight:600}.key1{color:var(--mark);font-weight:600}.key2{color:var(--mark2);font-weight:600}
.before{fill:var(--before)}.after{fill:var(--mark)}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:14px 28px;
margin:12px 0 4px}
figure{margin:0;min-width:0}figcaption{font-size:13px;margin:0 0 3px}
figcaption b{font-weight:650}
.legend{display:flex;flex-wrap:wrap;gap:6px 17px;margin:12px 0 14px;padding:0;list-style:none;
font-size:13px}
.legend li{display:flex;align-items:center;gap:7px}
.legend span{color:var(--muted)}
.swatch{width:13px;height:13px;border-radius:3px;flex:none}
table{border-collapse:collapse;width:100%;font-size:13px;overflow-wrap:break-word}
th{font-weight:600;text-align:left;color:var(--muted);border-bottom:1px solid var(--line)}
th,td{padding:4px 14px 4px 0;vertical-align:top}
th:last-child,td:last-child{padding-right:0}
td{border-bottom:1px solid var(--rule)}
tr:last-child td{border-bottom:0}
.n{text-align:right;white-space:nowrap}
tfoot td{font-weight:650;border-top:1px solid var(--line);border-bottom:0}
td.name{min-width:230px;overflow-wrap:anywhere}
td.bar{width:270px;vertical-align:middle}
pre{margin:6px 0 0;padding:12px 14px;background:var(--page);border-radius:8px;overflow-x:auto;
white-space:pre-wrap;line-height:1.55}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 18px;margin:6px 0 0;font-size:13px}
dt{color:var(--muted)}dd{margin:0}
details{margin-top:8px}summary{cursor:pointer;color:var(--muted);font-size:13px}
footer{color:var(--muted);font-size:13px;padding:4px 2px}
@media (max-width:600px){.page{padding:20px 12px}.panels{grid-template-columns:1fr}
section{padding:16px 14px}h1{font-size:24px}}
@media print{body{background:none}.tile,section{break-inside:avoid;border-color:#ccc}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def style_sheet() -> str:
    """The whole style sheet: colours of both schemes, rules, the levels of the heat map."""
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT | _FONTS)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
        f"{_RULES}{''.join(map(_level, ('none', 'cold', *(f'l{k}' for k in range(7)))))}"
    )


def _variables(values: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in values.items())


def _level(name: str) -> str:
    on = {"none": "on-none", "cold": "on-cold"}.get(name, "on-low" if name < "l5" else "on-high")
    return (
        f".{name}{{fill:var(--{name});background:var(--{name})}}svg text.{name}{{fill:var(--{on})}}"
    )
