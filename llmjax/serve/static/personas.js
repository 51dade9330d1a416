// Personas: what the page says of them while they can answer, and two of them that converse.

import { answer } from "./answers.js";
import { by, element } from "./dom.js";
import { heard, state } from "./state.js";

const TURNS = 6;
const MOST_TURNS = 20;

const chosen = () => [by("model").value, by("other").value].filter((model) => state.personas.has(model));

// Show what each chosen persona is, above the message that would go to it.
export function drawPersonas() {
  const models = chosen();
  const disclosures = new Set(models.map((model) => state.personas.get(model).disclosure));
  by("disclosures").replaceChildren(...[...disclosures].map((textContent) => element("p", { className: "note", textContent })));
  by("talk").hidden = new Set(models).size < 2;
}

// Let both personas answer by turns, beginning with the message at a place. It ends after the turns of the settings, when it
// is stopped, when another chat is opened, or when one declines what the other declined.
export async function talk(place) {
  const { chat } = state;
  const models = chosen();
  const turns = Math.min(Math.max(Number(chat.settings?.turns) || TURNS, 1), MOST_TURNS);
  let declined = false;
  for (let turn = 0; turn < turns && chat === state.chat; turn++) {
    const model = models[turn % 2];
    const [made] = (await answer(place, { models: [model], messages: heard(chat, place, model) })) ?? [];
    if (made === undefined || chat.nodes[made].finish !== "stop" || (declined && chat.nodes[made].declined)) return;
    ({ declined } = chat.nodes[made]);
    place = made;
  }
}
