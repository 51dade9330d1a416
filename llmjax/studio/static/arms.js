// The curves of a study: for each arm the mean over its seeds, and a band from the lowest seed to the highest.

import { get, h, link, quiet } from "./dom.js";
import { poll } from "./curves.js";
import { SERIES, between, newView, plot } from "./plot.js";

const PLOTS = { loss: "Loss", heldout_loss: "Held-out loss", heldout_bits_per_byte: "Held-out bits per byte" };
const AT_ONCE = 12; // runs that the studio answers at a time

// The curves {step, mean} of the seeds of an arm as one line. It spans the steps that all seeds have. A seed whose value is no
// number makes a gap: a mean of the others would hide it.
export function overSeeds(curves) {
  const begin = Math.max(...curves.map((one) => one.step[0])), end = Math.min(...curves.map((one) => one.step.at(-1)));
  const xs = curves[0].step.filter((step) => step >= begin && step <= end);
  const at = xs.map((x) => curves.map((one) => between(one.step, one.mean.map((value) => value ?? NaN), x)));
  const whole = (values, result) => (values.every(Number.isFinite) ? result(values) : NaN);
  const of = (result) => at.map((values) => whole(values, result));
  return { xs, ys: of((values) => values.reduce((a, b) => a + b) / values.length), low: of((values) => Math.min(...values)), high: of((values) => Math.max(...values)) };
}

// The plots of a study. Trials are {arm, run}; `runs` has the curves by name.
export function drawn(trials, runs, view, width, onZoom) {
  const names = [...new Set(trials.map((trial) => trial.arm))];
  return Object.entries(PLOTS).map(([metric, title]) => {
    const lines = names.slice(0, SERIES).flatMap((arm, series) => {
      const curves = trials.filter((trial) => trial.arm === arm).map((trial) => runs[trial.run]?.curves?.[metric]).filter((curve) => curve?.step.length);
      return curves.length ? [{ label: `${arm} (${curves.length} ${curves.length === 1 ? "seed" : "seeds"})`, series, points: metric !== "loss", ...overSeeds(curves) }] : [];
    });
    return lines.length ? plot({ title, unit: "mean and range over seeds", xLabel: "step", lines, view, width, height: 300, onZoom }) : null;
  }).filter(Boolean);
}

export function arms(parameters, { signal }) {
  const name = parameters.get("name") ?? "";
  const view = newView(), runs = {}, plots = h("div", {}, quiet("reading"));
  let trials = [];
  const draw = () => {
    const made = drawn(trials, runs, view, (plots.clientWidth || 900) - 34, (range) => {
      view.range = range;
      draw();
    });
    plots.replaceChildren(...(made.length ? made : [quiet("No curves yet: no trial has begun.")]));
  };
  poll(async () => {
    ({ trials } = await get("api/study", { name }));
    trials = trials.filter((trial) => trial.run);
    const names = trials.map((trial) => trial.run);
    for (let at = 0; at < names.length; at += AT_ONCE) {
      const some = names.slice(at, at + AT_ONCE);
      const found = await get("api/curves", { name: some, metric: Object.keys(PLOTS), seen: some.map((one) => runs[one]?.version ?? "") });
      for (const [one, run] of Object.entries(found.runs)) runs[one] = { ...runs[one], ...run };
    }
    draw();
    return Object.values(runs).some((run) => run.state === "running");
  }, signal);
  addEventListener("resize", draw, { signal });
  return h("div", {}, h("h1", {}, `Curves of ${name}`), h("p", { class: "controls" }, h("a", { class: "button", href: link("study", { name }) }, "The study")), plots);
}
