// One run: its curves, what is known of it, its first batch, samples, rounds of a policy, data and settings.

import { ago, card, get, h, link, pill, post, quiet, short, size, table, tags } from "./dom.js";
import { live, report } from "./curves.js";
import { heldout, load } from "./heldout.js";
import { batch } from "./tokens.js";

export const TABS = { curves: "Curves", facts: "Facts", batch: "First batch", samples: "Samples", rounds: "Rounds", settings: "Settings" };

export const tiles = (run) =>
  h("div", { class: "tiles" }, run.tiles.map((tile) => h("div", { class: "card tile" }, h("p", { class: "label" }, tile.label), h("p", { class: "value" }, tile.value), h("p", { class: "quiet" }, tile.note))));

export function funnel(run) {
  if (!run.funnel.length) return null;
  const rows = run.funnel.map((step) => [
    h("span", { class: `step ${step.kind}` }, step.label), step.documents.toLocaleString("en"), size(step.bytes), `${(100 * step.share).toFixed(1)} %`,
    h("meter", { min: 0, max: 1, value: step.share, "aria-label": `${step.label}: share of what was read` }),
  ]);
  const sources = run.sources.map((source) => [source.name, ...["read", "rejected", "train", "heldout"].map((end) => size(source[end][1]))]);
  return card("Data",
    table([["all sources"], ["documents", "n"], ["text", "n"], ["share", "n"], [""]], rows, { label: "data funnel" }),
    table([["source"], ["read", "n"], ["rejected", "n"], ["to train on", "n"], ["held out", "n"]], sources, { label: "sources" }));
}

export function facts(run) {
  const [columns, rows] = run.evaluation;
  return [
    tiles(run),
    run.notes.length ? card("Notes", run.notes.map((note) => h("p", {}, note))) : null,
    card("Stages", run.stages.length ? h("p", {}, run.stages.map(([stage, state]) => [pill(state), ` ${stage} `])) : quiet("none is noted")),
    columns.length ? card("Evaluation on held-out text", table([["source"], ...columns.map((name) => [name.replaceAll("_", " "), "n"])], rows.map(([source, cells]) => [source, ...cells]), { label: "evaluation" })) : null,
    run.tables.map((one) => card(one.title, table(one.columns.map((name) => [name]), one.rows.map((cells) => cells.map(shown)), { label: one.title }))),
    funnel(run),
    run.tokenizer.length ? card("Tokenizer", table([["what"], ["value", "n"]], run.tokenizer, { label: "tokenizer" })) : null,
    Object.entries(run.results).map(([stage, found]) => card(`Results of ${stage}`, table([["what"], ["value", "n"]], Object.entries(found), { label: stage }))),
    run.data.length ? card("Rows", h("ul", {}, run.data.map((name) => h("li", {}, h("a", { href: link("data", { name }) }, name))))) : null,
  ];
}

export const shown = (value) => (typeof value === "number" ? short(value) : value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

export const settings = (run) => [
  card("Repeat it", h("pre", {}, run.command)),
  card("Changed from the default", table([["setting", "key"], ["value", "key"], ["default", "key"]], run.settings.filter((one) => one[3]).map((one) => one.slice(0, 3)), { label: "changed settings" })),
  h("details", { class: "card" }, h("summary", {}, `All ${run.settings.length} settings`), table([["setting", "key"], ["value", "key"]], run.settings.map((one) => one.slice(0, 2)), { label: "all settings" })),
];

// The tags and the note of a run, which can be changed.
export function marks(run) {
  const given = h("input", { value: run.tags.join(" "), autocomplete: "off", placeholder: "words" });
  const note = h("textarea", { rows: 3, maxlength: 2000 }, run.note);
  const shown = h("span", {}, tags(run)), told = h("span", { class: "quiet", role: "status" });
  const save = async (event) => {
    event.preventDefault();
    await post("api/marks", { name: run.name, tags: given.value.split(/[\s,#]+/).filter(Boolean), note: note.value }).then((found) => {
      shown.replaceChildren(...tags(found).flat());
      told.textContent = "saved";
    }, (error) => { told.textContent = error.message; });
  };
  return h("details", { class: "card" }, h("summary", {}, "Tags and note", shown),
    h("form", { class: "controls", on: { submit: save, input: () => { told.textContent = ""; } } },
      h("label", {}, "Tags ", given), h("label", {}, "Note ", note), h("button", { type: "submit" }, "Save"), told));
}

// Texts that the model wrote, and answers with their scores.
export const samples = (run, groups) => [
  groups.map(({ title, metric, count, best, worst }) => [
    answers(`${title}: best of ${count} by ${metric}`, best, metric), answers(`${title}: worst of ${count} by ${metric}`, worst, metric)]),
  run.samples.length ? h("h2", {}, "Continued prompts") : null,
  run.samples.map((sample) => h("section", { class: "card" }, h("pre", { dir: "auto" }, h("b", {}, sample.prompt), sample.text), quiet(`ended by: ${sample.finish}`))),
  groups.length || run.samples.length ? null : quiet("No answers are scored yet: the stages answers and eval write them, and generate continues prompts."),
];

function answers(title, rows, metric) {
  const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((key) => key !== metric && key !== "task" && !key.includes("/"));
  return h("details", { class: "card", open: true }, h("summary", {}, title),
    table([[metric, "n"], ...keys.map((key) => [key, "text"])], rows.map((row) => [short(row[metric]), ...keys.map((key) => shown(row[key]))]), { label: title }));
}

export const rollouts = (rows) =>
  table([["prompt", "text"], ["answer", "text"], ["finish"], ["reward", "n"], ["advantage", "n"]],
    rows.map((row) => [shown(row.prompt), shown(row.answer), shown(row.finish), row.reward === null ? "none" : h("span", { class: row.reward > 0 ? "good" : "" }, shown(row.reward)),
      h("span", { class: row.advantage > 0 ? "good" : row.advantage < 0 ? "bad" : "" }, shown(row.advantage))]), { label: "answers of a round" });

function rounds(run) {
  if (!run.rounds.length) return quiet("This run samples no answers.");
  const place = h("div", {});
  const show = (number) => get("api/rollouts", { name: run.name, round: number }).then(({ rows }) => place.replaceChildren(rollouts(rows)), report);
  const choice = h("select", { on: { change: (event) => show(event.target.value) } }, run.rounds.map((number) => h("option", { value: number }, number)));
  choice.value = String(run.rounds.at(-1));
  show(run.rounds.at(-1));
  return card("Answers of a round", h("label", {}, "Round ", choice), place);
}

function chat(run) {
  if (!run.checkpoints.length) return null;
  const step = h("select", { "aria-label": "checkpoint" }, run.checkpoints.map((number) => h("option", { value: number }, `step ${number.toLocaleString("en")}`)));
  const button = h("button", { type: "button", on: { click: async () => {
    button.disabled = true;
    await load(run.name, Number(step.value)).then(() => dispatchEvent(new Event("chat")), report);
    button.disabled = false;
  } } }, "Chat");
  return h("span", { class: "chat" }, button, step);
}

export function run(parameters, { signal }) {
  const name = parameters.get("name") ?? "", tab = TABS[parameters.get("tab")] ? parameters.get("tab") : "curves";
  const place = h("div", {}, quiet("reading"));
  get("api/run", { name }).then((found) => {
    const state = h("span", {}, pill(found.state, found.error)), step = h("span", { class: "quiet" });
    const told = (now) => {
      state.replaceChildren(pill(now.state, now.error));
      step.textContent = `${now.step === null || now.step === undefined ? "" : `step ${short(now.step)}${now.steps ? ` of ${short(now.steps)}` : ""}, `}changed ${ago(now.age)}`;
    };
    told(found);
    const content = h("div", { id: "tab" });
    place.replaceChildren(
      h("h1", {}, found.name || found.title, " ", state), h("p", {}, found.sentence), h("p", { class: "controls" }, step, chat(found)), marks(found),
      found.error ? h("p", { class: "bad", role: "note" }, found.error) : "",
      h("nav", { class: "tabs", "aria-label": "Parts of the run" }, Object.entries(TABS).filter(([key]) => key !== "rounds" || found.rounds.length).map(([key, title]) =>
        h("a", { href: link("run", { name, tab: key }), "aria-current": key === tab ? "page" : null }, title))),
      content);
    const show = (...nodes) => content.replaceChildren(...nodes.flat(4).filter(Boolean));
    const later = (path, make) => {
      show(quiet("reading"));
      get(path, { name }).then((answer) => show(make(answer)), (error) => show(quiet(error.message)));
    };
    ({
      curves: () => show(live([name], { signal, onState: (states) => told(states[name]) })),
      facts: () => show(facts(found)),
      batch: () => later("api/batch", batch),
      samples: () => later("api/samples", ({ groups }) => [heldout(found, signal), samples(found, groups)]),
      rounds: () => show(rounds(found)),
      settings: () => show(settings(found)),
    })[tab]();
  }, (error) => place.replaceChildren(h("h1", {}, name), quiet(error.message)));
  return place;
}
