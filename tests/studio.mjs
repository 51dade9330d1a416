// Runs the studio's own modules on a document of plain objects: {name, attributes, children}. Reads what the server answers
// from the standard input, and writes what each view makes of it.

import { readFileSync, mkdtempSync, copyFileSync, readdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const folder = mkdtempSync(join(tmpdir(), "studio-"));
for (const name of readdirSync(process.argv[2])) copyFileSync(join(process.argv[2], name), join(folder, name));
writeFileSync(join(folder, "package.json"), '{"type": "module"}');

class Element {
  constructor(name) {
    Object.assign(this, { name, attributes: {}, children: [], listeners: {} });
  }
  append(...nodes) {
    this.children.push(...nodes);
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  addEventListener(name, listener) {
    this.listeners[name] = listener;
  }
  set innerHTML(value) {
    throw new Error("innerHTML");
  }
}
globalThis.document = { createElement: (name) => new Element(name), createElementNS: (_, name) => new Element(name) };

const load = (name) => import(join(folder, name));
const [dom, plots, curves, tokens, list, run, several, data, heldout, arms, save] = await Promise.all(["dom", "plot", "curves", "tokens", "list", "run", "several", "data", "heldout", "arms", "save"].map((name) => load(`${name}.js`)));
const plain = (node) => (node instanceof Element ? [node.name, node.attributes, ...node.children.map(plain)] : Array.isArray(node) ? node.map(plain) : node ?? null);

const given = JSON.parse(readFileSync(0, "utf8"));
const { runs } = given.runs;
const keys = list.differing(runs);
const names = Object.keys(given.curves.runs);
const view = plots.newView();
const answer = { tokens: ["é", given.hostile, "c"], token_logprobs: [null, -1, -3] };
const scored = [heldout.measured({ prompt: "é" + given.hostile + "c" }, answer), heldout.measured({ prompt: [1, 2, 3], counted: [false, false, true] }, answer)];
const found = {
  heldout: heldout.extremes(scored, "bits per byte"),
  rows: runs.map((one) => list.row(one, keys, new Set(), () => {})),
  facts: run.facts(given.run),
  settings: run.settings(given.run),
  marks: run.marks(given.run),
  samples: run.samples(given.run, given.samples.groups),
  rollouts: run.rollouts(given.rollouts.rows),
  batch: tokens.batch(given.batch),
  one: curves.drawn([...curves.GROUPS, ...curves.others(given.run.metrics)], given.curves.runs, names.slice(0, 1), view, 900, () => {}),
  both: curves.drawn(curves.GROUPS, given.curves.runs, names, { ...view, x: "tokens", smooth: 0.9, log: true, range: [1, 1e9] }, 400, () => {}),
  compare: several.differences(given.compare),
  study: several.arms(given.study, 900),
  arms: arms.drawn(names.map((one, i) => ({ arm: given.hostile, run: one, seed: i })), given.curves.runs, view, 900, () => {}),
  chain: several.links(given.chain),
  files: data.entries(given.files),
  path: data.path("runs", given.files.name),
  pages: given.pages.map(data.page),
};
process.stdout.write(JSON.stringify({
  trees: plain(Object.values(found)),
  matches: [list.matches(runs[0], "learning_rate=0.5 nothing"), list.matches(runs[0], runs[0].name), list.matches({ ...runs[0], tags: ["good"], note: "it spikes" }, "#good spikes"), list.matches({ ...runs[0], tags: ["good"] }, "#bad")],
  sorted: list.sorted([{ name: "b", age: 1 }, { name: "a", age: 2 }], "name", false).map((one) => one.name),
  ticks: [plots.ticks(0, 1, 5), plots.ticks(-3, 1200, 4), plots.ticks(2, 2, 5)],
  smoothed: plots.smoothed([1, 1, 1, 5], 0.5),
  scores: scored.map((one) => one.score),
  nothing: heldout.measured({ prompt: [1, 2, 3], counted: [true, false, false] }, answer),
  seeds: arms.overSeeds([{ step: [0, 10, 20, 30], mean: [4, 3, 2, 1] }, { step: [5, 15, 25], mean: [5, 3, null] }]),
  csv: save.csv(save.valuesOf([{ label: "=1+1", xs: [1, 2], ys: [0.5, NaN], low: [0, null] }, { label: 'a"b,', xs: [-1], ys: [3] }], "step")),
  along: plots.along({ step: [0, 5, 10, 20] }, { tokens: { step: [5, 15], mean: [50, 150] } }, "tokens"),
  short: [0, 1234, 12345, 1.5e9, 0.25, 0.000123, null, NaN].map(dom.short),
}));
