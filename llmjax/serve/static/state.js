// What the page shows now: the open chat, all chats, and the answers that are being written.

import { complain } from "./dom.js";
import * as store from "./store.js";

export const state = { chat: store.newChat(), chats: [], running: undefined }; // running: an AbortController

// Keep a chat that has changed.
export function keep(chat) {
  chat.changed = Date.now();
  const first = store.branch(chat)[0];
  if (first !== undefined) chat.title = chat.nodes[first].content.slice(0, 60) || "New chat";
  if (!state.chats.includes(chat)) state.chats.push(chat);
  store.keep(chat).catch(complain);
}

// The messages up to a place, as requests have them.
export function history(chat, place) {
  const found = [];
  for (let at = place; at >= 0; at = chat.nodes[at].parent) found.unshift({ role: chat.nodes[at].role, content: chat.nodes[at].content });
  return chat.system ? [{ role: "system", content: chat.system }, ...found] : found;
}
