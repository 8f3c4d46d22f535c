// One style sheet, in the colours of ComfyUI's theme. What is added is underlined and what is removed struck through:
// blue and orange beside that are told apart by colour-blind eyes too.
import { page } from "./common.js";

const CSS = `
.promptloop-page { display: contents; }
.promptloop { font: 12px/1.4 Inter, Arial, sans-serif; color: var(--input-text, #ddd); box-sizing: border-box; }
.promptloop, .promptloop-ask { --promptloop-warn: #9a4b00; --promptloop-blue: #0a5c96; }
.dark-theme .promptloop, .dark-theme .promptloop-ask { --promptloop-warn: #e69f00; --promptloop-blue: #58a6e8; }
.promptloop *, .promptloop-ask * { box-sizing: border-box; }
.promptloop-panel { display: flex; flex-direction: column; gap: 6px; height: 100%; padding: 6px; overflow: hidden;
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px;
  user-select: text; }
.promptloop-top { flex: none; max-height: 45%; overflow: auto; }
.promptloop-line { display: flex; align-items: center; gap: 6px; flex-wrap: wrap; }
.promptloop-label { color: var(--descrip-text, #999); font-size: 11px; }
.promptloop-prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
.promptloop-rows { flex: 1 1 auto; min-height: 0; overflow: auto; margin: 0; padding: 0; list-style: none; }
.promptloop-row { display: grid; grid-template-columns: 72px minmax(0, 1fr); gap: 8px; padding: 6px 0;
  border-top: 1px solid var(--border-color, #4e4e4e); }
.promptloop-thumb { width: 72px; padding: 0; border: 0; background: none; cursor: zoom-in; align-self: start; }
.promptloop-thumb img { display: block; width: 72px; height: auto; border-radius: 4px; }
.promptloop-pixels { image-rendering: pixelated; }
.promptloop-none { width: 72px; height: 40px; border: 1px dashed var(--border-color, #4e4e4e); border-radius: 4px;
  display: flex; align-items: center; justify-content: center; color: var(--descrip-text, #999); font-size: 11px; }
.promptloop-state { font-size: 11px; padding: 0 6px; border-radius: 8px; border: 1px solid currentColor; }
.promptloop-state.changed { color: var(--promptloop-blue); } .promptloop-state.failed { color: var(--promptloop-warn); }
.promptloop-state.kept { color: var(--descrip-text, #999); }
.promptloop ins, .promptloop-ask ins { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 2px;
  background: rgba(0, 114, 178, .35); color: inherit; margin: 0 1px; }
.promptloop del, .promptloop-ask del { text-decoration: line-through; background: rgba(230, 159, 0, .22); color: inherit;
  opacity: .85; margin: 0 1px; }
.promptloop-diff { white-space: pre-wrap; overflow-wrap: anywhere; }
.promptloop-why { color: var(--descrip-text, #aaa); font-style: italic; white-space: pre-wrap; overflow-wrap: anywhere; }
.promptloop-why summary { cursor: pointer; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.promptloop-why[open] summary { white-space: pre-wrap; }
.promptloop-warn { color: var(--promptloop-warn); overflow-wrap: anywhere; }
.promptloop-note { color: var(--descrip-text, #aaa); overflow-wrap: anywhere; }
.promptloop-small { font: inherit; font-size: 11px; padding: 0 6px; color: inherit; background: var(--comfy-menu-bg, #353535);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px; cursor: pointer; }
.promptloop-grow { flex: 1 1 auto; }
.promptloop-large { position: fixed; inset: 0; z-index: 10001; display: flex; align-items: center; justify-content: center;
  background: rgba(0, 0, 0, .75); cursor: zoom-out; border: 0; padding: 0; }
.promptloop-large img { width: min(86vw, 86vh); max-height: 90vh; object-fit: contain; }
.promptloop-ask { position: fixed; z-index: 10000; left: 50%; top: 50%; transform: translate(-50%, -50%);
  width: min(860px, calc(100vw - 24px)); max-height: calc(100vh - 24px); overflow: auto; padding: 16px;
  font: 14px/1.45 Inter, Arial, sans-serif; color: var(--input-text, #ddd); background: var(--comfy-menu-bg, #353535);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 10px; box-shadow: 0 12px 48px rgba(0, 0, 0, .6); }
.promptloop-ask h2 { font-size: 16px; margin: 0; }
.promptloop-ask-body { display: grid; grid-template-columns: minmax(180px, 38%) minmax(0, 1fr); gap: 16px; margin: 12px 0; }
@media (max-width: 640px) { .promptloop-ask-body { grid-template-columns: 1fr; } }
.promptloop-ask-body > * { min-width: 0; }
.promptloop-ask-picture { align-self: start; min-height: 120px; display: flex; align-items: center; justify-content: center;
  text-align: center; background: var(--comfy-input-bg, #222); border-radius: 6px; color: var(--descrip-text, #999); }
.promptloop-ask-picture img { width: 100%; height: auto; border-radius: 6px; display: block; }
.promptloop-ask p { margin: 0 0 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
.promptloop-ask label { display: block; color: var(--descrip-text, #aaa); font-size: 12px; margin-bottom: 2px; }
.promptloop-ask textarea { width: 100%; min-height: 96px; resize: vertical; font: inherit; padding: 8px; margin-bottom: 8px;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px; }
.promptloop-ask-buttons { display: flex; gap: 8px; flex-wrap: wrap; align-items: center; }
.promptloop-ask-buttons button { font: inherit; padding: 6px 14px; border-radius: 6px; cursor: pointer;
  color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); }
.promptloop-ask-buttons button.promptloop-main { background: #0a6cb0; border-color: #0a6cb0; color: #fff; }
.promptloop-ask-buttons button:disabled { opacity: .45; cursor: default; }
.promptloop-ask-status { min-height: 1.4em; margin: 8px 0 0 !important; color: var(--promptloop-warn); }
.promptloop-ask :focus-visible, .promptloop :focus-visible { outline: 2px solid var(--promptloop-blue); outline-offset: 1px; }
`;

export function addStyle() {
  if (page().querySelector("style")) return;
  const style = document.createElement("style");
  style.textContent = CSS;
  page().append(style);
}
