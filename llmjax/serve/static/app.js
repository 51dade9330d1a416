// The page: a conversation with the model, its branches and its settings. This file joins the parts to what the user does.

import { ask } from "./api.js";
import { answer } from "./answers.js";
import { draw, edit } from "./conversation.js";
import { atBottom, by, complain, toBottom } from "./dom.js";
import { addFiles } from "./files.js";
import { deleteAll, drawList, exportAll, exportMarkdown, importFile, show } from "./history.js";
import { drawPersonas, talk } from "./personas.js";
import { showSettings, showTheme, takeSettings, takeTheme } from "./settings.js";
import { loadSources, takeSource } from "./sources.js";
import { keep, state } from "./state.js";
import * as store from "./store.js";

const message = by("message");

function toggle(id, opener) {
  by(id).hidden = !by(id).hidden;
  by(opener).setAttribute("aria-expanded", String(!by(id).hidden));
  if (!by(id).hidden) by(id).querySelector("button, input, textarea, select").focus();
}

by("open-chats").onclick = () => toggle("chats", "open-chats");
by("open-settings").onclick = () => toggle("settings", "open-settings");
by("open-help").onclick = () => by("help").showModal();
by("new-chat").onclick = () => {
  show(store.newChat());
  message.focus();
};
by("search").oninput = drawList;
by("export").onclick = exportAll;
by("export-markdown").onclick = exportMarkdown;
by("import").onclick = () => by("file").click();
by("file").onchange = importFile;
by("delete-all").onclick = deleteAll;
by("settings").onsubmit = (event) => event.preventDefault();
by("settings").onchange = takeSettings;
by("theme").onchange = takeTheme;
by("key").onchange = () => {
  sessionStorage.setItem("key", by("key").value);
  start();
};
by("source").onchange = takeSource;
by("attach").onclick = () => by("attached").click();
by("attached").onchange = async () => {
  await addFiles([...by("attached").files]);
  by("attached").value = "";
};
by("newer").onclick = toBottom;
by("log").onscroll = () => atBottom() && (by("newer").hidden = true);
by("stop-answer").onclick = () => state.running?.abort();
by("model").onchange = drawPersonas;
by("other").onchange = drawPersonas;
by("talk").onclick = () => send(talk);
by("composer").onsubmit = (event) => {
  event.preventDefault();
  send(answer);
};

function send(then) {
  if (state.running || !message.value.trim()) return;
  const place = store.add(state.chat, store.branch(state.chat).at(-1) ?? -1, { role: "user", content: message.value });
  message.value = "";
  keep(state.chat);
  then(place);
}

message.onkeydown = (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    by("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !message.value) {
    const mine = store.branch(state.chat).findLast((place) => state.chat.nodes[place].role === "user");
    if (mine !== undefined) edit(mine, by("log").children[store.branch(state.chat).indexOf(mine)]);
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape") state.running?.abort();
  if (event.target.matches("input, textarea, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    message.focus();
  }
  if (event.key === "?") by("help").showModal();
};

async function start() {
  complain(); // not later: what else is wrong by then must stay
  try {
    const { data } = await (await ask("v1/models")).json();
    state.personas = new Map(data.filter((one) => one.persona).map((one) => [one.id, one.persona]));
    const options = () => data.map(({ id, persona }) => new Option(store.writer({ model: id, simulates: persona?.name }), id));
    by("model").replaceChildren(...options());
    by("other").replaceChildren(new Option("no other", ""), ...options());
    drawPersonas();
    await loadSources();
  } catch (error) {
    complain(error.status === 401 ? "this server needs an API key: give it in the settings" : error);
  }
}

showTheme();
showSettings(state.chat);
start();
store.all().then((found) => {
  state.chats.push(...found);
  drawList();
}, complain);
draw();
message.focus();
