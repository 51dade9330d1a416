// Curves as SVG: smoothing with the raw values behind, logarithmic axes, a choice of x, zoom shared by all plots of a view.

import { h, short, svg } from "./dom.js";
import { buttons } from "./save.js";

export const SERIES = 8;
const MARGIN = { left: 56, right: 12, top: 10, bottom: 34 };
export const newView = () => ({ x: "step", smooth: 0, log: false, range: null });

// The x of each point: its step, or the tokens or seconds of training at that step.
export function along(curve, curves, x) {
  const other = curves?.[{ tokens: "tokens", time: "train_seconds" }[x]];
  if (!other) return curve.step;
  return curve.step.map((step) => between(other.step, other.mean, step));
}

export function between(xs, ys, x) {
  let low = 0, high = xs.length - 1;
  if (high < 0) return NaN;
  if (x <= xs[0]) return xs[0] > 0 ? (ys[0] * x) / xs[0] : ys[0];
  if (x >= xs[high]) return high && xs[high] > xs[high - 1] ? ys[high] + ((ys[high] - ys[high - 1]) * (x - xs[high])) / (xs[high] - xs[high - 1]) : ys[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle;
    else high = middle;
  }
  return ys[low] + ((ys[high] - ys[low]) * (x - xs[low])) / (xs[high] - xs[low]);
}

// An exponential moving average, corrected for its beginning.
export function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

// Round numbers that cut a range into about `count` parts.
export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const factor of high - low > 2 ? [1] : [1, 2, 5]) {
      const place = power + Math.log10(factor);
      if (place >= low - 1e-9 && place <= high + 1e-9) found.push(place);
    }
  return found.length ? found : [low];
}

function yRange(lines, log, robust) {
  const values = lines.flatMap((line) => line.ys).filter((y) => Number.isFinite(y) && (!log || y > 0)).sort((a, b) => a - b);
  if (!values.length) return null;
  let low = values[0], high = values[robust ? Math.min(values.length - 1, Math.ceil(values.length * 0.99)) : values.length - 1];
  if (log) [low, high] = [Math.log10(low), Math.log10(high)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

// A plot. Lines: {label, series, xs, ys, low, high, points}; marks: x values of skipped updates.
export function plot({ title, unit, xLabel, lines, marks = [], view, log = false, robust = false, width = 640, height = 240, onZoom = null }) {
  const logY = log || view.log;
  const inside = lines.map((line) => cut(line, view.range)).filter((line) => line.xs.length);
  const ys = yRange(inside, logY, robust);
  let picture = null;
  const frame = (...content) => h("figure", { class: "card plot" }, h("figcaption", {}, title, h("span", { class: "quiet" }, ` ${unit}`), ys ? buttons(title, xLabel, inside, () => picture) : null), ...content);
  if (!ys) return frame(h("p", { class: "quiet" }, "no values yet"));
  const all = inside.flatMap((line) => line.xs);
  let [x0, x1] = view.range ?? [all.reduce((a, b) => Math.min(a, b)), all.reduce((a, b) => Math.max(a, b))];
  if (x1 <= x0) x1 = x0 + 1;
  if (!view.range) [x0, x1] = [x0 - (x1 - x0) * 0.01, x1 + (x1 - x0) * 0.01]; // room for the dots at the ends
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const px = (x) => MARGIN.left + ((x - x0) / (x1 - x0)) * (right - MARGIN.left);
  const py = (y) => bottom - (((logY ? Math.log10(y) : y) - ys[0]) / (ys[1] - ys[0])) * (bottom - MARGIN.top);
  const yTicks = logY ? logTicks(...ys).map((place) => 10 ** place) : ticks(...ys, 5);
  const grid = yTicks.map((y) => [
    svg("line", { x1: MARGIN.left, x2: right, y1: py(y), y2: py(y), class: "grid" }),
    svg("text", { x: MARGIN.left - 6, y: py(y) + 4, "text-anchor": "end" }, short(y)),
  ]);
  const bottomTicks = ticks(x0, x1, Math.max(2, Math.floor(width / 120))).map((x) => svg("text", { x: px(x), y: bottom + 16, "text-anchor": "middle" }, short(x)));
  const drawn = inside.map((line) => drawLine(line, px, py, view.smooth, logY));
  const ticksOf = marks.filter((x) => x >= x0 && x <= x1).map((x) => svg("line", { x1: px(x), x2: px(x), y1: bottom - 7, y2: bottom, class: "mark" }));
  const cursor = svg("line", { class: "cursor", y1: MARGIN.top, y2: bottom, x1: -9, x2: -9 });
  const band = svg("rect", { class: "band", y: MARGIN.top, height: bottom - MARGIN.top, x: -9, width: 0 });
  const clip = `clip-${Math.random().toString(36).slice(2)}`;
  picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": spoken(title, inside) },
    svg("defs", {}, svg("clipPath", { id: clip }, svg("rect", { x: MARGIN.left, y: 0, width: right - MARGIN.left, height: bottom + 1 }))),
    grid, bottomTicks, svg("text", { x: right, y: height - 3, "text-anchor": "end" }, xLabel),
    svg("g", { "clip-path": `url(#${clip})` }, drawn, ticksOf), band, cursor);
  const readout = h("p", { class: "readout", "aria-hidden": "true" }, legend(inside, null, marks.length));
  follow(picture, { width, x0, x1, right, px, cursor, band, onZoom, show: (x) => readout.replaceChildren(...legend(inside, x, marks.length)) });
  return frame(picture, readout);
}

const cut = (line, range) => {
  if (!range) return line;
  const keep = line.xs.map((x, i) => i).filter((i) => line.xs[i] >= range[0] && line.xs[i] <= range[1]);
  const of = (values) => values && keep.map((i) => values[i]);
  return { ...line, xs: of(line.xs), ys: of(line.ys), low: of(line.low), high: of(line.high) };
};

const spoken = (title, lines) => `${title}: ${lines.map((line) => `${line.label} from ${short(line.ys[0])} to ${short(line.ys.at(-1))}`).join(", ")}`;

function drawLine(line, px, py, smooth, log) {
  const seen = (y) => Number.isFinite(y) && (!log || y > 0);
  const path = (ys) => line.xs.map((x, i) => (seen(ys[i]) ? `${i && seen(ys[i - 1]) ? "L" : "M"}${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}` : "")).join("");
  const kind = `s${line.series % SERIES}`;
  const parts = [];
  if (line.low && !smooth) {
    const places = line.xs.map((x, i) => i).filter((i) => seen(line.low[i]) && seen(line.high[i]));
    const there = places.map((i) => `${px(line.xs[i]).toFixed(1)} ${py(line.high[i]).toFixed(1)}`);
    const back = places.reverse().map((i) => `${px(line.xs[i]).toFixed(1)} ${py(line.low[i]).toFixed(1)}`);
    if (there.length) parts.push(svg("path", { class: `area ${kind}`, d: `M${[...there, ...back].join("L")}Z` }));
  }
  if (smooth) parts.push(svg("path", { class: `line raw ${kind}`, d: path(line.ys) }));
  const ys = smooth ? smoothed(line.ys, smooth) : line.ys;
  parts.push(svg("path", { class: `line ${kind}`, d: path(ys) }));
  if (line.xs.length === 1 || (line.points && line.xs.length <= 60))
    parts.push(line.xs.map((x, i) => (seen(ys[i]) ? svg("circle", { class: `dot ${kind}`, cx: px(x).toFixed(1), cy: py(ys[i]).toFixed(1), r: 3 }) : null)));
  return parts;
}

function nearest(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}

// The names of the lines, with their values at x, or their last ones.
function legend(lines, x, skipped) {
  const at = x === null ? [] : [h("span", {}, `at ${short(x)}`)];
  const names = lines.map((line) => {
    const value = line.ys[x === null ? line.ys.length - 1 : nearest(line.xs, x)];
    return h("span", {}, h("i", { class: `key s${line.series % SERIES}` }), `${line.label} ${short(value)}`);
  });
  return [...at, ...names, ...(skipped ? [h("span", {}, h("i", { class: "key bad" }), `${skipped} skipped`)] : [])];
}

// A cursor under the pointer; dragging zooms, and a double click shows everything again.
function follow(picture, { width, x0, x1, right, px, cursor, band, onZoom, show }) {
  let from = null;
  const xOf = (event) => {
    const box = picture.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    return x0 + ((Math.min(Math.max(place, MARGIN.left), right) - MARGIN.left) / (right - MARGIN.left)) * (x1 - x0);
  };
  picture.addEventListener("pointermove", (event) => {
    const x = xOf(event);
    cursor.setAttribute("x1", px(x));
    cursor.setAttribute("x2", px(x));
    show(x);
    if (from !== null) {
      band.setAttribute("x", px(Math.min(from, x)));
      band.setAttribute("width", Math.abs(px(x) - px(from)));
    }
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("x1", -9);
    cursor.setAttribute("x2", -9);
    show(null);
  });
  picture.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse") from = xOf(event);
  });
  picture.addEventListener("pointerup", (event) => {
    const start = from, end = xOf(event);
    from = null;
    band.setAttribute("width", 0);
    if (start !== null && Math.abs(px(end) - px(start)) > 8) onZoom?.([Math.min(start, end), Math.max(start, end)]);
  });
  picture.addEventListener("dblclick", () => onZoom?.(null));
}
