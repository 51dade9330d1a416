// All runs, chains and studies: filter, sort, choose some to compare.

import { ago, get, h, link, pill, short, tags } from "./dom.js";
import { poll } from "./curves.js";

const COLUMNS = {
  name: { title: "Run", of: (run) => run.name },
  state: { title: "State", of: (run) => run.state || run.kind },
  step: { title: "Step", kind: "n", of: (run) => run.step ?? -1 },
  loss: { title: "Loss", kind: "n", of: (run) => run.loss ?? Infinity },
  heldout: { title: "Held out", kind: "n", of: (run) => run.heldout ?? Infinity },
  tokens: { title: "Tokens", kind: "n", of: (run) => run.tokens ?? -1 },
  speed: { title: "Tokens/s", kind: "n", of: (run) => run.speed ?? -1 },
  parameters: { title: "Parameters", kind: "n", of: (run) => run.parameters ?? -1 },
  age: { title: "Changed", kind: "n", of: (run) => run.age },
};
const MOST_SETTINGS = 6;
const NOTE = 100; // characters of a note

// Whether a run has every word of a filter, in its name, its state, its tags ("#baseline"), its note or its settings ("model.layers=12").
export function matches(run, filter) {
  const words = [run.name, run.title, run.state, run.kind, ...(run.tags ?? []).map((tag) => `#${tag}`), run.note, ...Object.entries(run.changed ?? {}).map(([key, value]) => `${key}=${value}`)].join(" ").toLowerCase();
  return filter.toLowerCase().split(/\s+/).every((word) => words.includes(word));
}

// The settings that differ among runs, as dotted keys.
export function differing(runs) {
  const keys = new Set(runs.flatMap((run) => Object.keys(run.changed ?? {})));
  return [...keys].filter((key) => new Set(runs.map((run) => run.changed?.[key])).size > 1);
}

export function sorted(runs, column, down) {
  const value = COLUMNS[column].of;
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  return [...runs].sort((a, b) => (down ? -1 : 1) * order(value(a), value(b)));
}

// The row of a run; `chosen` is a set of names.
export function row(run, keys, chosen, onChoose) {
  const isRun = run.kind === "run";
  const box = isRun
    ? h("input", { type: "checkbox", "aria-label": `choose ${run.name}`, checked: chosen.has(run.name), on: { change: (event) => onChoose(run.name, event.target.checked) } })
    : null;
  const progress = isRun && run.steps && run.step !== null && run.state === "running" ? h("progress", { max: run.steps, value: run.step, "aria-label": "progress" }) : null;
  return h("tr", { "data-name": run.name },
    h("td", { class: "box" }, box),
    h("td", { class: "name" }, h("a", { href: link(run.kind, { name: run.name }) }, run.name || "."), run.title && !run.name.endsWith(run.title) ? h("span", { class: "quiet" }, ` ${run.title}`) : null, tags(run),
      run.note ? h("p", { class: "quiet" }, run.note.length > NOTE ? `${run.note.slice(0, NOTE)}…` : run.note) : null),
    h("td", {}, pill(run.state || run.kind, run.error), progress),
    h("td", { class: "n" }, isRun && Number.isFinite(run.step) ? [short(run.step), run.steps && run.steps !== run.step ? h("span", { class: "quiet" }, ` / ${short(run.steps)}`) : null] : null),
    h("td", { class: "n" }, short(run.loss)),
    h("td", { class: "n" }, short(run.heldout), run.heldout_name && Number.isFinite(run.heldout) ? h("span", { class: "quiet" }, ` ${run.heldout_name}`) : null),
    h("td", { class: "n" }, short(run.tokens)), h("td", { class: "n" }, short(run.speed)), h("td", { class: "n" }, short(run.parameters)),
    h("td", { class: "n quiet" }, ago(run.age)),
    keys.map((key) => h("td", { class: "key" }, run.changed?.[key] ?? "")));
}

export function list({ signal }) {
  let runs = [], column = "age", down = false, settings = false;
  const chosen = new Set();
  const filter = h("input", { id: "filter", type: "search", placeholder: "name, state, #tag, setting=value", autocomplete: "off", on: { input: () => draw() } });
  const compare = h("a", { class: "button", id: "compare" }, "Compare");
  const count = h("span", { class: "quiet", role: "status" });
  const body = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "runs" });

  const choose = (name, on) => {
    if (on) chosen.add(name);
    else chosen.delete(name);
    buttons();
  };
  const buttons = () => {
    const enough = chosen.size > 1;
    compare.textContent = `Compare ${chosen.size || ""}`;
    if (enough) compare.setAttribute("href", link("compare", { name: [...chosen] }));
    else compare.removeAttribute("href");
    compare.setAttribute("aria-disabled", String(!enough));
  };
  const draw = () => {
    const kept = sorted(runs.filter((run) => matches(run, filter.value)), column, down);
    const keys = settings ? differing(kept).slice(0, MOST_SETTINGS) : [];
    const head = Object.entries(COLUMNS).map(([key, { title, kind }]) =>
      h("th", { scope: "col", class: kind, "aria-sort": key === column ? (down ? "descending" : "ascending") : null },
        h("button", { type: "button", on: { click: () => { down = key === column && !down; column = key; draw(); } } }, title, key === column ? (down ? " ↓" : " ↑") : "")));
    const at = body.querySelector("tr:focus-within")?.getAttribute("data-name");
    body.replaceChildren(h("table", { class: "runs" },
      h("thead", {}, h("tr", {}, h("td", {}), head, keys.map((key) => h("th", { scope: "col", class: "key" }, key)))),
      h("tbody", {}, kept.map((run) => row(run, keys, chosen, choose)))));
    if (at) [...body.querySelectorAll("tr[data-name]")].find((one) => one.getAttribute("data-name") === at)?.querySelector("a").focus();
    count.textContent = `${kept.length} of ${runs.length}`;
    buttons();
  };
  const read = async () => {
    ({ runs } = await get("api/runs"));
    if (!runs.length) {
      body.replaceChildren(h("p", {}, "There is no run in this folder yet. Make one: ", h("code", {}, "llmjax run --config configs/quickstart.py")));
      return true;
    }
    draw();
    return runs.some((run) => run.state === "running");
  };
  poll(read, signal);
  buttons();
  return h("div", {},
    h("h1", {}, "Runs"),
    h("form", { class: "controls", "aria-label": "Runs", on: { submit: (event) => event.preventDefault() } },
      h("label", {}, "Filter ", filter), compare,
      h("label", {}, h("input", { type: "checkbox", on: { change: (event) => { settings = event.target.checked; draw(); } } }), " settings that differ"), count),
    body);
}
