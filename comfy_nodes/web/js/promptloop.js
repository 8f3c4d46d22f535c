// PromptLoop in ComfyUI's frontend: a timeline in our nodes, and the dialog of Ask Me.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { getPngMetadata } from "../../../scripts/pnginfo.js";
import { ask, asked } from "./ask.js";
import { allNodes, findNode } from "./common.js";
import { addStyle } from "./style.js";
import * as timeline from "./timeline.js";

const WITH_TIMELINE = new Set(["PromptLoop", "PromptLoopSampler", "PromptLoopGuider", "PromptLoopResult", "PromptLoopHistory"]);

// The nodes of an event that have a timeline: the one that set up the loop, and the sampler where that is one of ours.
function targets({ owner, node }) {
  const nodes = [findNode(owner), findNode(node)];
  return new Set(nodes.filter((n) => n && timeline.stateOf(n)));
}

function listen(name, act) {
  api.addEventListener(name, (event) => {
    try {
      act(event.detail ?? {});
    } catch (error) {
      console.error(`PromptLoop: ${name}`, error);
    }
  });
}

// Calls `after` when `object`'s own method has run; an error of ours never reaches the caller.
function chain(object, name, after) {
  const original = object[name];
  object[name] = function (...args) {
    const result = original?.apply(this, args);
    try {
      after.apply(this, args);
    } catch (error) {
      console.error(`PromptLoop: ${name}`, error);
    }
    return result;
  };
}

const each = (act) => (detail) => targets(detail).forEach((node) => act(node, detail));

function stopAll() {
  for (const node of allNodes()) timeline.stopped(node);
}

// A picture's own metadata tells its own run; the workflow beside it was stored before that run began.
const SOON = 5000; // ms in which the workflow of a dropped picture is there
let dropped = null;

function drop(event) {
  dropped = { file: event.dataTransfer?.files?.[0], at: Date.now() };
}

async function readDroppedPicture() {
  const { file, at } = dropped ?? {};
  dropped = null;
  if (file?.type !== "image/png" || Date.now() - at > SOON) return;
  try {
    showRecord(await getPngMetadata(file));
  } catch (error) {
    console.error("PromptLoop: the record in the picture could not be read", error);
  }
}

// Records lie under the ids of samplers. They are shown there, or on our nodes before and after a sampler that is not ours.
function showRecord(metadata) {
  if (!metadata?.workflow && !metadata?.prompt) return;
  const runs = metadata.promptloop ? JSON.parse(metadata.promptloop).runs ?? {} : {};
  const ours = [...allNodes()].filter((node) => timeline.stateOf(node));
  ours.forEach(timeline.clear);
  for (const [id, record] of Object.entries(runs)) {
    const sampler = findNode(id);
    if (!sampler) continue;
    const above = upstream(sampler);
    const near = (node) => node === sampler || above.has(node) || upstream(node).has(sampler);
    const shown = timeline.stateOf(sampler) ? [sampler] : ours.filter(near);
    for (const node of shown) timeline.finish(node, record?.trajectories);
  }
}

function upstream(node, found = new Set()) {
  for (let slot = 0; slot < (node.inputs?.length ?? 0); slot++) {
    const from = node.getInputNode?.(slot);
    if (!from || found.has(from)) continue;
    found.add(from);
    upstream(from, found);
  }
  return found;
}

app.registerExtension({
  name: "promptloop.timeline",
  async setup() {
    addStyle();
    listen("promptloop.begin", each(timeline.begin));
    listen("promptloop.turn", each(timeline.addTurn));
    listen("promptloop.end", each(timeline.end));
    listen("promptloop.ask", ask);
    listen("promptloop.asked", asked);
    listen("execution_error", stopAll);
    listen("execution_interrupted", stopAll);
    window.addEventListener("drop", drop, true);
    const open = await api.fetchApi(`/promptloop/questions?client_id=${encodeURIComponent(api.clientId ?? "")}`);
    if (open.ok) for (const question of await open.json()) ask(question); // asked before this page was loaded again
  },
  afterConfigureGraph() {
    readDroppedPicture();
  },
  async beforeRegisterNodeDef(nodeType, nodeData) {
    if (!WITH_TIMELINE.has(nodeData.name)) return;
    chain(nodeType.prototype, "onNodeCreated", function () {
      timeline.addPanel(this);
    });
    chain(nodeType.prototype, "onConfigure", function () {
      timeline.restore(this);
    });
    chain(nodeType.prototype, "onExecuted", function (output) {
      timeline.finish(this, output?.promptloop);
    });
    chain(nodeType.prototype, "onDrawForeground", function (context) {
      timeline.drawBadge(this, context);
    });
  },
});
