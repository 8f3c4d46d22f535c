// What the timeline and the question dialog share: texts, elements, word diffs, the graph.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { ComfyDialog } from "../../../scripts/ui.js";

export const TEXT = {
  en: {
    empty: "The looks of a run appear here: preview, what changed, and why.",
    waiting: "Waiting for the first look ...",
    next: (s, p) => `Next look at step ${s} (${p} %)`,
    finishing: "No more looks; finishing the picture ...",
    now: "Prompt in use",
    final: "Final prompt",
    request: "Asked for",
    copy: "Copy",
    copied: "Copied",
    picture: (i, n) => `Picture ${i} of ${n}`,
    previous: "Previous picture",
    following: "Next picture",
    start: "start",
    finished: "finished picture",
    step: (s, n, p) => `step ${s} / ${n} (${p} %)`,
    changed: "changed",
    kept: "kept",
    failed: "failed",
    added: "added",
    removed: "removed",
    why: "why",
    applied: (s) => `acts from step ${s}`,
    seconds: (s) => `${s} s`,
    where: { preview: "no preview", refiner: "the refiner failed", encode: "the text encoder refused" },
    badge: (f, n) => [f && `${f} failed`, n && `${n} noted`].filter(Boolean).join(", "),
    failures: (f) => `${f} ${f === 1 ? "look" : "looks"} failed; the prompt was kept there, the picture was made.`,
    enlarge: "Show the preview large",
    askTitle: "Your turn: how should the prompt go on?",
    askAt: (s, n) => (s ? `after step ${s} of ${n}` : "before the first step"),
    askRequest: "Asked for",
    askBefore: "Prompt in use",
    askText: "New prompt (the suggestion; change it as you like)",
    askTextAlone: "New prompt (change it as you like)",
    askDiff: "What would change",
    same: "nothing changes",
    accept: "Accept suggestion",
    useMine: "Use my text",
    skip: "Skip (keep the prompt)",
    keys: "Ctrl+Enter sends, Esc skips",
    left: (s) => `${s} s left`,
    queue: (n) => `${n} more waiting`,
    sure: "Your text has not been sent. Press Esc again to skip all the same.",
    nothing: "The text is empty. Write a prompt, or skip to keep the one in use.",
    sending: "Sending ...",
    refused: (why) => `Not sent: ${why}. Your text is still here; try again.`,
    over: (why) => `This question is closed (${why}). Your text was not used; copy it if you need it.`,
    close: "Close",
    noPicture: "Nothing to see yet: sampling has not begun.",
  },
  zh: {
    empty: "运行时会在这里显示每次查看：预览、改动和原因。",
    waiting: "等待第一次查看……",
    next: (s, p) => `下次查看：第 ${s} 步（${p}%）`,
    finishing: "不再查看，正在完成图像……",
    now: "当前提示词",
    final: "最终提示词",
    request: "原始要求",
    copy: "复制",
    copied: "已复制",
    picture: (i, n) => `第 ${i} 张，共 ${n} 张`,
    previous: "上一张",
    following: "下一张",
    start: "开始",
    finished: "完成的图像",
    step: (s, n, p) => `第 ${s} / ${n} 步（${p}%）`,
    changed: "已改动",
    kept: "未改动",
    failed: "失败",
    added: "新增",
    removed: "删除",
    why: "原因",
    applied: (s) => `从第 ${s} 步起生效`,
    seconds: (s) => `${s} 秒`,
    where: { preview: "没有预览", refiner: "改写模型出错", encode: "文本编码器拒绝" },
    badge: (f, n) => [f && `${f} 次失败`, n && `${n} 条备注`].filter(Boolean).join("，"),
    failures: (f) => `${f} 次查看失败；该处保留原提示词，图像照常完成。`,
    enlarge: "放大预览",
    askTitle: "请您决定：提示词如何继续？",
    askAt: (s, n) => (s ? `第 ${s} / ${n} 步之后` : "第一步之前"),
    askRequest: "原始要求",
    askBefore: "当前提示词",
    askText: "新提示词（建议内容，可任意修改）",
    askTextAlone: "新提示词（可任意修改）",
    askDiff: "将会改动",
    same: "没有改动",
    accept: "接受建议",
    useMine: "使用我的文字",
    skip: "跳过（保留提示词）",
    keys: "Ctrl+Enter 发送，Esc 跳过",
    left: (s) => `剩余 ${s} 秒`,
    queue: (n) => `还有 ${n} 个问题`,
    sure: "您的文字尚未发送。再按一次 Esc 确认跳过。",
    nothing: "文字为空。请写提示词，或跳过以保留当前提示词。",
    sending: "正在发送……",
    refused: (why) => `未发送：${why}。您的文字仍在，请重试。`,
    over: (why) => `该问题已关闭（${why}）。您的文字未被使用，需要时请复制。`,
    close: "关闭",
    noPicture: "采样尚未开始，还没有预览。",
  },
};

export function text(key, ...args) {
  let locale = "en";
  try {
    locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
  } catch {
    // the settings are not there yet
  }
  const value = (locale.startsWith("zh") ? TEXT.zh : TEXT.en)[key];
  return typeof value === "function" ? value(...args) : value;
}

// An element; children are elements or strings. Strings become text nodes, so that a prompt is never read as HTML.
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((c) => c !== null && c !== undefined && c !== false && c !== ""));
  return element;
}

const WORD = /\s*(?:[\p{P}\u3001-\u9fff\uff01-\uff1f]|[^\s\p{P}\u3001-\u9fff\uff01-\uff1f]+)|\s+$/gu;
const LIMIT = 1500; // words; beyond it, a diff costs more than it shows

// [["same" | "del" | "ins", text], ...]: without "ins" the words of `before`, without "del" those of `after`.
export function wordDiff(before, after) {
  const [a, b] = [before.match(WORD) ?? [], after.match(WORD) ?? []];
  const blocks = commonBlocks(a.map((word) => word.trim()), b.map((word) => word.trim()));
  // Few common words amid many others are chance: "left" in two unlike sentences. The diff reads better without them.
  const inner = (k) => k > 0 && k < blocks.length - 1;
  const chance = ({ same, size }, k) => same && inner(k) && 2 * size <= Math.min(blocks[k - 1].size, blocks[k + 1].size);
  const parts = [];
  let [gone, added] = ["", ""];
  const flush = () => {
    if (gone) parts.push(["del", gone]);
    if (added) parts.push(["ins", added]);
    [gone, added] = ["", ""];
  };
  blocks.forEach((block, k) => {
    const [old, now] = [a.slice(block.a, block.endA).join(""), b.slice(block.b, block.endB).join("")];
    if (block.same && !chance(block, k)) {
      flush();
      parts.push(["same", now]);
    } else [gone, added] = [gone + old, added + now];
  });
  flush();
  return parts;
}

// Blocks in turn same and changed, each {same, a, endA, b, endB, size in words}.
function commonBlocks(a, b) {
  let head = 0;
  while (head < a.length && head < b.length && a[head] === b[head]) head++;
  let [endA, endB] = [a.length, b.length];
  while (endA > head && endB > head && a[endA - 1] === b[endB - 1]) [endA, endB] = [endA - 1, endB - 1];
  const [n, m] = [endA - head, endB - head];
  const short = n <= LIMIT && m <= LIMIT;
  const common = Array.from({ length: short ? n + 1 : 0 }, () => new Uint16Array(m + 1)); // longest common tail from (i, j) on
  for (let i = n - 1; short && i >= 0; i--)
    for (let j = m - 1; j >= 0; j--)
      common[i][j] = a[head + i] === b[head + j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const blocks = [];
  const add = (same, i, endI, j, endJ) => {
    if (endI === i && endJ === j) return;
    const last = blocks.at(-1);
    if (last?.same === same) Object.assign(last, { endA: endI, endB: endJ });
    else blocks.push({ same, a: i, endA: endI, b: j, endB: endJ });
  };
  add(true, 0, head, 0, head);
  let [i, j] = [0, 0];
  while (short && (i < n || j < m)) {
    const [x, y] = [head + i, head + j];
    if (i < n && j < m && a[x] === b[y]) add(true, x, x + 1, y, y + 1), i++, j++;
    else if (i < n && (j >= m || common[i + 1][j] >= common[i][j + 1])) add(false, x, x + 1, y, y), i++;
    else add(false, x, x, y, y + 1), j++;
  }
  if (!short) add(false, head, endA, head, endB);
  add(true, endA, a.length, endB, b.length);
  for (const block of blocks) block.size = Math.max(block.endA - block.a, block.endB - block.b);
  return blocks;
}

export function diffElements(before, after) {
  const tags = { same: "span", del: "del", ins: "ins" };
  const titles = { del: text("removed"), ins: text("added") };
  return wordDiff(before, after).map(([kind, words]) => el(tags[kind], { title: titles[kind] }, words));
}

let own = null;

// Where hangs what belongs to no node (the style sheet, a question, an enlarged picture): in a dialog of ComfyUI's own kind.
export function page() {
  if (!own) {
    own = new ComfyDialog("div", []).element;
    own.className = "promptloop-page";
    own.replaceChildren();
  }
  return own;
}

// navigator.clipboard is missing where the page comes over plain http from another machine.
export async function copyText(words) {
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    const area = el("textarea", { style: "position:fixed;opacity:0" });
    area.value = words;
    page().append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

export function copyButton(words) {
  const button = el("button", { type: "button", class: "promptloop-small" }, text("copy"));
  button.addEventListener("click", async () => {
    await copyText(typeof words === "function" ? words() : words);
    button.textContent = text("copied");
    setTimeout(() => (button.textContent = text("copy")), 1500);
  });
  return button;
}

// `image`: a data URI, or {filename, subfolder, type} of a file that /view serves. Anything else gives null.
export function imageSource(image) {
  if (typeof image === "string") return image.startsWith("data:image/") ? image : null;
  if (!image?.filename) return null;
  const { filename, subfolder = "", type = "temp" } = image;
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

// A picture that removes itself where the file is gone (the temp folder is emptied when the server starts).
export function picture(image, attributes = {}) {
  const source = imageSource(image);
  if (!source) return null;
  const element = el("img", { alt: "", draggable: "false", ...attributes });
  element.addEventListener("error", () => element.remove());
  element.addEventListener("load", () => element.classList.toggle("promptloop-pixels", element.naturalWidth < 128));
  element.src = source;
  return element;
}

const root = () => app.rootGraph ?? app.graph;

// The node of an execution id: "7", or "12:3" for node 3 inside of subgraph node 12.
export function findNode(id) {
  let [graph, node] = [root(), null];
  for (const part of String(id ?? "").split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

export function* allNodes(graph = root()) {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    yield node;
    if (node.subgraph) yield* allNodes(node.subgraph);
  }
}

export const percent = (step, steps) => (steps ? Math.round((100 * step) / steps) : 0);
