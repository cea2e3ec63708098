"""How the report page looks."""

# ruff: noqa: E501  a style sheet is no code
STYLE = """
:root { color-scheme: light dark; --ground: #fbfbf9; --card: #ffffff; --ink: #1d2126; --muted: #656c75; --line: #e2e3df; --mark: #2f6fb5;
  --p0: #2f6fb5; --p1: #d98a1f; --p2: #4b9a72; --del: #fbdcd6; --ins: #d5efdc; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --card: #1d2126; --ink: #e6e8ea; --muted: #9aa2ab; --line: #343a41;
  --mark: #6ba4e0; --p0: #6ba4e0; --p1: #e5a84c; --p2: #6fbf97; --del: #5b2a25; --ins: #1f4a30; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 20px; } h2 { font-size: 17px; margin: 0 0 14px; } h3 { font-size: 14px; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px; margin-top: 20px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figure b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; } .figure span, .muted { color: var(--muted); font-size: 13px; }
.stack { display: flex; gap: 2px; height: 14px; margin-top: 20px; } .part { border-radius: 3px; flex-basis: 0; }
.p0 { background: var(--p0); } .p1 { background: var(--p1); } .p2 { background: var(--p2); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 8px 0 0; padding: 0; font-size: 13px; color: var(--muted); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; } thead th { color: var(--muted); font-weight: 500; font-size: 13px; }
th[scope=row] { text-align: left; font-weight: 500; white-space: normal; overflow-wrap: anywhere; min-width: 180px; max-width: 380px; }
td.wide { width: 40%; min-width: 120px; } svg { display: block; width: 100%; } svg.bar { height: 12px; } .mark { fill: var(--mark); }
.hit { fill: transparent; } g:hover .mark { opacity: .75; } svg text { fill: var(--ink); font-size: 12px; text-anchor: middle; }
svg text.tick { fill: var(--muted); } svg line { stroke: var(--line); }
article { border-top: 1px solid var(--line); padding-top: 14px; margin-top: 14px; } article:first-of-type { border-top: 0; margin-top: 0; padding-top: 0; }
article p { margin: 0 0 8px; overflow-wrap: anywhere; } .sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
figure { margin: 0; min-width: 0; } figcaption { color: var(--muted); font-size: 12px; margin-bottom: 4px; }
pre { margin: 0; padding: 12px; background: var(--ground); border: 1px solid var(--line); border-radius: 8px; max-height: 340px; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono CJK SC", monospace; }
del { background: var(--del); text-decoration: none; border-radius: 2px; } ins { background: var(--ins); text-decoration: none; border-radius: 2px; }
.code { font-style: normal; font-size: 10px; color: var(--muted); border: 1px solid var(--line); border-radius: 3px; padding: 0 2px; }
"""
