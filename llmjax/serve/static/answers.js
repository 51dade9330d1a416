// Answers: of one model, of two beside each other, or from a source.

import { act } from "./agent.js";
import { chunks } from "./api.js";
import { best, draw, grow } from "./conversation.js";
import { atBottom, button, by, complain, element, say, toBottom } from "./dom.js";
import { settingsOf } from "./settings.js";
import { askSource, isAgent } from "./sources.js";
import { history, keep, state } from "./state.js";
import * as store from "./store.js";

// The models that answer.
const choice = (chat) => [by("model").value, isAgent(chat) ? "" : by("other").value].filter(Boolean); // two agents would act twice

// Write an answer to the message at a place of the open chat: the places of the answers. An answer that is there already becomes
// its sibling. `given`: the models and the messages, where they are not those of the page.
export async function answer(parent, given = {}) {
  if (state.running) return;
  const { chat } = state; // another one may be opened before the answer ends
  complain();
  let settings;
  try {
    settings = settingsOf(chat);
  } catch (error) {
    return complain(`the JSON schema cannot be read: ${error.message}`);
  }
  const { models = choice(chat), messages = history(chat, parent) } = given;
  if (models.length > 1) settings.seed ??= Math.floor(Math.random() * 2 ** 31); // both get the same chance
  const before = chat.chosen[parent];
  delete chat.chosen[parent];
  draw();
  const running = (state.running = new AbortController());
  busy(true);
  const shown = models.map((model, i) => waiting(models.length > 1 ? `Answer ${i + 1}` : model)); // who wrote is told after the choice
  by("log").append(models.length > 1 ? element("div", { className: "pair" }, ...shown) : shown[0]);
  toBottom();
  const made = models.map((model) => ({ role: "assistant", content: "", model }));
  const write = isAgent(chat)
    ? (i) => act({ chat, parent, node: made[i], shown: shown[i], signal: running.signal })
    : chat.source || chat.files?.length
    ? (i) => askSource({ chat, parent, node: made[i], signal: running.signal })
    : (i) => stream({ messages, ...settings, model: models[i] }, made[i], shown[i], running.signal);
  const ended = await Promise.allSettled(models.map((_, i) => write(i)));
  state.running = undefined;
  busy(false);
  const failed = ended.filter((one) => one.status === "rejected").map((one) => one.reason);
  failed.filter((reason) => reason.name !== "AbortError").forEach(complain);
  ended.forEach((one, i) => one.status === "rejected" && (made[i].finish = "stopped"));
  const places = made.filter((one) => one.content).map((one) => store.add(chat, parent, one));
  if (places.length > 1) chat.chosen[parent] = places[0];
  if (!places.length && before !== undefined) chat.chosen[parent] = before;
  keep(chat);
  if (chat !== state.chat) return places;
  const low = atBottom();
  draw();
  if (low) toBottom();
  if (places.length > 1 && !failed.length) vote(places, shown);
  say(failed.length ? "answer stopped" : "answer complete");
  by("message").focus();
  return places;
}

function waiting(title) {
  const made = element("article", { className: "assistant", dir: "auto" }, element("h2", { textContent: title }));
  made.append(element("div", { className: "text" }));
  return made;
}

async function stream(body, node, shown, signal) {
  const text = shown.querySelector(".text");
  const began = performance.now();
  let first = 0;
  let frame = 0;
  const seen = { nodes: 0, characters: 0 };
  const paint = () => {
    frame = 0;
    const low = atBottom();
    grow(text, node.content, seen);
    low ? toBottom() : (by("newer").hidden = false);
  };
  try {
    for await (const chunk of chunks(body, signal)) {
      const [choice] = chunk.choices;
      if (choice?.delta.content) {
        first ||= performance.now();
        node.content += choice.delta.content;
        if (chunk.persona) Object.assign(node, { simulates: chunk.persona.name, said: chunk.persona.said, declined: chunk.persona.declined });
        frame ||= requestAnimationFrame(paint);
      }
      if (choice?.logprobs?.content) (node.tokens ??= []).push(...choice.logprobs.content);
      if (choice?.finish_reason) node.finish = choice.finish_reason;
      if (chunk.usage) {
        const count = chunk.usage.completion_tokens;
        const speed = (count / Math.max((performance.now() - (first || began)) / 1000, 0.001)).toFixed(1);
        node.facts = `${count} tokens, ${speed} a second`;
      }
    }
  } finally {
    cancelAnimationFrame(frame);
    paint();
  }
}

// Two answers beside each other, in place of the one that the conversation shows: the better one goes on.
function vote(places, shown) {
  by("log").lastChild.replaceWith(element("div", { className: "pair" }, ...shown));
  shown.forEach((one, i) => one.append(button(i ? "The second is better" : "The first is better", () => best(places[i], places))));
  toBottom();
}

function busy(on) {
  by("send").hidden = on;
  by("stop-answer").hidden = !on;
  by("log").setAttribute("aria-busy", String(on));
  if (on) say("answering");
}
