// An agent of the server: a model that calls tools. What it does is shown while it happens, and some calls ask first.

import { ask, events } from "./api.js";
import { atBottom, button, complain, element, say, toBottom } from "./dom.js";

const ENDS = { "gave up": "every way was given up" };

// Let the agent reach the goal at a place. Its steps and its answer come into the node, and on the page into `shown`.
export async function act({ chat, parent, node, shown, signal }) {
  const body = { goal: chat.nodes[parent].content, model: node.model, stream: true, asks: true, transcript: true };
  node.steps = [];
  const draw = () => {
    const low = atBottom();
    shown.querySelector(".text").replaceChildren(stepsView(node.steps));
    if (low) toBottom();
  };
  try {
    for await (const { type, ...news } of events("agent", body, signal)) {
      if (type === "answer") {
        const ended = news.ended === "answer" ? "" : (ENDS[news.ended] ?? `the budget of ${news.ended} is used up`);
        const read = news.read.length ? `written after reading what others may have written: ${news.read.join(", ")}` : "";
        Object.assign(node, { content: news.answer || `No answer: ${ended}`, finish: "stop", facts: [ended, read].filter(Boolean).join("; "), transcript: news.transcript });
        continue;
      }
      const open = node.steps.at(-1);
      if (type === "question") say("the model asks for your permission");
      if (open && !open.verdict && open.type !== "thought" && type !== "thought") Object.assign(open, news, { type });
      else node.steps.push({ type, ...news });
      draw();
    }
  } finally {
    for (const step of node.steps) if (step.type === "question") Object.assign(step, { type: "result", verdict: "not answered" });
    if (!node.content && node.steps.length) node.content = "No answer.";
    draw();
  }
}

// The steps of an agent: thoughts, calls with their results, and the question whether a call may run.
export function stepsView(steps) {
  return element("div", { className: "steps" }, ...steps.map(stepView));
}

function stepView({ type, id, text, tool, effect, arguments: given, verdict, result, failed, cut }) {
  if (type === "thought") return element("p", { className: "note", textContent: text });
  const name = element("p", {}, element("strong", { textContent: tool }), ` ${type === "question" ? `(${effect}): may it run?` : type === "call" ? "runs" : verdict}`);
  const view = element("div", { className: failed ? "step failed" : "step" }, name, block(readable(given)));
  if (type === "question") view.append(answers(id));
  if (result) view.append(element("details", {}, element("summary", { textContent: "Result" }), block(visible(result) + (cut ? "\u2026" : ""))));
  return view;
}

const block = (text) => element("pre", { textContent: text, tabIndex: 0 });

function answers(id) {
  const say_ = (allow) => async () => {
    buttons.forEach((one) => (one.disabled = true));
    await ask("agent/permission", { id, allow }).catch(complain);
  };
  const buttons = [button("Deny", say_(false)), button("Allow", say_(true))];
  return element("div", { role: "group", ariaLabel: "Permission" }, ...buttons);
}

// The arguments of a call, as the tool gets them.
export function readable(text) {
  try {
    return visible(JSON.stringify(JSON.parse(text), null, 1));
  } catch {
    return visible(text);
  }
}

// Characters that hide or turn around what stands beside them are written as escapes: a user decides by what is seen.
export const visible = (text) => text.replace(/[\p{Cf}\p{Cc}\p{Co}\p{Cn}\u2028\u2029]/gu, (one) => (one === "\n" || one === "\t" ? one : `\\u{${one.codePointAt(0).toString(16)}}`));
