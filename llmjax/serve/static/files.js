// Files of a chat: while it has some, its questions are answered from them, with quotes that the server has checked.

import { ask } from "./api.js";
import { button, by, complain, element, say } from "./dom.js";
import { keep, state } from "./state.js";

const MOST_BYTES = 3 << 20; // of a file, and of all texts together; the server takes 4 MiB of JSON
const READ = /\.(pdf|html?|xhtml|eml)$/i; // kinds whose text the server reads

const sizeOf = (bytes) => (bytes < 1024 ? `${bytes} B` : bytes < 1 << 20 ? `${(bytes / 1024).toFixed(1)} kB` : `${(bytes / (1 << 20)).toFixed(1)} MB`);

const bytesOf = (text) => new Blob([text]).size;

function decoded(bytes) {
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    if (!text.includes("\0")) return text;
  } catch {} // said below
  throw new Error("this is no text in UTF-8");
}

// The text of a file as the server reads it.
async function readBy(file) {
  say(`reading ${file.name}`);
  const bytes = new Uint8Array(await file.arrayBuffer());
  let data = "";
  for (let at = 0; at < bytes.length; at += 1 << 14) data += String.fromCharCode(...bytes.subarray(at, at + (1 << 14)));
  return (await (await ask("read", { name: file.name, data: btoa(data) })).json()).text;
}

export async function addFiles(given) {
  const { chat } = state;
  complain();
  for (const file of given) {
    try {
      if (file.size > MOST_BYTES) throw new Error(`a file may have ${sizeOf(MOST_BYTES)}`);
      const text = READ.test(file.name) ? await readBy(file) : decoded(await file.arrayBuffer());
      const whole = (chat.files ?? []).reduce((sum, one) => sum + bytesOf(one.text), bytesOf(text));
      if (whole > MOST_BYTES) throw new Error(`the texts of all files together may have ${sizeOf(MOST_BYTES)}`);
      const made = { name: file.name.slice(0, 200), size: file.size, text };
      chat.files = [...(chat.files ?? []).filter((one) => one.name !== made.name), made];
      ask("tokenize", { prompt: text }).then(async (answer) => {
        made.tokens = (await answer.json()).count;
        drawFiles();
      }, complain);
    } catch (error) {
      complain(`${file.name}: ${error.message}`);
    }
  }
  if (chat.nodes.length) keep(chat);
  drawFiles();
  say(`${chat.files?.length ?? 0} files`);
}

export function drawFiles() {
  const { chat } = state;
  const rows = (chat.files ?? []).map((one) => {
    const drop = button("Remove", () => {
      chat.files = chat.files.filter((other) => other !== one);
      if (chat.nodes.length) keep(chat);
      drawFiles();
      by("message").focus();
    });
    drop.setAttribute("aria-label", `Remove ${one.name}`);
    const about = `${one.name}, ${sizeOf(one.size)}${one.tokens === undefined ? "" : `, ${one.tokens.toLocaleString("en")} tokens`}`;
    return element("li", {}, element("span", { textContent: about }), drop);
  });
  by("files").replaceChildren(...rows);
  by("files-note").hidden = !rows.length || Boolean(chat.source);
}

// Each citation as a button, which opens its passage with the quote marked.
export function sourcesView({ citations, dropped, passages, reason }) {
  const view = element("div", { className: "sources" });
  const opened = element("blockquote", { className: "passage", hidden: true });
  const buttons = citations.map((one) => {
    const made = button(`[${one.number}] ${one.path}`, () => {
      const on = made.getAttribute("aria-expanded") !== "true";
      for (const other of buttons) other.setAttribute("aria-expanded", "false");
      made.setAttribute("aria-expanded", String(on));
      opened.hidden = !on;
      const passage = passages[one.number - 1];
      const [start, end] = [one.start - passage.start, one.end - passage.start];
      const characters = [...passage.text]; // the server counts whole characters
      const part = (from, to) => characters.slice(from, to).join("");
      opened.replaceChildren(part(0, start), element("mark", { textContent: part(start, end) }), part(end));
    });
    made.setAttribute("aria-expanded", "false");
    return made;
  });
  view.append(...buttons, opened);
  if (reason) view.append(element("p", { className: "note", textContent: reason }));
  if (dropped.length) view.append(element("p", { className: "note", textContent: `${dropped.length} citations did not pass their check and were dropped` }));
  return view;
}
