// Held-out rows scored by a checkpoint in the chat's server: the best and the worst, with the surprise of each token.

import { card, get, h, post, quiet, short } from "./dom.js";
import { report } from "./curves.js";

const ROWS = 32, BATCH = 8, CHARACTERS = 1500, TOKENS = 512, SHOWN = 8; // rows of a batch have one shape, which is compiled once
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

// Load a checkpoint for the chat and wait for it: its name there.
export async function load(name, step) {
  await post("api/chat", { name, step });
  dispatchEvent(new Event("chat"));
  for (;;) {
    const state = await get("api/chat");
    if (state.error) throw new Error(state.error);
    if (state.ready) return state.name;
    await pause(500);
  }
}

const folder = (run, end) => run.data.find((name) => name === end || name.endsWith(`/${end}`));

// Rows of a run that it has not learnt: {prompt} a text, or ids with the tokens to count; at most `room` tokens.
async function rowsOf(run, room) {
  const most = Math.min(TOKENS, room - 1), characters = Math.min(CHARACTERS, Math.floor(room / 2));
  const examples = folder(run, "rows");
  if (examples) {
    const found = await get("api/rows", { name: `${examples}/heldout.npz`, count: ROWS });
    return found.groups.flatMap((group) => group.parts.map((part, i) => ({ prompt: group.ids[i].slice(0, most), counted: part.slice(0, most).map((piece) => Boolean(piece.learnt)) })));
  }
  const { entries } = await get("api/files", { name: folder(run, "prepare/heldout") });
  const files = await Promise.all(entries.filter((entry) => entry.kind === "rows").map((entry) => get("api/rows", { name: entry.name, count: Math.ceil(ROWS / entries.length) })));
  return files.flatMap((file) => file.rows).filter((row) => typeof row.text === "string" && row.text).map((row) => ({ prompt: row.text.slice(0, characters) }));
}

// A row with its score: bits per byte of a text, or nats per learnt token; null: nothing was counted.
export function measured(row, { tokens, token_logprobs: values }) {
  const counted = values.map((value, i) => value !== null && (row.counted?.[i] ?? true));
  const nats = values.reduce((sum, value, i) => sum - (counted[i] ? value : 0), 0);
  const count = row.counted ? counted.filter(Boolean).length : new TextEncoder().encode(row.prompt).length * Math.LN2;
  return count ? { score: nats / count, tokens, values, counted } : null;
}

const surprise = (value) => (value > -0.7 ? "p4" : value > -2.3 ? "p3" : value > -4.6 ? "p2" : "p1");

export const shownRow = (row, unit) =>
  h("section", { class: "card" }, h("h3", {}, `${short(row.score)} ${unit}`),
    h("p", { class: "tokens", dir: "auto" }, row.tokens.map((text, i) => h("span", { class: `token ${row.counted[i] ? surprise(row.values[i]) : ""}`, title: row.values[i] === null ? null : `probability ${short(Math.exp(row.values[i]))}` }, text))));

// The best and the worst of rows with scores.
export function extremes(rows, unit) {
  const sorted = [...rows].sort((a, b) => a.score - b.score);
  const half = Math.min(SHOWN, Math.ceil(sorted.length / 2));
  return [
    h("p", { class: "quiet" }, `Mean of ${rows.length} rows: ${short(rows.reduce((sum, row) => sum + row.score, 0) / rows.length)} ${unit}. Tokens are underlined by their probability: `,
      ...[["p4", "over 1/2"], ["p3", "over 1/10"], ["p2", "over 1/100"], ["p1", "less"]].map(([kind, title]) => [h("span", { class: `token ${kind}` }, title), " "])),
    h("h2", {}, "Worst"), sorted.slice(-half).reverse().map((row) => shownRow(row, unit)),
    h("h2", {}, "Best"), sorted.slice(0, half).map((row) => shownRow(row, unit)),
  ];
}

// A section that scores held-out rows when it is asked to.
export function heldout(run, signal) {
  if (!run.checkpoints.length || !(folder(run, "rows") ?? folder(run, "prepare/heldout"))) return null;
  const place = h("div", {}), status = h("span", { class: "quiet", role: "status" });
  const step = h("select", { "aria-label": "checkpoint to score with" }, run.checkpoints.map((number) => h("option", { value: number }, `step ${number.toLocaleString("en")}`)));
  const score = async () => {
    status.textContent = "the model is being loaded";
    const model = await load(run.name, Number(step.value));
    const { data } = await get("chat/v1/models");
    const rows = await rowsOf(run, data[0].max_model_len), scored = [];
    let failed = 0;
    for (let first = 0; first < rows.length && !signal.aborted; first += BATCH) {
      status.textContent = `${first} of ${rows.length} rows`;
      const batch = rows.slice(first, first + BATCH);
      const answer = await post("chat/v1/completions", { model, prompt: batch.map((row) => row.prompt), echo: true, logprobs: 1, max_tokens: 0 }).catch((error) => {
        if (error.status !== 400) throw error;
        failed += batch.length; // a text of more tokens than the model reads
      });
      if (answer) scored.push(...batch.map((row, i) => measured(row, answer.choices[i].logprobs)).filter(Boolean));
    }
    status.textContent = `${scored.length} of ${rows.length} rows${failed ? `; ${failed} do not fit` : ""}`;
    place.replaceChildren(...(scored.length ? extremes(scored, rows[0].counted ? "nats per learnt token" : "bits per byte").flat(4) : [quiet("no row could be scored")]));
  };
  const button = h("button", { type: "button", on: { click: async () => {
    button.disabled = true;
    await score().catch((error) => {
      status.textContent = "";
      report(error);
    });
    button.disabled = false;
  } } }, "Score held-out rows");
  return card("Held-out rows", h("p", { class: "controls" }, button, step, status), place);
}
