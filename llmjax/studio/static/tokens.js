// Tokens as text: what is learnt is coloured, control tokens are boxed, targets that differ stand in the title.

import { h } from "./dom.js";

const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t").replace(/\r/g, "␍");

export function token(piece) {
  const kinds = ["token", piece.learnt && "learnt", piece.control && "control", piece.target !== undefined && "changed"].filter(Boolean);
  return h("span", { class: kinds.join(" "), title: piece.target === undefined ? null : `to become ${piece.target}` }, visible(piece.text));
}

export const text = (pieces) => h("p", { class: "tokens", dir: "auto" }, pieces.map(token));

export const legend = () =>
  h("p", { class: "quiet" }, h("span", { class: "token learnt" }, "learnt"), " ", h("span", { class: "token" }, "context"), " ",
    h("span", { class: "token control" }, "control token"), " ", h("span", { class: "token changed learnt" }, "to become another token (pointer: which)"));

// The rows of a batch.
export const batch = ({ rows, shape, objective }) => [
  h("p", { class: "quiet" }, `Batch 0: ${shape.join(" × ")} tokens, objective ${objective}. The first ${rows.length} rows; lines part documents or examples.`),
  legend(),
  rows.map((row, i) => h("section", { class: "card" },
    h("h3", {}, `Row ${i}: ${row.tokens} tokens, ${row.learnt} learnt`),
    row.source ? [h("h4", {}, "What the encoder reads"), text(row.source)] : null,
    row.parts.map(text))),
];
