// Databases and documents of the server. While a chat has one as its source, its questions are asked of it.

import { ask } from "./api.js";
import { by } from "./dom.js";
import { drawFiles } from "./files.js";
import { keep, state } from "./state.js";
import { asText } from "./table.js";

let listed = [];

export const isAgent = (chat) => chat.source !== undefined && listed.some((one) => one.id === chat.source && one.kind === "agent");

export async function loadSources() {
  listed = (await (await ask("sources")).json()).data;
  drawSources();
}

export function drawSources() {
  const { source } = state.chat;
  const options = listed.map((one) => new Option(`${one.id} (${one.kind})`, one.id));
  if (source && !listed.some((one) => one.id === source)) options.push(new Option(`${source} (not served)`, source));
  by("source").replaceChildren(new Option("the model", ""), ...options);
  by("source").value = source ?? "";
  by("source-line").hidden = !options.length;
}

export function takeSource() {
  const { chat } = state;
  chat.source = by("source").value || undefined;
  if (chat.nodes.length) keep(chat);
  drawFiles();
}

// Ask the source of a chat, or else its files, the question at a place; the answer comes into the node.
export async function askSource({ chat, parent, node, signal }) {
  const files = chat.files?.map(({ name, text }) => ({ name, text }));
  const from = chat.source ? { source: chat.source } : { files };
  const body = { question: chat.nodes[parent].content, model: node.model, transcript: true, ...from };
  const found = await (await ask("ask", body, signal)).json();
  node.finish = "stop";
  node.transcript = found.transcript;
  if (found.columns) {
    const { sql, columns, rows, cut, refused, reason } = found;
    node.table = { sql, columns, rows, cut, refused, reason, name: chat.source };
    node.content = asText(node.table);
  } else {
    node.content = found.answer;
    node.sources = { citations: found.citations, dropped: found.dropped, passages: found.passages, reason: found.reason };
  }
}
