// The studio: which view is shown, the keys, and the model that the chat has.

import { get, h, post } from "./dom.js";
import { report } from "./curves.js";
import { arms } from "./arms.js";
import { data, rows } from "./data.js";
import { list } from "./list.js";
import { run } from "./run.js";
import { chain, compare, study } from "./several.js";

const VIEWS = { "": (_, more) => list(more), run, compare, study, arms, chain, data, rows };
const view = document.getElementById("view"), help = document.getElementById("help"), chat = document.getElementById("chat");
let leaving = new AbortController();

function show() {
  leaving.abort();
  leaving = new AbortController();
  const [name, parameters] = location.hash.replace(/^#\/?/, "").split("?");
  const made = Object.hasOwn(VIEWS, name) ? VIEWS[name] : VIEWS[""];
  const given = new URLSearchParams(parameters ?? "");
  view.replaceChildren(made(given, { signal: leaving.signal }));
  document.title = `${given.get("name") ?? (name || "runs")} - llmjax studio`;
}

const rowsOf = () => [...view.querySelectorAll("tr[data-name]")];

function move(by) {
  const all = rowsOf();
  if (!all.length) return;
  const at = all.indexOf(document.activeElement?.closest("tr[data-name]"));
  all[at < 0 ? 0 : Math.min(Math.max(at + by, 0), all.length - 1)].querySelector("a").focus();
}

function turn(by) {
  const tabs = [...view.querySelectorAll(".tabs a")];
  const at = tabs.findIndex((tab) => tab.getAttribute("aria-current") === "page");
  tabs[(at + by + tabs.length) % tabs.length]?.click();
}

const KEYS = {
  "/": () => document.getElementById("filter")?.focus(),
  j: () => move(1),
  k: () => move(-1),
  x: () => document.activeElement?.closest("tr[data-name]")?.querySelector("input")?.click(),
  c: () => document.querySelector("#compare[href]")?.click(),
  "[": () => turn(-1),
  "]": () => turn(1),
  g: () => { location.hash = "#/"; },
  "?": () => help.showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest("input:not([type=checkbox]), textarea, select");
  if (event.key === "Escape" && typing) typing.blur();
  if (typing || help.open || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
});
document.getElementById("open-help").addEventListener("click", () => help.showModal());

// The model of the chat: asked again while it is being loaded.
async function tellChat() {
  const state = await get("api/chat").catch(() => null);
  if (!state) return;
  const waiting = state.loading || (state.name && !state.ready && !state.error);
  chat.replaceChildren(
    state.error ? h("span", { class: "bad" }, state.error) : "",
    waiting ? `loading ${state.loading || state.name}` : "",
    state.ready ? h("a", { href: "chat/", target: "_blank", rel: "noopener" }, `Chat with ${state.name}`) : "",
    state.ready ? h("button", { type: "button", "aria-label": "Free the model", on: { click: () => post("api/chat", { name: null }).then(tellChat, report) } }, "×") : "");
  if (waiting) setTimeout(tellChat, 1000);
}

addEventListener("hashchange", () => {
  show();
  view.focus({ preventScroll: true });
  scrollTo(0, 0);
});
addEventListener("chat", tellChat);
show();
tellChat();
