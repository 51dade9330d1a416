// Runs the page's own modules on a document of plain objects: {name, attributes, children}. Reads cases from the standard
// input, and writes what each of them became.

import { readFileSync, mkdtempSync, copyFileSync, readdirSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const folder = mkdtempSync(join(tmpdir(), "page-"));
for (const name of readdirSync(process.argv[2])) copyFileSync(join(process.argv[2], name), join(folder, name));
writeFileSync(join(folder, "package.json"), '{"type": "module"}');

class Element {
  constructor(name) {
    Object.assign(this, { name, tagName: name.toUpperCase(), attributes: {}, children: [] });
  }
  append(...nodes) {
    this.children.push(...nodes);
  }
  get childNodes() {
    return this.children;
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  set className(value) {
    this.attributes.class = value;
  }
  set textContent(value) {
    this.children = [String(value)];
  }
  set innerHTML(value) {
    throw new Error("innerHTML");
  }
}
globalThis.document = { createElement: (name) => new Element(name), createElementNS: (_, name) => new Element(name) };

const { lastBlock, markdown } = await import(join(folder, "markdown.js"));
const table = await import(join(folder, "table.js"));
const agent = await import(join(folder, "agent.js"));
const store = await import(join(folder, "store.js"));
const { heard } = await import(join(folder, "state.js"));
const plain = (node) => (typeof node === "string" ? node : [node.name, node.attributes, ...node.children.map(plain)]);

const { texts, chats } = JSON.parse(readFileSync(0, "utf8"));
const found = { texts: texts.map((text) => markdown(text).map(plain)) };
for (const text of texts) for (let end = 0; end < Math.min(text.length, 300); end++) markdown(text.slice(0, end));

// A text that grows: what stands before its last block is made once, and is what it is in the whole.
const long = texts.slice(0, 9).filter((text) => !text.endsWith("open")).join("\n\n");
found.grown = [];
for (let end = 0, from = 0; end <= long.length; end++) {
  const next = lastBlock(long.slice(0, end), from);
  found.grown.push(...markdown(long.slice(from, next)).map(plain));
  if (end === long.length) found.grown.push(...markdown(long.slice(next)).map(plain));
  from = next;
}
found.long = markdown(long).map(plain);

const chat = store.newChat();
const asked = store.add(chat, -1, { role: "user", content: "a" });
store.add(chat, asked, { role: "assistant", content: "b" });
const second = store.add(chat, asked, { role: "assistant", content: "c" });
store.add(chat, second, { role: "user", content: "d" });
found.branch = store.branch(chat).map((place) => chat.nodes[place].content);
chat.chosen[asked] = store.siblings(chat, second)[0];
found.other = store.branch(chat).map((place) => chat.nodes[place].content);
found.again = JSON.parse(store.exported(store.imported(store.exported([chat]))));
found.refused = chats.map((text) => {
  try {
    store.imported(text);
    return false;
  } catch {
    return true;
  }
});
const cells = { columns: ["a|b", "c"], rows: [["=1+1", 'x"y,'], [null, -3], ["<b>`|\n", "-2"]], sql: "SELECT '```'" };
found.csv = table.csv(cells.columns, cells.rows);
found.table = table.asText(cells);
found.arguments = ['{"to": "A\\u202e\\u00fc\\n"}', '{"x": Infinity}', "\u200b\u{e0041}\u0007"].map(agent.readable);

const talk = store.newChat();
let last = store.add(talk, -1, { role: "user", content: "topic" });
for (const [model, content] of [["x", "(simulated) one"], ["y", "(simulated) two"], ["x", "three"]]) {
  last = store.add(talk, last, { role: "assistant", model, simulates: model.toUpperCase(), content, said: content.replace("(simulated) ", "") });
}
found.heard = ["x", "y"].map((model) => heard(talk, last, model).map(({ role, content }) => [role, content]));
found.markdown = store.asMarkdown(talk);
found.talk = JSON.parse(store.exported(store.imported(store.exported([talk])))).chats[0].nodes.map((node) => node.simulates ?? null);
process.stdout.write(JSON.stringify(found));
