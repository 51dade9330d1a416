// The page: a conversation with the model, its branches and its settings.

import { ask, chunks } from "./api.js";
import { markdown } from "./markdown.js";
import * as store from "./store.js";
import { tokensView } from "./tokens.js";

const by = (id) => document.getElementById(id);
const log = by("log");
const message = by("message");
let chats = [];
let chat = store.newChat();
let running; // AbortController of the answers that are being written

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function button(label, onclick, pressed) {
  const node = element("button", { type: "button", textContent: label, onclick });
  if (pressed !== undefined) node.setAttribute("aria-pressed", String(pressed));
  return node;
}

const say = (text) => (by("status").textContent = text);
const complain = (error) => (by("error").textContent = error ? String(error.message ?? error) : "");

async function copy(text) {
  await navigator.clipboard.writeText(text).then(() => say("copied"), complain);
}

function codeBar(code, language) {
  return [element("div", { className: "bar" }, element("span", { textContent: language || "text" }), button("Copy code", () => copy(code)))];
}

// ------------------------------------------------------------------ the conversation on the page

function draw() {
  log.replaceChildren(...store.branch(chat).map(article));
  by("system").value = chat.system;
  drawList();
}

function article(place) {
  const node = chat.nodes[place];
  const mine = node.role === "user";
  const made = element("article", { className: node.role, tabIndex: -1 }, element("h2", { textContent: mine ? "You" : node.model || "Model" }));
  made.dir = "auto";
  const text = element("div", { className: "text" });
  made.append(text, element("div", { className: "tools" }));
  fill(text, node);
  made.lastChild.append(...tools(place, made));
  return made;
}

function fill(into, node) {
  into.replaceChildren(...(node.role === "user" ? [element("p", { textContent: node.content })] : markdown(node.content, codeBar)));
}

function tools(place, shown) {
  const node = chat.nodes[place];
  const others = store.siblings(chat, place);
  const found = [button("Copy", () => copy(node.content))];
  if (node.role === "user") found.push(button("Edit", () => edit(place, shown)));
  else {
    found.push(button("Again", () => answer(node.parent)));
    if (node.finish === "length") found.push(element("span", { textContent: "cut at the most tokens" }));
    for (const [label, good] of [["Good", true], ["Bad", false]]) found.push(button(label, () => rate(place, good), node.rated === good));
    if (node.tokens) found.push(button("Tokens", (event) => toggleTokens(event.target, place, shown), false));
    if (node.facts) found.push(element("span", { textContent: node.facts }));
  }
  if (others.length > 1) {
    const at = others.indexOf(place);
    const go = (step) => () => {
      chat.chosen[node.parent] = others[at + step];
      changed();
      draw();
    };
    const [before, after] = [button("Earlier", go(-1)), button("Later", go(1))];
    before.disabled = !at;
    after.disabled = at === others.length - 1;
    found.push(before, element("span", { textContent: `${at + 1}/${others.length}` }), after);
  }
  return found;
}

function toggleTokens(pressed, place, shown) {
  const on = pressed.getAttribute("aria-pressed") !== "true";
  pressed.setAttribute("aria-pressed", String(on));
  const text = shown.querySelector(".text");
  if (on) text.replaceChildren(tokensView(chat.nodes[place].tokens));
  else fill(text, chat.nodes[place]);
}

function edit(place, shown) {
  const node = chat.nodes[place];
  const field = element("textarea", { value: node.content, rows: 4, ariaLabel: "Edited message" });
  const send = button("Send", () => {
    const made = store.add(chat, node.parent, { role: "user", content: field.value });
    answer(made);
  });
  shown.querySelector(".text").replaceChildren(field, send, button("Cancel", draw));
  field.focus();
}

function history(place) {
  const found = [];
  for (let at = place; at >= 0; at = chat.nodes[at].parent) found.unshift({ role: chat.nodes[at].role, content: chat.nodes[at].content });
  return chat.system ? [{ role: "system", content: chat.system }, ...found] : found;
}

function settings() {
  const found = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) if (by(name).value !== "") found[name] = Number(by(name).value);
  if (by("stop").value) found.stop = [by("stop").value];
  if (by("probabilities").checked) Object.assign(found, { logprobs: true, top_logprobs: 5 });
  if (by("schema").value.trim()) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(by("schema").value) } };
  return found;
}

// ------------------------------------------------------------------ answers

async function answer(parent) {
  if (running) return;
  complain();
  let body;
  try {
    body = { messages: history(parent), ...settings() };
  } catch (error) {
    return complain(`the JSON schema cannot be read: ${error.message}`);
  }
  const models = [by("model").value, by("other").value].filter(Boolean);
  if (models.length > 1) body.seed ??= Math.floor(Math.random() * 2 ** 31); // both get the same chance
  delete chat.chosen[parent];
  draw();
  running = new AbortController();
  busy(true);
  const shown = models.map(() => element("article", { className: "assistant" }, element("h2"), element("div", { className: "text" })));
  log.append(models.length > 1 ? element("div", { className: "pair" }, ...shown) : shown[0]);
  const made = models.map((model) => ({ role: "assistant", content: "", model }));
  const ended = await Promise.allSettled(models.map((model, i) => write({ ...body, model }, made[i], shown[i])));
  running = undefined;
  busy(false);
  for (const one of ended) if (one.status === "rejected" && one.reason.name !== "AbortError") complain(one.reason);
  if (models.length > 1 && made.every((one) => one.content)) vote(parent, made, shown);
  else {
    for (const one of made) if (one.content) store.add(chat, parent, one);
    draw();
  }
  changed();
  say(ended.some((one) => one.status === "rejected") ? "answer stopped" : "answer complete");
  message.focus();
}

async function write(body, node, shown) {
  const text = shown.querySelector(".text");
  shown.querySelector("h2").textContent = body.model;
  const began = performance.now();
  let first = 0;
  let frame = 0;
  const paint = () => {
    frame = 0;
    const low = atBottom();
    fill(text, node);
    low ? toBottom() : (by("newer").hidden = false);
  };
  for await (const chunk of chunks(body, running.signal)) {
    const [choice] = chunk.choices;
    if (choice?.delta.content) {
      first ||= performance.now();
      node.content += choice.delta.content;
      frame ||= requestAnimationFrame(paint);
    }
    if (choice?.logprobs?.content) (node.tokens ??= []).push(...choice.logprobs.content);
    if (choice?.finish_reason) node.finish = choice.finish_reason;
    if (chunk.usage) {
      const speed = (chunk.usage.completion_tokens / Math.max((performance.now() - (first || began)) / 1000, 0.001)).toFixed(1);
      node.facts = `${chunk.usage.completion_tokens} tokens, ${speed} a second`;
    }
  }
  paint();
}

// Two answers side by side: the better one goes on, and the pair becomes a row of preferences.
function vote(parent, made, shown) {
  const choose = (better) => async () => {
    const places = made.map((one) => store.add(chat, parent, one));
    chat.chosen[parent] = places[better];
    changed();
    draw();
    await keepRow({ prompt: history(parent), chosen: made[better].content, rejected: made[1 - better].content });
  };
  shown.forEach((one, i) => one.append(button(i ? "The right one is better" : "The left one is better", choose(i))));
}

async function rate(place, good) {
  const node = chat.nodes[place];
  node.rated = good;
  changed();
  draw();
  await keepRow({ prompt: history(node.parent), completion: node.content, label: good });
}

async function keepRow(row) {
  await ask("feedback", row).then(() => say("your rating is kept"), complain);
}

function busy(on) {
  by("send").hidden = on;
  by("stop-answer").hidden = !on;
  log.setAttribute("aria-busy", String(on));
  if (on) say("answering");
}

const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;
function toBottom() {
  log.scrollTop = log.scrollHeight;
  by("newer").hidden = true;
}

// ------------------------------------------------------------------ chats

function changed() {
  chat.changed = Date.now();
  const first = store.branch(chat)[0];
  if (first !== undefined) chat.title = chat.nodes[first].content.slice(0, 60) || "New chat";
  if (!chats.includes(chat)) chats.push(chat);
  store.keep(chat).catch(complain);
  drawList();
}

function drawList() {
  const wanted = by("search").value.toLowerCase();
  const matches = (one) => !wanted || one.title.toLowerCase().includes(wanted) || one.nodes.some((node) => node.content.toLowerCase().includes(wanted));
  const rows = chats.filter(matches).sort((a, b) => b.changed - a.changed);
  by("chat-list").replaceChildren(...rows.map((one) => {
    const open = button(one.title, () => show(one));
    open.setAttribute("aria-current", String(one === chat));
    const drop = button("Delete", async () => {
      chats = chats.filter((other) => other !== one);
      await store.remove(one.id).catch(complain);
      show(one === chat ? store.newChat() : chat);
    });
    drop.setAttribute("aria-label", `Delete ${one.title}`);
    return element("li", {}, open, drop);
  }));
}

function show(one) {
  running?.abort();
  chat = one;
  complain();
  draw();
  toBottom();
}

function download() {
  const url = URL.createObjectURL(new Blob([store.exported(chats)], { type: "application/json" }));
  element("a", { href: url, download: "chats.json" }).click();
  URL.revokeObjectURL(url);
}

async function upload() {
  try {
    for (const one of store.imported(await by("file").files[0].text())) {
      chats.push(one);
      await store.keep(one);
    }
    drawList();
    say("imported");
  } catch (error) {
    complain(`the file cannot be read: ${error.message}`);
  }
  by("file").value = "";
}

// ------------------------------------------------------------------ what the user does

function toggle(id, opener) {
  by(id).hidden = !by(id).hidden;
  by(opener).setAttribute("aria-expanded", String(!by(id).hidden));
  if (!by(id).hidden) by(id).querySelector("button, input, textarea, select").focus();
}

by("open-chats").onclick = () => toggle("chats", "open-chats");
by("open-settings").onclick = () => toggle("settings", "open-settings");
by("open-help").onclick = () => by("help").showModal();
by("new-chat").onclick = () => show(store.newChat());
by("search").oninput = drawList;
by("export").onclick = download;
by("import").onclick = () => by("file").click();
by("file").onchange = upload;
by("delete-all").onclick = async () => {
  if (!confirm("Delete all chats in this browser?")) return;
  chats = [];
  await store.clear().catch(complain);
  show(store.newChat());
};
by("system").onchange = () => {
  chat.system = by("system").value;
  changed();
};
by("key").onchange = () => {
  sessionStorage.setItem("key", by("key").value);
  start();
};
by("settings").onsubmit = (event) => event.preventDefault();
by("newer").onclick = toBottom;
log.onscroll = () => atBottom() && (by("newer").hidden = true);
by("stop-answer").onclick = () => running?.abort();
by("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running || !message.value.trim()) return;
  const place = store.add(chat, store.branch(chat).at(-1) ?? -1, { role: "user", content: message.value });
  message.value = "";
  changed();
  answer(place);
  toBottom();
};
message.onkeydown = (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    by("composer").requestSubmit();
  } else if (event.key === "ArrowUp" && !message.value) {
    const mine = store.branch(chat).findLast((place) => chat.nodes[place].role === "user");
    if (mine !== undefined) edit(mine, log.children[store.branch(chat).indexOf(mine)]);
  }
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.target.matches("input, textarea, select")) return;
  if (event.key === "/") {
    event.preventDefault();
    message.focus();
  }
  if (event.key === "?") by("help").showModal();
};

async function start() {
  try {
    const { data } = await (await ask("v1/models")).json();
    by("model").replaceChildren(...data.map((one) => new Option(one.id)));
    by("other").replaceChildren(new Option("no other", ""), ...data.map((one) => new Option(one.id)));
    complain();
  } catch (error) {
    complain(error.status === 401 ? "this server needs an API key: give it in the settings" : error);
  }
}

start();
store.all().then((found) => {
  chats = found;
  drawList();
}, complain);
draw();
message.focus();
