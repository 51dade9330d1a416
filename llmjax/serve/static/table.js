// The answer of a database: SQL with its rows, or why there are none. All of it is text, whatever the database holds.

import { button, copy, download, element } from "./dom.js";

const FIRST = 100; // rows that are shown at first, and that the text has

export function tableView(table) {
  const { sql, columns, rows, cut, refused, reason, name } = table;
  const view = element("div", { className: "rows-view" });
  if (sql) view.append(codeView(sql));
  if (refused) {
    view.append(element("p", { textContent: `Not answered: ${reason}` }));
    return view;
  }
  const body = element("tbody", {}, ...rows.slice(0, FIRST).map(rowView));
  const head = element("thead", {}, element("tr", {}, ...columns.map((text) => element("th", { textContent: text, scope: "col" }))));
  const region = element("div", { className: "rows", tabIndex: 0, role: "region", ariaLabel: "Rows" }, element("table", {}, head, body));
  const count = `${rows.length.toLocaleString("en")} ${rows.length === 1 ? "row" : "rows"}${cut ? ", and there are more" : ""}`;
  const bar = element("p", { className: "note" }, `${count} `, button("CSV", () => download(`${name}.csv`, "text/csv", csv(columns, rows))));
  if (rows.length > FIRST) {
    const all = button("Show all rows", () => {
      body.append(...rows.slice(FIRST).map(rowView));
      all.remove();
    });
    bar.append(" ", all);
  }
  view.append(region, bar);
  return view;
}

function codeView(sql) {
  const bar = element("div", { className: "bar" }, element("span", { textContent: "sql" }), button("Copy SQL", () => copy(sql)));
  return element("div", { className: "code" }, bar, element("pre", { tabIndex: 0 }, element("code", { textContent: sql })));
}

function rowView(row) {
  return element("tr", {}, ...row.map((value) => element("td", { textContent: shown(value), dir: "auto", className: classOf(value) })));
}

const shown = (value) => (value === null ? "NULL" : String(value));
const classOf = (value) => (value === null ? "note" : typeof value === "number" ? "number" : "");

// The answer as Markdown, for copies, exports and what a model reads of the conversation.
export function asText({ sql, columns, rows, cut, refused, reason }) {
  const fence = "`".repeat(Math.max(2, ...[...(sql ?? "").matchAll(/`+/g)].map(([ticks]) => ticks.length)) + 1);
  const code = sql ? `${fence}sql\n${sql}\n${fence}\n\n` : "";
  if (refused) return `${code}Not answered: ${reason}`;
  const line = (cells) => `| ${cells.map((cell) => shown(cell).replace(/[\\|`]/g, "\\$&").replace(/\s+/g, " ")).join(" | ")} |`;
  const lines = [line(columns), `|${columns.map(() => "---|").join("")}`, ...rows.slice(0, FIRST).map(line)];
  return `${code}${lines.join("\n")}${cut || rows.length > FIRST ? "\n\nThere are more rows." : ""}`;
}

// A text that begins like a formula would run in a spreadsheet, so it gets a quotation mark.
export function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null ? "" : typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}
