"""How a report looks, and what its page may load: nothing."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
STYLE = """
:root { color-scheme: light dark; --page: #f7f8f9; --card: #fff; --text: #1c2126; --quiet: #59636e; --line: #dde1e5;
  --gone: #a11a1a; --gone-bg: #fdebea; --new: #11602b; --new-bg: #e0f4e5; --accent: #0b62b8; }
@media (prefers-color-scheme: dark) { :root { --page: #121518; --card: #1a1e22; --text: #e4e7ea; --quiet: #9da7b1;
  --line: #30363d; --gone: #ff9d96; --gone-bg: #3d1e1e; --new: #86dd9d; --new-bg: #173622; --accent: #6db3f2;
  --series-1: #56b4e9; --series-2: #f08a4b; --series-3: #4cc79a; --series-4: #e08ac4; --series-5: #d6b93c; --series-6: #a3b3c2;
  --series-7: #93a1f5; --series-8: #ef8b86; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; overflow-wrap: anywhere; }
h1 { font-size: 30px; line-height: 1.2; } h3, h4 { font-size: 16px; font-weight: 600; }
h2, thead th { font-size: 14px; font-weight: 600; color: var(--quiet); } section { margin-top: 32px; }
.intro, .small { color: var(--quiet); } .intro { margin-top: 8px; max-width: 75ch; } .small { font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; overflow-wrap: normal; }
th, td { text-align: start; padding: 8px 0 8px 16px; border-bottom: 1px solid var(--line); }
th:first-child { position: sticky; left: 0; padding: 8px 8px 8px 0; min-width: 104px; background: var(--page);
  overflow-wrap: anywhere; }
tbody th, h3, .arms dt { text-align: left; } td.number, .scores dd { white-space: nowrap; }
.number { text-align: end; font-variant-numeric: tabular-nums; } .scroll { overflow-x: auto; margin-top: 8px; }
.arms { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 12px 24px; }
.arms, .scores { font-size: 14px; } .arms dt { font-weight: 600; } .arms dd, .scores dt, .turns dt { color: var(--quiet); }
.plots { columns: 2 400px; column-gap: 20px; margin-bottom: -20px; }
.plots figure { break-inside: avoid; max-width: none; margin-bottom: 20px; } .plots figcaption { margin: 0 0 12px; }
.plots h2 { color: var(--text); font-size: 16px; }
.plots svg { display: block; width: 100%; max-width: 420px; height: auto; }
.prompt, .plots figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px; }
.request { font-size: 20px; line-height: 1.35; margin: 2px 0 16px; } .request, .turns dd, .error p { white-space: pre-wrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(135px, 1fr)); gap: 20px; }
figure { max-width: 512px; min-width: 0; } figcaption { margin-top: 8px; }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; box-shadow: 0 0 0 1px var(--line); }
.pixelated img { width: 100%; image-rendering: pixelated; }
.missing { display: grid; place-items: center; aspect-ratio: 1; border: 1px dashed var(--quiet); border-radius: 6px;
  max-width: 256px; color: var(--quiet); font-size: 14px; }
.scores div { display: flex; justify-content: space-between; gap: 8px; font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); margin-top: 16px; padding-top: 12px; } .turns { list-style: none; padding: 0; }
summary { cursor: pointer; } summary h3 { display: inline; margin-right: 8px; }
.turns li { display: grid; grid-template-columns: 128px minmax(0, 1fr); gap: 20px; margin-top: 20px; }
.turns dl { display: grid; grid-template-columns: 56px minmax(0, 1fr); gap: 6px 12px; margin-top: 6px; }
h4 span { margin-inline-start: 6px; font-weight: 400; }
.tag { border: 1px solid var(--line); border-radius: 4px; padding: 0 6px; font-size: 13px; }
.error { margin: 6px 0 8px; padding: 6px 12px; border-left: 3px solid var(--gone); background: var(--gone-bg); }
.error, .turns dl { font-size: 15px; } .error strong, .failed, del { color: var(--gone); } .passed, ins { color: var(--new); }
del, ins { border-radius: 3px; padding: 0 2px; } del { background: var(--gone-bg); text-decoration: line-through; }
ins { background: var(--new-bg); text-decoration: underline; text-underline-offset: 3px; }
@media (max-width: 560px) { body { padding: 24px 12px 40px; } h1 { font-size: 24px; } .prompt, .plots figure { padding: 16px 14px; }
  .pictures { gap: 14px; } .turns li, .turns dl { grid-template-columns: minmax(0, 1fr); gap: 8px; } .turns dl { gap: 2px; }
  .thumbnail { width: 128px; } table { font-size: 14px; } th + th, td { padding-left: 8px; } .turns dd { margin-bottom: 6px; } }
"""
