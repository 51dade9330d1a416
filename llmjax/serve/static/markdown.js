// Markdown as nodes of the page. A model's text is hostile: nothing of it is ever read as HTML. Every node is made by its
// name, texts are texts, and only links of http, https and mailto are links. An image becomes a link that names its host,
// because loading an image tells its server whatever stands in the address.

import { math } from "./math.js";

const DEEPEST = 12; // levels of quotes, lists and emphasis
const INLINE = new RegExp(
  [
    "(?<escaped>\\\\[\\\\`*_{}\\[\\]()#+.!|~$>-])",
    "(?<!`)(?<ticks>`+)(?!`)(?<code>[^]*?[^`])\\k<ticks>(?!`)",
    "\\\\\\((?<paren>[^]+?)\\\\\\)",
    "(?<!\\$)\\$(?<dollar>[^\\s$](?:[^$\\n]*[^\\s$\\\\])?)\\$(?![\\d$])",
    "!\\[(?<alt>[^\\]\\n]*)\\]\\((?<source>[^()\\s]+)[^()\\n]*\\)",
    "\\[(?<label>[^\\]\\n]+)\\]\\((?<target>[^()\\s]+(?:\\([^()\\s]*\\)[^()\\s]*)?)(?:\\s[^()\\n]*)?\\)",
    "(?<bare>https?:\\/\\/[^\\s<>\"'`)\\]]+[^\\s<>\"'`)\\].,;:!?])",
    "\\*\\*(?<strong>[^\\s*](?:[^\\n]*?[^\\s])?)\\*\\*",
    "__(?<strong2>[^\\s_](?:[^\\n]*?[^\\s])?)__(?!\\w)",
    "\\*(?<em>[^\\s*](?:[^*\\n]*[^\\s*])?)\\*",
    "(?<!\\w)_(?<em2>[^\\s_](?:[^_\\n]*[^\\s_])?)_(?!\\w)",
    "~~(?<del>[^\\n]+?)~~",
  ].join("|"),
  "u",
);
const LONGEST_INLINE = 20000; // characters of a paragraph that are read as Markdown; more is shown as it is

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

// What is wider than the page scrolls, also by the keyboard.
function reachable(node) {
  node.setAttribute("tabindex", "0");
  return node;
}

// The blocks of a text, as a list of nodes. `onCode(code, language)` makes the bar above a block of code.
export function markdown(source, onCode = () => []) {
  return blocks(source.replace(/\r\n?/g, "\n").split("\n"), onCode, 0);
}

// Where the last block of a text begins that may still grow; `from` is the beginning of a block.
export function lastBlock(source, from) {
  let [at, found, fence, blank] = [from, from, "", false];
  for (const line of source.slice(from).split("\n")) {
    if (!fence && blank && /^[^\s>*+\d-]/.test(line)) found = at;
    const mark = /^ {0,3}(`{3,}|~{3,})/.exec(line)?.[1] ?? "";
    if (!fence) fence = mark;
    else if (mark.startsWith(fence)) fence = "";
    blank = !line.trim();
    at += line.length + 1;
  }
  return found;
}

function blocks(lines, onCode, depth) {
  const found = [];
  if (depth > DEEPEST) return [element("p", lines.join("\n"))];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/.exec(line))) {
      const [, fence, language] = match;
      const closes = (other) => other.trim().startsWith(fence) && !other.trim().slice(fence.length).replaceAll(fence[0], "");
      let end = at + 1;
      while (end < lines.length && !closes(lines[end])) end++; // a fence that is still open reaches to the end
      const code = lines.slice(at + 1, end).join("\n");
      found.push(element("div", ...onCode(code, language), reachable(element("pre", element("code", code)))));
      found.at(-1).className = "code";
      at = end + 1;
    } else if ((match = /^\s*(\$\$|\\\[)/.exec(line))) {
      const close = match[1] === "$$" ? "$$" : "\\]";
      let tex = line.slice(match[0].length);
      let end = at;
      while (!tex.includes(close) && end + 1 < lines.length && lines[end + 1].trim()) tex += `\n${lines[++end]}`;
      const cut = tex.indexOf(close);
      found.push(reachable(element("div", math(cut < 0 ? tex : tex.slice(0, cut), true))));
      found.at(-1).className = "formula";
      const rest = cut < 0 ? "" : tex.slice(cut + close.length);
      if (rest.trim()) found.push(element("p", ...inline(rest, depth)));
      at = end + 1;
    } else if ((match = /^ {0,3}(#{1,6})\s+(.*)$/.exec(line))) {
      found.push(element(`h${Math.min(match[1].length + 2, 6)}`, ...inline(match[2], depth)));
      at++;
    } else if (/^ {0,3}([-*_])(?:\s*\1){2,}\s*$/.test(line)) {
      found.push(element("hr"));
      at++;
    } else if (/^ {0,3}>/.test(line)) {
      let end = at;
      while (end < lines.length && /^ {0,3}>/.test(lines[end])) end++;
      const inside = lines.slice(at, end).map((one) => one.replace(/^ {0,3}> ?/, ""));
      found.push(element("blockquote", ...blocks(inside, onCode, depth + 1)));
      at = end;
    } else if ((match = /^(\s{0,3})(?:([-*+])|(\d{1,9})[.)])\s+/.exec(line))) {
      const made = list(lines, at, match, onCode, depth);
      found.push(made.node);
      at = made.end;
    } else if (line.includes("|") && /^[\s|:-]+$/.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end++;
      found.push(table(lines.slice(at, end), depth));
      at = end;
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !/^ {0,3}(#{1,6}\s|>|`{3}|~{3}|[-*+]\s|\d{1,9}[.)]\s|\$\$|\\\[)/.test(lines[end])) end++;
      found.push(element("p", ...inline(lines.slice(at, end).join("\n"), depth)));
      at = end;
    }
  }
  return found;
}

function list(lines, start, first, onCode, depth) {
  const ordered = first[3] !== undefined;
  const node = element(ordered ? "ol" : "ul");
  if (ordered && Number(first[3]) !== 1) node.setAttribute("start", String(Number(first[3])));
  const mark = ordered ? /^\s{0,3}\d{1,9}[.)]\s+/ : /^\s{0,3}[-*+]\s+/;
  let at = start;
  while (at < lines.length && mark.test(lines[at])) {
    const width = mark.exec(lines[at])[0].length;
    const own = [lines[at].slice(width)];
    at++;
    while (at < lines.length && (/^\s{2,}\S/.test(lines[at]) || (!lines[at].trim() && /^\s{2,}\S/.test(lines[at + 1] ?? "")))) {
      const indent = Math.min(width, lines[at].length - lines[at].trimStart().length);
      own.push(lines[at++].slice(indent));
    }
    const made = blocks(own, onCode, depth + 1);
    // A single paragraph needs no space around it.
    node.append(element("li", ...(made[0]?.tagName === "P" ? [...made[0].childNodes, ...made.slice(1)] : made)));
    while (at < lines.length && !lines[at].trim() && mark.test(lines[at + 1] ?? "")) at++;
  }
  return { node, end: at };
}

function table(lines, depth) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const row = (line, name) => element("tr", ...cells(line).map((cell) => element(name, ...inline(cell, depth))));
  return reachable(element("table", element("thead", row(lines[0], "th")), element("tbody", ...lines.slice(2).map((line) => row(line, "td")))));
}

function inline(text, depth) {
  const found = [];
  if (depth > DEEPEST || text.length > LONGEST_INLINE) return [text];
  let rest = text;
  for (let match; (match = INLINE.exec(rest)); ) {
    if (match.index) found.push(rest.slice(0, match.index));
    found.push(mark(match[0], match.groups, depth + 1));
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest) found.push(rest);
  return found;
}

function mark(whole, groups, depth) {
  if (groups.escaped) return groups.escaped.slice(1);
  if (groups.code !== undefined) return element("code", groups.code.trim() ? groups.code.replace(/^ (.*) $/, "$1") : groups.code);
  if (groups.paren ?? groups.dollar) return math(groups.paren ?? groups.dollar, false);
  if (groups.source) return link(groups.source, (host) => [`[image at ${host}: ${groups.alt || "without a description"}]`], whole);
  if (groups.target) return link(groups.target, () => inline(groups.label, depth), whole);
  if (groups.bare) return link(groups.bare, () => [groups.bare], whole);
  if (groups.strong ?? groups.strong2) return element("strong", ...inline(groups.strong ?? groups.strong2, depth));
  if (groups.em ?? groups.em2) return element("em", ...inline(groups.em ?? groups.em2, depth));
  return element("del", ...inline(groups.del, depth));
}

// A link with its host as a title, or the text as it was written where the address is not one that may be opened.
function link(address, label, whole) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return whole;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return whole;
  const node = element("a", ...label(url.host || url.pathname));
  node.setAttribute("href", url.href);
  node.setAttribute("title", url.host || url.pathname);
  node.setAttribute("rel", "noopener noreferrer nofollow");
  node.setAttribute("target", "_blank");
  return node;
}
