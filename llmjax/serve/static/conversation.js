// The conversation on the page: a message with what can be done with it.

import { ask } from "./api.js";
import { stepsView } from "./agent.js";
import { answer } from "./answers.js";
import { drawFiles, sourcesView } from "./files.js";
import { button, by, complain, copy, download, element, say } from "./dom.js";
import { drawList } from "./history.js";
import { lastBlock, markdown } from "./markdown.js";
import { drawSources } from "./sources.js";
import { history, keep, state } from "./state.js";
import * as store from "./store.js";
import { tableView } from "./table.js";
import { tokensView } from "./tokens.js";

export function draw() {
  by("log").replaceChildren(...store.branch(state.chat).map(article));
  drawSources();
  drawFiles();
  drawList();
}

function changed() {
  keep(state.chat);
  draw();
}

function article(place) {
  const node = state.chat.nodes[place];
  const made = element("article", { className: node.role, tabIndex: -1, dir: "auto" }, element("h2", { textContent: store.writer(node) }));
  const text = element("div", { className: "text" });
  const beside = element("div", { className: "beside" });
  made.append(text, beside, element("div", { className: "tools" }));
  fill(text, node);
  if (node.steps) made.insertBefore(stepsView(node.steps), text);
  if (node.sources) beside.append(sourcesView(node.sources));
  made.lastChild.append(...tools(place, made));
  return made;
}

// Put the text of a message, or its table, into an element.
export function fill(into, node) {
  if (node.table) into.replaceChildren(tableView(node.table));
  else into.replaceChildren(...(node.role === "user" ? [element("p", { textContent: node.content })] : markdown(node.content, codeBar)));
}

// Show a text that grows. The blocks before its last one are not made again: `seen` counts them, and their characters.
export function grow(into, text, seen) {
  while (into.childNodes.length > seen.nodes) into.lastChild.remove();
  const end = lastBlock(text, seen.characters);
  if (end > seen.characters) {
    into.append(...markdown(text.slice(seen.characters, end), codeBar));
    Object.assign(seen, { nodes: into.childNodes.length, characters: end });
  }
  into.append(...markdown(text.slice(end), codeBar));
}

function codeBar(code, language) {
  return [element("div", { className: "bar" }, element("span", { textContent: language || "text" }), button("Copy code", () => copy(code)))];
}

const note = (text) => element("span", { className: "note", textContent: text });

function tools(place, shown) {
  const { chat } = state;
  const node = chat.nodes[place];
  const others = store.siblings(chat, place);
  const found = [button("Copy", () => copy(node.content))];
  if (node.role === "user") found.push(button("Edit", () => edit(place, shown)));
  else {
    found.push(button("Again", () => answer(node.parent)));
    for (const [label, good] of [["Good", true], ["Bad", false]]) found.push(button(label, () => rate(place, good), node.rated === good));
    if (others.length > 1) found.push(button("Best", () => best(place), chat.best?.[node.parent] === place));
    if (node.transcript) found.push(button("Transcript", () => download("transcript.jsonl", "application/jsonl", `${node.transcript}\n`)));
    if (node.tokens) found.push(button("Tokens", (event) => toggleTokens(event.target, place, shown), false));
  }
  if (others.length > 1) {
    const at = others.indexOf(place);
    const go = (step) => () => {
      chat.chosen[node.parent] = others[at + step];
      changed();
    };
    const [before, after] = [button("Earlier", go(-1)), button("Later", go(1))];
    before.disabled = !at;
    after.disabled = at === others.length - 1;
    found.push(before, note(`${at + 1}/${others.length}`), after);
  }
  if (node.role !== "user") {
    if (node.finish === "length") found.push(note("cut at the most tokens"));
    if (node.finish === "stopped") found.push(note("stopped"));
    if (node.facts) found.push(note(node.facts));
  }
  return found;
}

function toggleTokens(pressed, place, shown) {
  const on = pressed.getAttribute("aria-pressed") !== "true";
  pressed.setAttribute("aria-pressed", String(on));
  const text = shown.querySelector(".text");
  if (on) text.replaceChildren(tokensView(state.chat.nodes[place].tokens));
  else fill(text, state.chat.nodes[place]);
}

// Change a message: a field in its place, whose text becomes a branch with an answer of its own.
export function edit(place, shown) {
  const node = state.chat.nodes[place];
  const field = element("textarea", { value: node.content, rows: 4, ariaLabel: "Edited message" });
  const send = () => {
    if (state.running) return complain("an answer is being written: stop it first");
    answer(store.add(state.chat, node.parent, { role: "user", content: field.value }));
  };
  field.onkeydown = (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      draw();
      by("message").focus();
    }
  };
  shown.querySelector(".text").replaceChildren(field, element("div", {}, button("Send", send), button("Cancel", draw)));
  field.focus();
}

// ------------------------------------------------------------------ ratings, which become rows for training

async function rate(place, good) {
  const { chat } = state;
  const node = chat.nodes[place];
  node.rated = good;
  changed();
  await keepRow({ prompt: history(chat, node.parent), completion: node.content, label: good });
}

// An answer that is better than others to the same message: a pair of it with each of them.
export async function best(place, others = store.siblings(state.chat, place)) {
  const { chat } = state;
  const node = chat.nodes[place];
  chat.best = { ...chat.best, [node.parent]: place };
  chat.chosen[node.parent] = place;
  changed();
  const prompt = history(chat, node.parent);
  for (const other of others) {
    const rejected = chat.nodes[other].content;
    if (other !== place && rejected !== node.content) await keepRow({ prompt, chosen: node.content, rejected });
  }
}

async function keepRow(row) {
  await ask("feedback", row).then(() => say("your rating is kept"), complain);
}
