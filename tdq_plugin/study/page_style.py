"""The report's style sheet; follows the reader's light or dark setting."""

__all__ = ["STYLE_SHEET"]

STYLE_SHEET = """\
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1f2933; --muted: #5b6470; --line: #dde2e8; --soft: #f4f6f8;
  --accent: #0072b2; --best: #dcefe0; --best-ink: #14532d;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --ink: #e4e8ed; --muted: #9aa5b1; --line: #2d353f; --soft: #1c222a;
    --accent: #6cb8e6; --best: #17402a; --best-ink: #b9f0cb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 74rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 0 0 0.5rem; }
p { margin: 0.6rem 0; max-width: 46rem; }
.eyebrow { margin: 0 0 0.25rem; color: var(--accent); font-size: 0.85rem; font-weight: 600; }
.note { color: var(--muted); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: var(--muted); padding-top: 0.5rem; }
th, td { padding: 0.4rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; line-height: 1.25; vertical-align: bottom; }
tbody th, tfoot th { font-weight: 600; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
tfoot th, tfoot td { color: var(--muted); font-weight: 400; border-bottom: 0; }
td { white-space: nowrap; }
td.best { background: var(--best); color: var(--best-ink); font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: 0.75rem; margin: 1.5rem 0 0; }
.tile { flex: 1 1 11rem; background: var(--soft); border: 1px solid var(--line);
  border-radius: 6px; padding: 0.7rem 1rem; }
.tile p { margin: 0; font-size: 0.85rem; color: var(--muted); }
.tile strong { font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.25rem; margin: 1rem 0;
  font-size: 0.9rem; max-width: 54rem; }
dt { font-weight: 600; }
dd { margin: 0; color: var(--muted); }
figure { margin: 1.5rem 0 2.25rem; }
.plate { background: #ffffff; border: 1px solid var(--line); border-radius: 6px; padding: 0.75rem; }
.plate img { display: block; max-width: min(100%, 54rem); height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 0.9rem; margin-top: 0.5rem; max-width: 46rem; }
.pair { display: flex; flex-wrap: wrap; gap: 0 4rem; align-items: flex-start; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.75rem 1rem; overflow-x: auto; }
code { font: 0.9rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 0.6rem; }
}
"""
