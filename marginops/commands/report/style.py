"""The style sheet of a report."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1480px; background: #f5f6f8; color: #1f2329;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 0; }
header { margin-bottom: 20px; }
header p, section > p, footer { color: #59606a; font-size: 14px; }
section > p { margin-bottom: 12px; max-width: 75ch; }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 0; }
dl div { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 8px 16px; }
dt { font-size: 12px; color: #59606a; }
dd { margin: 0; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; }
main { display: grid; gap: 20px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 18px 20px;
  min-width: 0; }
section.wide { grid-column: 1 / -1; }
.missing { padding: 20px; border: 1px dashed #c4c9d0; border-radius: 8px; background: #fafbfc; }
.scroll { max-height: 460px; overflow: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #fff; box-shadow: inset 0 -2px #d5d9de;
  font-size: 12px; font-weight: 600; color: #59606a; white-space: nowrap; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #edeff1; }
td.word { text-align: left; overflow-wrap: break-word; min-width: 5.5em; }
td.word:has(img) { min-width: 0; }
footer { margin-top: 20px; }
@media (max-width: 960px) {
  body { padding: 12px; }
  main { grid-template-columns: minmax(0, 1fr); gap: 12px; }
  section { padding: 14px 12px; }
  h1 { font-size: 21px; }
  th, td { padding: 4px 6px; }
}
"""
