// Conversations, kept in this browser. Messages are a tree: an edited or regenerated one is a sibling of the old one.

let database;

function opened() {
  database ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("llmjax", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("chats", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return database;
}

async function transact(mode, work) {
  const store = (await opened()).transaction("chats", mode).objectStore("chats");
  const request = work(store);
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export const all = () => transact("readonly", (store) => store.getAll());
export const keep = (chat) => transact("readwrite", (store) => store.put(chat));
export const remove = (id) => transact("readwrite", (store) => store.delete(id));
export const clear = () => transact("readwrite", (store) => store.clear());

export function newChat() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()).slice(2), title: "New chat", changed: Date.now(), system: "", nodes: [], roots: [], chosen: {} };
}

// Add a message after another one (its place in `nodes`; -1: at the beginning), and choose it: its place.
export function add(chat, parent, message) {
  const place = chat.nodes.push({ ...message, parent, children: [] }) - 1;
  siblings(chat, place).push(place);
  chat.chosen[parent] = place;
  return place;
}

export function siblings(chat, place) {
  const { parent } = chat.nodes[place];
  return parent < 0 ? chat.roots : chat.nodes[parent].children;
}

// The places of the messages on the branch that is shown.
export function branch(chat) {
  const found = [];
  for (let place = chat.chosen[-1]; place !== undefined; place = chat.chosen[place]) found.push(place);
  return found;
}

// Chats from a file that `exported` wrote, checked field by field. Throws for anything else.
export function imported(text) {
  const { chats } = JSON.parse(text);
  return chats.map((given) => {
    const chat = { ...newChat(), title: String(given.title).slice(0, 200), system: String(given.system ?? "") };
    given.nodes.forEach((node, place) => {
      if (!["user", "assistant"].includes(node.role) || !(Number.isInteger(node.parent) && node.parent >= -1 && node.parent < place)) throw new Error("a message is damaged");
      const made = { role: node.role, content: String(node.content) };
      for (const name of ["model", "simulates"]) if (typeof node[name] === "string") made[name] = node[name].slice(0, 200);
      if (["stop", "length", "stopped"].includes(node.finish)) made.finish = node.finish;
      if (typeof node.rated === "boolean") made.rated = node.rated;
      add(chat, node.parent, made);
    });
    for (const [parent, place] of Object.entries(given.chosen ?? {})) {
      if (chat.nodes[place]?.parent === Number(parent)) chat.chosen[parent] = place;
    }
    return chat;
  });
}

export function exported(chats) {
  const nodes = (chat) => chat.nodes.map(({ role, content, parent, model, simulates, finish, rated }) => ({ role, content, parent, model, simulates, finish, rated }));
  const rows = chats.map((chat) => ({ title: chat.title, system: chat.system, chosen: chat.chosen, nodes: nodes(chat) }));
  return JSON.stringify({ chats: rows }, null, 1);
}

// Who wrote a message. A persona is named as the simulation that it is.
export function writer({ role, model, simulates }) {
  if (role === "user") return "You";
  return simulates ? `${model}: simulates ${simulates}` : model || "Model";
}

// The branch that is shown, for reading.
export function asMarkdown(chat) {
  const said = branch(chat).map((place) => chat.nodes[place]);
  const parts = said.map((node) => `## ${writer(node)}\n\n${node.content}\n`);
  return [`# ${chat.title}\n`, ...(chat.system ? [`## System\n\n${chat.system}\n`] : []), ...parts].join("\n");
}
