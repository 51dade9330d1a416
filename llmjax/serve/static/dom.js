// Elements of the page.

export const by = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

export function button(label, onclick, pressed) {
  const node = element("button", { type: "button", textContent: label, onclick });
  if (pressed !== undefined) node.setAttribute("aria-pressed", String(pressed));
  return node;
}

export const say = (text) => (by("status").textContent = text);
export const complain = (error) => (by("error").textContent = error ? String(error.message ?? error) : "");

export async function copy(text) {
  await navigator.clipboard.writeText(text).then(() => say("copied"), complain);
}

export function download(name, kind, text) {
  const url = URL.createObjectURL(new Blob([text], { type: kind }));
  element("a", { href: url, download: name }).click();
  URL.revokeObjectURL(url);
}

// The conversation follows the newest text while its end is in view.
export const atBottom = () => by("log").scrollHeight - by("log").scrollTop - by("log").clientHeight < 60;

export function toBottom() {
  by("log").scrollTop = by("log").scrollHeight;
  by("newer").hidden = true;
}
