// What the page shows now: the open chat, all chats, and the answers that are being written.

import { complain } from "./dom.js";
import * as store from "./store.js";

// personas: what the server says of each model that is one; running: an AbortController
export const state = { chat: store.newChat(), chats: [], personas: new Map(), running: undefined };

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
  return withSystem(chat, found);
}

const withSystem = (chat, messages) => (chat.system ? [{ role: "system", content: chat.system }, ...messages] : messages);

// The same messages as one of two personas hears them: what the other one said is the user's. Of several user messages in a row
// the last one counts.
export function heard(chat, place, model) {
  const found = [];
  for (let at = place; at >= 0; at = chat.nodes[at].parent) {
    const { role, content, said = content, model: whose } = chat.nodes[at];
    const mine = role === "assistant" && whose === model;
    if (mine || found[0]?.role !== "user") found.unshift(mine ? { role, content } : { role: "user", content: said });
  }
  return withSystem(chat, found);
}
