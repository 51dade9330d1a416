// The rows of data sets, a page at a time.

import { get, h, link, quiet, size, table } from "./dom.js";
import { shown } from "./run.js";
import { legend, text } from "./tokens.js";

const FIRST = ["error", "messages", "prompt", "question", "text", "chosen", "rejected", "answer"]; // columns that stand first
const COUNT = { rows: 20, examples: 10, tokens: 2048 };

// A cell: texts as they are, messages by role, everything else as JSON.
export function cell(value) {
  if (Array.isArray(value) && value.length && value.every((one) => one && typeof one === "object" && "role" in one && "content" in one))
    return value.map((message) => h("p", { dir: "auto" }, h("b", {}, `${shown(message.role)}: `), shown(message.content)));
  return h("span", { dir: "auto" }, shown(value));
}

export function rowTable(rows, start) {
  const objects = rows.map((row) => (row && typeof row === "object" && !Array.isArray(row) ? row : { row }));
  const place = (key) => (FIRST.includes(key) ? FIRST.indexOf(key) : FIRST.length);
  const keys = [...new Set(objects.flatMap((row) => Object.keys(row)))].sort((a, b) => place(a) - place(b));
  return table([["", "n"], ...keys.map((key) => [key, "text"])], objects.map((row, i) => [start + i, ...keys.map((key) => (key in row ? cell(row[key]) : ""))]), { label: "rows" });
}

export function page(found) {
  if (found.kind === "rows") return [rowTable(found.rows, found.start)];
  if (found.kind === "tokens") return [legend(), h("section", { class: "card" }, text(found.pieces))];
  return [legend(), found.groups.map((group, i) => h("section", { class: "card" }, h("h3", {}, `Group ${found.start + i}${group.ranks.length > 1 ? `, ranks ${group.ranks.join(", ")}` : ""}`), group.parts.map(text),
    Object.keys(group.columns).length ? quiet(JSON.stringify(group.columns)) : null))];
}

export const entries = (found) =>
  h("ul", { class: "files" }, found.entries.map((entry) => h("li", {}, h("a", { href: link(entry.kind === "folder" ? "data" : "rows", { place: found.place, name: entry.name }) }, entry.title, entry.kind === "folder" ? "/" : ""),
    h("span", { class: "quiet" }, entry.size === null ? "" : ` ${size(entry.size)}`))));

// The folders above a name, as links.
export function path(place, name) {
  const parts = name ? name.split("/") : [];
  return h("p", { class: "path" }, h("a", { href: link("data", { place, name: "" }) }, place), parts.map((part, i) => [" / ", i === parts.length - 1 ? part : h("a", { href: link("data", { place, name: parts.slice(0, i + 1).join("/") }) }, part)]));
}

export function data(parameters) {
  const place = parameters.get("place") ?? "runs", name = parameters.get("name") ?? "";
  const content = h("div", {}, quiet("reading"));
  get("api/files", { place, name }).then((found) => content.replaceChildren(found.entries.length ? entries(found) : quiet("There are no files of rows here.")), (error) => content.replaceChildren(quiet(error.message)));
  const places = h("p", { class: "controls" });
  if (!name) get("api/places").then((found) => places.replaceChildren(...(found.places.length > 1 ? found.places.map((one) => h("a", { class: "button", href: link("data", { place: one }), "aria-current": one === place ? "page" : null }, one)) : [])), () => {});
  return h("div", {}, h("h1", {}, "Data"), places, path(place, name), content);
}

export function rows(parameters) {
  const place = parameters.get("place") ?? "runs", name = parameters.get("name") ?? "", start = Number(parameters.get("start") ?? 0);
  const content = h("div", {}, quiet("reading"));
  get("api/rows", { place, name, start, count: parameters.get("count") ?? 20 }).then((found) => {
    const count = COUNT[found.kind];
    if (!parameters.has("count") && count !== 20) return location.replace(link("rows", { place, name, start, count }));
    const to = (first) => link("rows", { place, name, start: first, count });
    const steps = () => h("p", { class: "controls" },
      start > 0 ? h("a", { class: "button", href: to(Math.max(start - count, 0)) }, "Before") : null,
      h("span", { class: "quiet" }, `from ${start.toLocaleString("en")}${found.total === undefined ? "" : ` of ${found.total.toLocaleString("en")}`}`),
      found.more ? h("a", { class: "button", href: to(start + count) }, "Next") : null);
    content.replaceChildren(steps(), ...page(found).flat(4).filter(Boolean), steps());
  }, (error) => content.replaceChildren(quiet(error.message)));
  return h("div", {}, h("h1", {}, name.split("/").at(-1)), path(place, name), content);
}
