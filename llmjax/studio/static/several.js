// Several runs: compared, as arms of a study, as links of a chain.

import { card, get, h, link, pill, quiet, short, svg, table } from "./dom.js";
import { live, poll } from "./curves.js";
import { SERIES } from "./plot.js";

const key = (number) => h("i", { class: `key s${number % SERIES}` });

export const differences = ({ runs, sentences, settings, numbers }) => [
  card("", runs.map((name, i) => h("p", {}, key(i), h("a", { href: link("run", { name }) }, name), h("span", { class: "quiet" }, ` ${sentences[i]}`)))),
  card("Settings that differ", settings.length
    ? table([["setting", "key"], ...runs.map((name) => [name, "key"])], settings.map(([name, cells]) => [name, ...cells.map(([text, differs]) => (differs ? h("b", {}, text) : text))]), { label: "settings that differ" })
    : quiet("None.")),
  card("Numbers", table([["number"], ...runs.map((name) => [name, "n"])], numbers.map(([name, cells]) => [name, ...cells.map((cell) => [h("span", { class: cell.best ? "good" : "" }, cell.text), cell.change ? h("span", { class: "quiet" }, ` ${cell.change}`) : null])]), { label: "numbers" })),
];

export function compare(parameters, { signal }) {
  const names = parameters.getAll("name");
  const place = h("div", {}, quiet("reading"));
  get("api/compare", { name: names }).then((found) => place.replaceChildren(...differences(found)), (error) => place.replaceChildren(quiet(error.message)));
  return h("div", {}, h("h1", {}, `${names.length} runs`), live(names, { signal }), place);
}

// Trials as lines through an axis for each setting that differs, and one for the metric; null: nothing differs.
export function parallel({ trials, metric, better }, width) {
  const done = trials.filter((trial) => Number.isFinite(trial.value));
  const keys = [...new Set(done.flatMap((trial) => Object.keys(trial.settings)))].filter((name) => new Set(done.map((trial) => JSON.stringify(trial.settings[name]))).size > 1);
  if (!keys.length || done.length < 2) return null;
  const height = 260, top = 26, bottom = height - 22, left = 50, right = width - 60;
  const axes = [...keys.map((name) => axis(name, done.map((trial) => trial.settings[name]))), axis(metric, done.map((trial) => trial.value))];
  const px = (i) => left + (i / (axes.length - 1)) * (right - left);
  const py = (place) => bottom - place * (bottom - top);
  const rank = [...done].sort((a, b) => (better === "lower" ? 1 : -1) * (a.value - b.value));
  const lines = done.map((trial) => {
    const places = axes.map((one, i) => one.place(i < keys.length ? trial.settings[keys[i]] : trial.value));
    const best = rank.indexOf(trial) < Math.max(1, Math.ceil(done.length / 5));
    return svg("path", { class: `line ${best ? "s0" : "others"}`, d: `M${places.map((place, i) => `${px(i).toFixed(1)} ${py(place).toFixed(1)}`).join("L")}` }, svg("title", {}, `${trial.arm}, seed ${trial.seed}: ${short(trial.value)}`));
  });
  const drawn = axes.map((one, i) => [
    svg("line", { class: "grid", x1: px(i), x2: px(i), y1: top, y2: bottom }),
    svg("text", { x: px(i), y: 12, "text-anchor": i === 0 ? "start" : i === axes.length - 1 ? "end" : "middle" }, one.name.split(".").at(-1)),
    one.marks.map(([place, text]) => svg("text", { x: px(i) + 4, y: py(place) + 4 }, text)),
  ]);
  return h("figure", { class: "card plot wide" }, h("figcaption", {}, "Trials ", h("span", { class: "quiet" }, "the best fifth is coloured")),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${done.length} trials by ${axes.map((one) => one.name).join(", ")}` }, drawn, lines));
}

// An axis: numbers along a line, or a logarithm of it, everything else by its order.
function axis(name, values) {
  const numbers = values.every((value) => typeof value === "number" && Number.isFinite(value));
  if (!numbers) {
    const kinds = [...new Set(values.map((value) => JSON.stringify(value)))];
    const place = (value) => (kinds.length > 1 ? kinds.indexOf(JSON.stringify(value)) / (kinds.length - 1) : 0.5);
    return { name, place, marks: kinds.map((kind, i) => [kinds.length > 1 ? i / (kinds.length - 1) : 0.5, String(kind ?? "default").slice(0, 16)]) };
  }
  const low = Math.min(...values), high = Math.max(...values), log = low > 0 && high / low > 20;
  const at = log ? Math.log : (value) => value;
  const place = (value) => (high > low ? (at(value) - at(low)) / (at(high) - at(low)) : 0.5);
  return { name, place, marks: high > low ? [[0, short(low)], [1, short(high)]] : [[0.5, short(low)]] };
}

export const arms = (found, width) => [
  quiet(`${found.metric}: ${found.better} is better.${found.control ? ` Differences are to ${found.control}, paired by seed; intervals are Student's, p-values corrected (Holm).` : ""}`),
  card("Arms", table(found.header.map((title, i) => [title, i ? "n" : ""]), found.cells, { label: "arms" })),
  parallel(found, width),
  found.errors.length ? card("What failed or diverged", table([["arm"], ["error", "text"]], found.errors, { label: "errors" })) : null,
  card("Trials", table([["arm"], ["seed", "n"], ["state"], [found.metric, "n"], ["run"]], found.trials.map((trial) => [trial.arm, trial.seed, pill(trial.state), short(trial.value),
    trial.run ? h("a", { href: link("run", { name: trial.run }) }, trial.run.split("/").at(-1)) : ""]), { label: "trials" })),
  card("Settings of the arms", table([["arm"], ["settings", "key"]], found.arms, { label: "settings of the arms" })),
];

export function study(parameters, { signal }) {
  const name = parameters.get("name") ?? "";
  const place = h("div", {}), title = h("h1", {}, name), more = h("p", { class: "controls" });
  poll(async () => {
    const found = await get("api/study", { name });
    const runs = [...new Set(found.trials.map((trial) => trial.run).filter(Boolean))];
    title.textContent = found.title;
    more.replaceChildren(...(runs.length ? [h("a", { class: "button", href: link("arms", { name }) }, "Curves of the arms")] : []),
      ...(runs.length > 1 ? [h("a", { class: "button", href: link("compare", { name: runs.slice(0, 8) }) }, `Curves of ${Math.min(runs.length, 8)} trials`)] : []));
    place.replaceChildren(...arms(found, place.clientWidth || 900).filter(Boolean));
    return found.trials.some((trial) => trial.state === "running");
  }, signal);
  return h("div", {}, title, more, place);
}

export const links = (found) =>
  card("", table([["link"], ["state"], ["starts from", "key"], ...found.columns.map((column) => [column.replaceAll("_", " "), "n"])], found.links.map((one) => [
    one.run ? h("a", { href: link("run", { name: one.run }) }, one.link) : one.link, pill(one.state), one.from, ...found.columns.map((column) => one.results[column])]), { label: "links" }));

export function chain(parameters, { signal }) {
  const name = parameters.get("name") ?? "";
  const place = h("div", {}), more = h("p", { class: "controls" });
  poll(async () => {
    const found = await get("api/chain", { name });
    const runs = found.links.map((one) => one.run).filter(Boolean);
    more.replaceChildren(runs.length > 1 ? h("a", { class: "button", href: link("compare", { name: runs }) }, "Compare the links") : "");
    place.replaceChildren(links(found));
    return found.links.some((one) => one.state === "running");
  }, signal);
  return h("div", {}, h("h1", {}, name || "chain"), more, place);
}
