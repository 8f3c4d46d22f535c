// The timeline of a run, drawn in a node: a row for each look.
import { copyButton, diffElements, el, page, percent, picture, text } from "./common.js";

const KEPT = ["step", "num_steps", "before", "after", "reasoning", "error", "boundary", "notes", "applied", "image"];
const LONG = 160; // characters of reasoning that are shown unfolded
const PROMPT = 130; // pixels
const panels = new WeakMap(); // node -> {element, state}

// state: {runs: [{request, prompt, turns, scores}], sample, running, due, steps}
const fresh = () => ({ runs: [], sample: 0, running: false, due: [], steps: 0 });

export const stateOf = (node) => panels.get(node)?.state;

export function addPanel(node) {
  const element = el("div", { class: "promptloop promptloop-panel" });
  const panel = { element, state: fresh() };
  panels.set(node, panel);
  // The canvas zooms on the wheel: let it, but where there is something to scroll.
  element.addEventListener("wheel", (event) => {
    const box = event.target.closest?.(".promptloop-rows, .promptloop-top");
    if (box && box.scrollHeight > box.clientHeight && !event.ctrlKey) event.stopPropagation();
  });
  for (const name of ["pointerdown", "keydown", "copy"]) element.addEventListener(name, (event) => event.stopPropagation());
  const widget = node.addDOMWidget("promptloop_timeline", "promptloop", element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => (panel.state.runs.length ? 320 : 56),
  });
  // Fields for text share the free height; a prompt needs a few lines of it, the timeline the rest.
  for (const other of node.widgets) if (other !== widget && other.element) other.options.getMaxHeight ??= () => PROMPT;
  widget.serialize = false; // no value of its own: neither in the workflow's values nor in the API prompt
  draw(node);
}

export function begin(node, { requests = [], num_steps = 0, due = [] }) {
  const runs = requests.map((request) => ({ request, prompt: request, turns: [] }));
  show(node, { ...fresh(), runs, running: true, due, steps: num_steps });
}

export function addTurn(node, { sample = 0, turn }) {
  const state = stateOf(node);
  if (!state || !turn) return;
  while (state.runs.length <= sample) state.runs.push({ request: turn.before, prompt: turn.before, turns: [] });
  const run = state.runs[sample];
  run.turns.push(turn);
  run.prompt = turn.after;
  draw(node, true);
}

export function end(node, { prompts = [] }) {
  const state = stateOf(node);
  if (!state) return;
  state.running = false;
  prompts.forEach((prompt, k) => state.runs[k] && (state.runs[k].prompt = prompt));
  keep(node);
  draw(node);
}

// Sampling that failed or was cancelled sends no end.
export function stopped(node) {
  const state = stateOf(node);
  if (!state?.running) return;
  state.running = false;
  keep(node);
  draw(node);
}

// The finished record: `runs` as the node's output, or the metadata of a picture, has them.
export function finish(node, runs) {
  if (!Array.isArray(runs)) return;
  show(node, { ...fresh(), runs: readable(runs) });
  keep(node);
}

export function restore(node) {
  show(node, { ...fresh(), runs: readable(node.properties?.promptloop?.runs ?? []) });
}

function readable(runs) {
  if (!Array.isArray(runs)) return [];
  const whole = runs.filter((run) => Array.isArray(run?.turns));
  return whole.map((run) => ({ ...run, prompt: run.prompt ?? run.turns.at(-1)?.after ?? run.request }));
}

export function clear(node) {
  if (node.properties) delete node.properties.promptloop;
  show(node, fresh());
}

function show(node, state) {
  const panel = panels.get(node);
  if (!panel) return;
  const grow = state.runs.length && !panel.state.runs.length;
  panel.state = state;
  draw(node);
  if (grow) node.setSize?.([Math.max(node.size[0], 320), Math.max(node.size[1], node.computeSize()[1])]);
}

// In the workflow: words, and the names of pictures; no picture itself.
function keep(node) {
  const small = (turn) =>
    Object.fromEntries(
      KEPT.filter((k) => turn[k] !== undefined && turn[k] !== null && turn[k] !== "" && typeof turn[k] !== "function")
        .filter((k) => k !== "image" || turn.image.filename)
        .map((k) => [k, turn[k]]),
    );
  const runs = stateOf(node).runs.map(
    ({ request, prompt, scores, turns }) => ({ request, prompt, scores, turns: turns.map(small) }),
  );
  node.properties ??= {};
  node.properties.promptloop = { version: 1, runs };
}

const total = (state, what) => state.runs.reduce((sum, run) => sum + run.turns.reduce((s, t) => s + what(t), 0), 0);
const failures = (state) => total(state, (turn) => (turn.error ? 1 : 0));
const notes = (state) => total(state, (turn) => turn.notes?.length ?? 0);

// A badge over the title, for those who have folded the panel away. Drawn, not stored: a node keeps its own colours.
export function drawBadge(node, context) {
  const state = stateOf(node);
  if (!state || node.flags?.ghost) return;
  const [failed, noted] = [failures(state), notes(state)];
  if (!failed && !noted) return;
  const label = `${failed ? "\u26a0" : "\u2139"} ${text("badge", failed, noted)}`;
  context.save();
  context.font = "12px Arial";
  const width = context.measureText(label).width + 14;
  context.fillStyle = failed ? "#e69f00" : "#3b4a59";
  context.beginPath();
  context.roundRect(0, -LiteGraph.NODE_TITLE_HEIGHT - 22, width, 18, 6);
  context.fill();
  context.fillStyle = failed ? "#000" : "#ddd";
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillText(label, 7, -LiteGraph.NODE_TITLE_HEIGHT - 12.5);
  context.restore();
}

function draw(node, follow = false) {
  const panel = panels.get(node);
  const { element, state } = panel;
  const old = element.querySelector(".promptloop-rows");
  const place = old && { top: old.scrollTop, end: old.scrollTop + old.clientHeight > old.scrollHeight - 8 };
  if (!state.runs.length) {
    element.replaceChildren(el("div", { class: "promptloop-label" }, text(state.running ? "waiting" : "empty")));
  } else {
    const run = state.runs[Math.min(state.sample, state.runs.length - 1)];
    const rows = el("ol", { class: "promptloop-rows", tabindex: "0" }, run.turns.map(row));
    element.replaceChildren(top(node, state, run), rows);
    if (place) rows.scrollTop = follow && place.end ? rows.scrollHeight : place.top;
  }
  node.setDirtyCanvas?.(true, true);
}

function top(node, state, run) {
  const line = el(
    "div",
    { class: "promptloop-line" },
    el("span", { class: "promptloop-label" }, text(state.running ? "now" : "final")),
    el("span", { class: "promptloop-grow" }),
    state.runs.length > 1 && pager(node, state),
    copyButton(() => run.prompt ?? ""),
  );
  const failed = failures(state);
  const scores = Object.entries(run.scores ?? {}).map(([k, v]) => `${k} ${typeof v === "number" ? +v.toPrecision(4) : "-"}`);
  return el(
    "div",
    { class: "promptloop-top" },
    line,
    el("div", { class: "promptloop-prompt", "aria-live": "polite" }, run.prompt ?? ""),
    run.request !== run.prompt && el("div", { class: "promptloop-label" }, `${text("request")}: ${run.request ?? ""}`),
    scores.length > 0 && el("div", { class: "promptloop-label" }, scores.join(", ")),
    failed > 0 && el("div", { class: "promptloop-warn", role: "status" }, `\u26a0 ${text("failures", failed)}`),
    state.running && el("div", { class: "promptloop-label" }, progress(state, run)),
  );
}

function pager(node, state) {
  const go = (by) => {
    state.sample = (state.sample + by + state.runs.length) % state.runs.length;
    draw(node);
  };
  const button = (label, sign, by) =>
    el("button", { type: "button", class: "promptloop-small", title: label, "aria-label": label, onclick: () => go(by) }, sign);
  return el(
    "span",
    { class: "promptloop-line" },
    button(text("previous"), "\u25c0", -1),
    text("picture", state.sample + 1, state.runs.length),
    button(text("following"), "\u25b6", 1),
  );
}

function progress(state, run) {
  const seen = run.turns.length ? run.turns.at(-1).step : -1;
  const next = state.due.find((step) => step > seen);
  return next === undefined ? text("finishing") : text("next", next, percent(next, state.steps));
}

function row(turn) {
  const changed = turn.before !== turn.after;
  const kind = turn.error ? "failed" : changed ? "changed" : "kept";
  const at = turn.step >= turn.num_steps && turn.num_steps > 0 ? "finished" : turn.step === 0 ? "start" : null;
  const image = picture(turn.image);
  const spent = Object.values(turn.seconds ?? {}).reduce((sum, s) => sum + (Number(s) || 0), 0);
  const late = turn.applied !== undefined && turn.applied !== null && turn.applied !== turn.step;
  const head = el(
    "div",
    { class: "promptloop-line" },
    el("strong", {}, at ? text(at) : text("step", turn.step, turn.num_steps, percent(turn.step, turn.num_steps))),
    el("span", { class: `promptloop-state ${kind}` }, text(kind)),
    late && el("span", { class: "promptloop-label" }, text("applied", turn.applied)),
    spent >= 0.05 && el("span", { class: "promptloop-label" }, text("seconds", spent.toFixed(1))),
  );
  const where = turn.boundary && text("where")[turn.boundary];
  return el(
    "li",
    { class: "promptloop-row" },
    image ? thumb(image) : el("div", { class: "promptloop-none" }, at ? text(at) : ""),
    el(
      "div",
      {},
      head,
      changed && el("div", { class: "promptloop-diff" }, diffElements(turn.before, turn.after)),
      why(turn.reasoning),
      turn.error && el("div", { class: "promptloop-warn" }, `\u26a0 ${where ? `${where}: ` : ""}${turn.error}`),
      (turn.notes ?? []).map((note) => el("div", { class: "promptloop-note" }, `\u2139 ${note}`)),
    ),
  );
}

function why(reasoning) {
  if (!reasoning) return null;
  if (reasoning.length <= LONG) return el("div", { class: "promptloop-why" }, reasoning);
  return el("details", { class: "promptloop-why" }, el("summary", { title: text("why") }, reasoning));
}

function thumb(image) {
  const enlarge = () => {
    const large = el("button", { type: "button", class: "promptloop-large" }, image.cloneNode());
    const before = document.activeElement;
    const close = () => (large.remove(), before?.focus?.());
    large.addEventListener("click", close);
    large.addEventListener("keydown", (event) => {
      event.stopPropagation();
      if (event.key === "Escape" || event.key === "Tab") close();
    });
    page().append(large);
    large.focus();
  };
  return el(
    "button",
    { type: "button", class: "promptloop-thumb", title: text("enlarge"), "aria-label": text("enlarge"), onclick: enlarge },
    image,
  );
}
