// The settings of a chat: its system prompt and how its answers are sampled. The theme and the key are the browser's.

import { by } from "./dom.js";
import { keep, state } from "./state.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "stop", "schema", "turns"];

export function showSettings(chat) {
  by("system").value = chat.system;
  for (const name of FIELDS) by(name).value = chat.settings?.[name] ?? "";
  by("probabilities").checked = Boolean(chat.settings?.probabilities);
}

export function takeSettings() {
  const { chat } = state;
  chat.system = by("system").value;
  chat.settings = Object.fromEntries(FIELDS.map((name) => [name, by(name).value]));
  chat.settings.probabilities = by("probabilities").checked;
  if (chat.nodes.length) keep(chat);
}

// The fields of a request. Throws for a JSON schema that is none.
export function settingsOf({ settings = {} }) {
  const found = {};
  for (const name of NUMBERS) if (settings[name]) found[name] = Number(settings[name]);
  if (settings.stop) found.stop = [settings.stop];
  if (settings.probabilities) Object.assign(found, { logprobs: true, top_logprobs: 5 });
  if (settings.schema?.trim()) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } };
  return found;
}

// ------------------------------------------------------------------ light and dark

export function showTheme() {
  const theme = localStorage.getItem("theme") ?? "";
  by("theme").value = theme;
  document.documentElement.dataset.theme = theme;
}

export function takeTheme() {
  localStorage.setItem("theme", by("theme").value);
  showTheme();
}
