// Plots as files: their values as CSV, and the picture as SVG with the colours that it has on the page.

import { h } from "./dom.js";

const STYLES = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "opacity", "font", "text-anchor", "paint-order"];

// A text of CSV. A text that begins like a formula would run in a spreadsheet, so it gets a quotation mark.
export function csv(rows) {
  const cell = (value) => {
    const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value ?? "");
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

// The lines of a plot, a row for each point. `low` and `high` are the ends of the band, where a line has one.
export const valuesOf = (lines, x) => [
  ["line", x, "value", "low", "high"],
  ...lines.flatMap((line) => line.xs.map((at, i) => [line.label, at, line.ys[i], line.low?.[i], line.high?.[i]])),
];

// The buttons that save a plot. `picture` gives its SVG element.
export const buttons = (title, x, lines, picture) => {
  const name = title.replace(/[^\w.-]+/g, "_").slice(0, 80) || "plot";
  const save = (kind, type, text) => h("button", { type: "button", "aria-label": `${title} as ${kind}`, on: { click: () => download(`${name}.${kind.toLowerCase()}`, type, text()) } }, kind);
  return h("span", { class: "save" }, save("CSV", "text/csv", () => csv(valuesOf(lines, x))), save("SVG", "image/svg+xml", () => drawing(picture())));
};

function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

// A picture as a file of its own: what the page's style sheet says of each part is written into it.
function drawing(picture) {
  const made = picture.cloneNode(true);
  const { width, height } = picture.viewBox.baseVal;
  const parts = [picture, ...picture.querySelectorAll("*")], copies = [made, ...made.querySelectorAll("*")];
  parts.forEach((part, i) => {
    const style = getComputedStyle(part);
    for (const name of STYLES) copies[i].setAttribute(name, style.getPropertyValue(name));
  });
  for (const node of made.querySelectorAll(".cursor, .band")) node.remove();
  for (const [name, value] of Object.entries({ xmlns: picture.namespaceURI, width, height })) made.setAttribute(name, value);
  const paper = document.createElementNS(picture.namespaceURI, "rect");
  for (const [name, value] of Object.entries({ width, height, fill: getComputedStyle(picture.closest(".card")).backgroundColor })) paper.setAttribute(name, value);
  made.prepend(paper);
  return new XMLSerializer().serializeToString(made);
}
