// Elements, requests and numbers. Whatever comes from a run, its data or its model becomes text, and never markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  for (const child of children.flat(4)) if (child !== null && child !== undefined && child !== false) node.append(child instanceof Object ? child : String(child));
  return node;
}

// An element. Attributes: text, true, or {on: {event: listener}}; children: nodes, texts, lists of them.
export const h = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
export const svg = (name, attributes, ...children) => fill(document.createElementNS(SVG, name), attributes, children);

// The address of a view: link("run", {name: "a/b"}) is "#/run?name=a%2Fb". Lists become repeated parameters.
export function link(view, parameters = {}) {
  const pairs = Object.entries(parameters).flatMap(([key, value]) => [value].flat().map((one) => `${key}=${encodeURIComponent(one)}`));
  return `#/${view}${pairs.length ? `?${pairs.join("&")}` : ""}`;
}

export async function get(path, parameters = {}) {
  const answer = await fetch(path + link("", parameters).slice(2));
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

export async function post(path, body) {
  const answer = await fetch(path, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } });
  if (!answer.ok) throw await failure(answer);
  return answer.json();
}

async function failure(answer) {
  const error = (await answer.json().catch(() => ({}))).error ?? {};
  return Object.assign(new Error(error.message ?? `the studio answered ${answer.status}`), { status: answer.status, code: error.code });
}

// 1234567 -> "1.23M", 0.000123 -> "1.23e-4"; "" for what is no number.
export function short(value) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  for (const [unit, scale] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e4]])
    if (size >= scale) return `${trimmed(value / (unit === "K" ? 1e3 : scale))}${unit}`;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return size !== 0 && size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : trimmed(value);
}

const trimmed = (value) => value.toPrecision(Math.abs(value) >= 1000 ? 4 : 3).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");

export function ago(seconds) {
  for (const [unit, scale] of [["d", 86400], ["h", 3600], ["min", 60]]) if (seconds >= scale) return `${Math.floor(seconds / scale)} ${unit} ago`;
  return "now";
}

export function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (bytes >= scale) return `${trimmed(bytes / scale)} ${unit}`;
  return `${bytes} B`;
}

// A table. Columns: [title, class]; rows: lists of cells.
export const table = (columns, rows, attributes = {}) =>
  h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": attributes.label ?? "table" },
    h("table", {},
      h("thead", {}, h("tr", {}, columns.map(([title, kind]) => h("th", { scope: "col", class: kind }, title)))),
      h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell, i) => h("td", { class: columns[i]?.[1] }, cell)))))));

export const card = (title, ...children) => h("section", { class: "card" }, title ? h("h2", {}, title) : null, ...children);
export const pill = (state, error = "") => h("span", { class: `pill ${/^[a-z ]+$/.test(state) ? state.replace(" ", "-") : ""}`, title: error || null }, state);
export const tags = (run) => (run.tags ?? []).map((tag) => [" ", h("span", { class: "pill" }, `#${tag}`)]);
export const quiet = (...children) => h("p", { class: "quiet" }, ...children);
