// Ask Me: while sampling waits, the artist sees the preview and the suggestion, and accepts, edits or skips.
import { api } from "../../../scripts/api.js";
import { copyButton, diffElements, el, page, picture, text } from "./common.js";

const queue = []; // open questions, oldest first
let open = null; // {question, dialog, area, ...} of the one that is shown
let before = null; // what had the focus

export function ask(question) {
  if (queue.some((q) => q.id === question.id)) return;
  queue.push({ ...question, deadline: question.seconds > 0 ? Date.now() + 1000 * question.seconds : null });
  if (open) count();
  else next();
}

export function asked({ id, outcome }) {
  const k = queue.findIndex((q) => q.id === id);
  if (k >= 0) queue.splice(k, 1);
  if (open?.question.id !== id) return count();
  // What the artist has typed stays there to be copied, whatever closed the question; an answer on its way decides itself.
  if (open.sent) open.closed = true;
  else if (edited()) leave(text("over", outcome ?? "-"));
  else shut();
}

const edited = () => open && open.area.value.trim() !== open.offered.trim();

function next() {
  const question = queue[0];
  if (!question) return;
  const alone = question.suggestion === null || question.suggestion === undefined;
  const offered = (alone ? question.before : question.suggestion) ?? "";
  const area = el("textarea", { id: "promptloop-ask-text", spellcheck: "false", rows: "4" });
  area.value = offered;
  const diff = el("p", { class: "promptloop-diff" });
  const status = el("p", { class: "promptloop-ask-status", role: "status", "aria-live": "polite" });
  const clock = el("span", { class: "promptloop-label" });
  const accept = el("button", { type: "button", onclick: () => send("accept") }, text("accept"));
  const mine = el("button", { type: "button", onclick: () => send("edit") }, text("useMine"));
  const skip = el("button", { type: "button", onclick: () => send("skip") }, text("skip"));
  const title = el("h2", { id: "promptloop-ask-title" }, text("askTitle"));
  const where = el("span", { class: "promptloop-label" }, text("askAt", question.step, question.num_steps));
  const hint = el("span", { class: "promptloop-label" }, text("keys"));
  const buttons = el("div", { class: "promptloop-ask-buttons" }, !alone && accept, mine, skip, hint);
  const dialog = el(
    "div",
    { class: "promptloop-ask", role: "dialog", "aria-labelledby": "promptloop-ask-title", tabindex: "-1" },
    el("div", { class: "promptloop-line" }, title, where, el("span", { class: "promptloop-grow" }), clock),
    el(
      "div",
      { class: "promptloop-ask-body" },
      el("div", { class: "promptloop-ask-picture" }, picture(question.image) ?? text("noPicture")),
      el(
        "div",
        {},
        question.request !== question.before && [el("label", {}, text("askRequest")), el("p", {}, question.request ?? "")],
        el("label", {}, text("askBefore")),
        el("p", {}, question.before ?? ""),
        question.reasoning && el("p", { class: "promptloop-why" }, question.reasoning),
        el("label", { for: area.id }, text(alone ? "askTextAlone" : "askText")),
        area,
        el("label", {}, text("askDiff")),
        diff,
      ),
    ),
    buttons,
    status,
  );
  before ??= document.activeElement;
  open = { question, dialog, area, offered, alone, diff, status, clock, accept, mine, skip, buttons, sent: false, sure: false };
  area.addEventListener("input", update);
  dialog.addEventListener("keydown", keys);
  for (const name of ["keyup", "keypress", "copy", "paste", "cut"])
    dialog.addEventListener(name, (event) => event.stopPropagation());
  page().append(dialog);
  open.timer = setInterval(count, 250);
  update();
  count();
  area.focus();
  if (alone) area.select();
}

function update() {
  const { question, area, diff, accept, mine, alone } = open;
  const changes = area.value.trim() !== (question.before ?? "").trim();
  diff.replaceChildren(...(changes ? diffElements(question.before ?? "", area.value) : [text("same")]));
  const own = edited() || alone;
  accept.classList.toggle("promptloop-main", !own);
  mine.classList.toggle("promptloop-main", own);
  mine.disabled = !own;
  open.sure = false;
  open.status.textContent = "";
}

function count() {
  if (!open) return;
  const { deadline } = open.question;
  const waiting = queue.filter((q) => q !== open.question).length;
  const left = deadline && !open.over && text("left", Math.max(0, Math.ceil((deadline - Date.now()) / 1000)));
  open.clock.textContent = [left, waiting > 0 && text("queue", waiting)].filter(Boolean).join(" \u00b7 ");
}

function keys(event) {
  event.stopPropagation(); // the canvas has shortcuts of its own: Ctrl+Enter queues, Delete deletes nodes
  if (event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!open.over) send(edited() || open.alone ? "edit" : "accept");
  } else if (event.key === "Escape") {
    event.preventDefault();
    if (open.over) return shut();
    if (edited() && !open.sure) {
      open.status.textContent = text("sure");
      open.sure = true;
    } else send("skip");
  } else if (event.key === "Tab") {
    const stops = [...open.dialog.querySelectorAll("textarea, button:not(:disabled)")];
    const [first, last] = [stops[0], stops.at(-1)];
    const out = event.shiftKey ? document.activeElement === first : document.activeElement === last;
    if (!out && open.dialog.contains(document.activeElement)) return;
    event.preventDefault();
    (event.shiftKey ? last : first).focus();
  }
}

async function send(action) {
  const shown = open;
  if (!shown || shown.sent) return;
  const prompt = shown.area.value.trim();
  if (action === "edit" && !prompt) {
    shown.status.textContent = text("nothing");
    return shown.area.focus();
  }
  shown.sent = true;
  for (const button of [shown.accept, shown.mine, shown.skip]) button.disabled = true;
  shown.status.textContent = text("sending");
  const body = { id: shown.question.id, action, ...(action === "edit" ? { prompt } : {}) };
  let why;
  try {
    const answer = await api.fetchApi("/promptloop/answer", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    if (answer.ok) return done(shown);
    why = (await answer.text()).slice(0, 300).trim() || `HTTP ${answer.status}`;
    if (answer.status === 404) shown.closed = true;
  } catch (error) {
    why = error?.message ?? String(error);
  }
  if (open === shown && shown.closed) return edited() ? leave(text("over", why)) : done(shown);
  if (open !== shown) return;
  shown.sent = false;
  for (const button of [shown.accept, shown.mine, shown.skip]) button.disabled = false;
  update();
  shown.status.textContent = text("refused", why);
}

function done(shown) {
  const k = queue.indexOf(shown.question);
  if (k >= 0) queue.splice(k, 1);
  if (open === shown) shut();
}

// The question is closed, the artist's unsent text is not.
function leave(message) {
  const k = queue.indexOf(open.question);
  if (k >= 0) queue.splice(k, 1);
  open.over = true;
  open.status.textContent = message;
  const close = el("button", { type: "button", class: "promptloop-main", onclick: shut }, text("close"));
  open.buttons.replaceChildren(close, copyButton(() => open?.area.value ?? ""));
  count();
}

function shut() {
  clearInterval(open.timer);
  open.dialog.remove();
  open = null;
  if (queue.length) return next();
  if (before?.isConnected) before.focus?.();
  before = null;
}
