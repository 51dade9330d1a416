// The list of chats in this browser, and files of them.

import { draw } from "./conversation.js";
import { button, by, complain, download, element, say, toBottom } from "./dom.js";
import { showSettings } from "./settings.js";
import { state } from "./state.js";
import * as store from "./store.js";

export function drawList() {
  const wanted = by("search").value.toLowerCase();
  const matches = (one) => !wanted || one.title.toLowerCase().includes(wanted) || one.nodes.some((node) => node.content.toLowerCase().includes(wanted));
  const rows = state.chats.filter(matches).sort((a, b) => b.changed - a.changed);
  by("chat-list").replaceChildren(...rows.map(row));
}

function row(one) {
  const open = button(one.title, () => show(one));
  open.setAttribute("aria-current", String(one === state.chat));
  const drop = button("Delete", async () => {
    state.chats = state.chats.filter((other) => other !== one);
    await store.remove(one.id).catch(complain);
    show(one === state.chat ? store.newChat() : state.chat);
  });
  drop.setAttribute("aria-label", `Delete ${one.title}`);
  return element("li", {}, open, drop);
}

export function show(chat) {
  state.running?.abort();
  state.chat = chat;
  complain();
  showSettings(chat);
  draw();
  toBottom();
}

export const exportAll = () => download("chats.json", "application/json", store.exported(state.chats));
export const exportMarkdown = () => download("chat.md", "text/markdown", store.asMarkdown(state.chat));

export async function importFile() {
  try {
    for (const one of store.imported(await by("file").files[0].text())) {
      state.chats.push(one);
      await store.keep(one);
    }
    drawList();
    say("imported");
  } catch (error) {
    complain(`the file cannot be read: ${error.message}`);
  }
  by("file").value = "";
}

export async function deleteAll() {
  if (!confirm("Delete all chats in this browser?")) return;
  state.chats = [];
  await store.clear().catch(complain);
  show(store.newChat());
}
