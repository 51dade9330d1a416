// The curves of one run or of several: which plots there are, their controls, and how they are kept up to date.

import { get, h } from "./dom.js";
import { along, newView, plot } from "./plot.js";

// Title, unit, metrics with their labels; `prefix`: also the metrics that begin so.
export const GROUPS = [
  { title: "Loss", unit: "nats per token", metrics: { loss: "training", heldout_loss: "held out" }, robust: true, marks: true, wide: true },
  { title: "Held-out bits per byte", unit: "", metrics: { heldout_bits_per_byte: "all" }, prefix: "heldout_bits_per_byte/" },
  { title: "Reward", unit: "", metrics: { "rollout/reward": "sampled", heldout_reward: "held out" }, prefix: "rollout/reward/", wide: true },
  { title: "Held-out accuracy", unit: "share", metrics: { heldout_accuracy: "all" } },
  { title: "Learning rate", unit: "", metrics: { learning_rate: "learning rate" } },
  { title: "Norms", unit: "global L2 norm", metrics: { grad_norm: "gradient", update_norm: "update", param_norm: "parameters" }, log: true, marks: true },
  { title: "Tokens per second", unit: "all devices", metrics: { tokens_per_second: "tokens per second" } },
  { title: "Divergence from the reference", unit: "nats a token", metrics: { k1: "k1", k2: "k2", k3: "k3" } },
  { title: "Entropy", unit: "nats a token", metrics: { entropy: "mean" } },
  { title: "Lengths of answers", unit: "tokens", metrics: { "rollout/length": "mean", "rollout/longest": "longest" } },
  { title: "MFU", unit: "share", metrics: { mfu: "MFU" } },
];
const AXES = { step: "step", tokens: "tokens", time: "seconds of training" };
const KNOWN = new Set(["step", "tokens", "train_seconds", ...GROUPS.flatMap((group) => Object.keys(group.metrics))]);

// The labels of the metrics of a group that exist: metric -> label.
export function present(group, metrics) {
  const found = Object.entries(group.metrics).filter(([name]) => metrics.includes(name));
  const more = group.prefix ? metrics.filter((name) => name.startsWith(group.prefix)) : [];
  return Object.fromEntries([...found, ...(more.length > 1 ? more.map((name) => [name, name.slice(group.prefix.length)]) : [])]);
}

// Groups of one metric each that no group has.
export const others = (metrics) =>
  metrics.filter((name) => !KNOWN.has(name) && !GROUPS.some((group) => group.prefix && name.startsWith(group.prefix)))
    .map((name) => ({ title: name, unit: "", metrics: { [name]: name } }));

// The lines of a group: of one run a line a metric, of several a line a run for the first metric.
export function linesOf(group, runs, names, x) {
  const lines = [];
  names.forEach((name, number) => {
    const run = runs[name];
    if (!run?.curves) return;
    const labels = Object.entries(present(group, Object.keys(run.curves)));
    labels.slice(0, names.length > 1 ? 1 : labels.length).forEach(([metric, label], i) => {
      const curve = run.curves[metric];
      lines.push({
        label: names.length > 1 ? name : label, series: names.length > 1 ? number : i, points: metric.startsWith("heldout"),
        xs: along(curve, run.curves, x), ys: curve.mean, low: names.length > 1 ? undefined : curve.low, high: names.length > 1 ? undefined : curve.high,
      });
    });
  });
  return lines;
}

// The plots of a view as nodes.
export function drawn(groups, runs, names, view, width, onZoom) {
  return groups.map((group) => {
    const lines = linesOf(group, runs, names, view.x);
    if (!lines.length) return null;
    const one = runs[names[0]];
    const marks = group.marks && names.length === 1 && one.bad_steps.length ? along({ step: one.bad_steps }, one.curves, view.x) : [];
    const wide = group.wide || width < 720;
    const node = plot({
      title: group.title, unit: group.unit, xLabel: AXES[view.x], lines, marks, view, log: group.log, robust: group.robust,
      width: Math.round(wide ? width - 34 : (width - 14) / 2 - 34), height: group.wide ? 300 : 220, onZoom,
    });
    if (group.wide) node.setAttribute("class", "card plot wide");
    return node;
  });
}

// A node with the plots of runs that reads what is new every few seconds. `onState` is told the states of the runs.
export function live(names, { onState = () => {}, signal }) {
  const view = newView(), runs = {}, chosen = new Set();
  const plots = h("div", { class: "plots" }), more = h("details", { class: "card" });
  const draw = () => {
    const metrics = [...new Set(names.flatMap((name) => runs[name]?.metrics ?? []))];
    const extra = others(metrics).filter((group) => chosen.has(group.title));
    const nodes = drawn([...GROUPS, ...extra], runs, names, view, plots.clientWidth || 900, (range) => {
      view.range = range;
      draw();
    });
    plots.replaceChildren(...nodes.filter(Boolean));
    if (!plots.children.length) plots.append(h("p", { class: "quiet" }, "No curves yet: the training has not begun."));
  };
  const choose = (metrics) => {
    const boxes = others(metrics).map(({ title }) =>
      h("label", { class: "inline" }, h("input", { type: "checkbox", checked: chosen.has(title), on: { change: (event) => {
        if (event.target.checked) chosen.add(title);
        else chosen.delete(title);
        for (const name of names) runs[name].version = "";
        read();
      } } }), ` ${title}`));
    more.hidden = !boxes.length;
    if (more.querySelectorAll("input").length !== boxes.length) more.replaceChildren(h("summary", {}, `${boxes.length} more metrics`), h("div", { class: "boxes" }, boxes));
  };
  const read = async () => {
    const prefixes = GROUPS.filter((group) => group.prefix).map((group) => `${group.prefix}*`);
    const found = await get("api/curves", { name: names, metric: [...KNOWN, ...prefixes, ...chosen], seen: names.map((name) => runs[name]?.version ?? "") });
    let fresh = false;
    for (const [name, run] of Object.entries(found.runs)) {
      if (!run.same) fresh = true;
      runs[name] = { ...runs[name], ...run };
    }
    onState(found.runs);
    if (fresh) {
      choose([...new Set(names.flatMap((name) => runs[name].metrics ?? []))]);
      draw();
    }
    return Object.values(found.runs).some((run) => run.state === "running");
  };
  const controls = h("form", { class: "controls", "aria-label": "Plots", on: { submit: (event) => event.preventDefault() } },
    h("label", {}, "x ", h("select", { on: { change: (event) => { view.x = event.target.value; view.range = null; draw(); } } }, Object.entries(AXES).map(([key, title]) => h("option", { value: key }, title)))),
    h("label", {}, "smoothing ", h("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0, on: { input: (event) => { view.smooth = Number(event.target.value); draw(); } } })),
    h("label", {}, h("input", { type: "checkbox", on: { change: (event) => { view.log = event.target.checked; draw(); } } }), " log y"),
    h("button", { type: "button", on: { click: () => { view.range = null; draw(); } } }, "Show all"),
    h("span", { class: "quiet mouse" }, "drag to zoom"));
  poll(read, signal);
  addEventListener("resize", draw, { signal });
  return h("div", {}, controls, plots, more);
}

// Call a function again and again until the signal: every 3 s while it says true, every 20 s while it says false.
export async function poll(read, signal) {
  while (!signal.aborted) {
    let busy = false;
    if (!document.hidden) busy = await read().catch((error) => { report(error); return true; });
    await new Promise((done) => setTimeout(done, busy ? 3000 : 20000));
  }
}

export function report(error) {
  const place = document.getElementById("error");
  place.textContent = error.message;
  setTimeout(() => { if (place.textContent === error.message) place.textContent = ""; }, 10000);
}
