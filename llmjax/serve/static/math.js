// TeX of formulas as MathML, the part that models write most. What it does not know is shown as it was written.

const MATHML = "http://www.w3.org/1998/Math/MathML";
const LETTERS = {
  alpha: "α", beta: "β", gamma: "γ", delta: "δ", epsilon: "ϵ", varepsilon: "ε", zeta: "ζ", eta: "η", theta: "θ",
  iota: "ι", kappa: "κ", lambda: "λ", mu: "μ", nu: "ν", xi: "ξ", pi: "π", rho: "ρ", sigma: "σ", tau: "τ", phi: "ϕ",
  varphi: "φ", chi: "χ", psi: "ψ", omega: "ω", Gamma: "Γ", Delta: "Δ", Theta: "Θ", Lambda: "Λ", Xi: "Ξ", Pi: "Π",
  Sigma: "Σ", Phi: "Φ", Psi: "Ψ", Omega: "Ω", infty: "∞", ell: "ℓ", hbar: "ℏ", partial: "∂", nabla: "∇", emptyset: "∅",
};
const SIGNS = {
  times: "×", cdot: "⋅", div: "÷", pm: "±", mp: "∓", leq: "≤", le: "≤", geq: "≥", ge: "≥", neq: "≠", ne: "≠",
  approx: "≈", equiv: "≡", sim: "∼", propto: "∝", to: "→", rightarrow: "→", leftarrow: "←", Rightarrow: "⇒",
  Leftarrow: "⇐", iff: "⇔", mapsto: "↦", in: "∈", notin: "∉", subset: "⊂", subseteq: "⊆", cup: "∪", cap: "∩",
  forall: "∀", exists: "∃", neg: "¬", land: "∧", lor: "∨", sum: "∑", prod: "∏", int: "∫", oint: "∮", ldots: "…",
  dots: "…", cdots: "⋯", langle: "⟨", rangle: "⟩", lfloor: "⌊", rfloor: "⌋", lceil: "⌈", rceil: "⌉", mid: "∣",
  circ: "∘", star: "⋆", "{": "{", "}": "}", "|": "‖", "%": "%", "$": "$", "&": "&", "#": "#", _: "_",
};
const NAMES = new Set("sin cos tan log ln exp lim max min sup inf det gcd arg Pr".split(" "));
const SPACES = { ",": 0.17, ":": 0.22, ";": 0.28, "!": 0, quad: 1, qquad: 2, " ": 0.25 };
const DEEPEST = 40; // levels of groups; deeper ones are shown as they were written

function make(name, ...children) {
  const node = document.createElementNS(MATHML, name);
  node.append(...children);
  return node;
}

// The <math> of a formula, or a <code> with the formula itself where it cannot be read.
export function math(tex, display) {
  try {
    const reader = { rest: tex.match(/\\[a-zA-Z]+|\\[^]|\s+|[0-9]+(?:\.[0-9]+)?|[^]/gu) ?? [], at: 0, depth: 0 };
    const root = make("math", row(reader, null));
    if (display) root.setAttribute("display", "block");
    return root;
  } catch {
    const shown = document.createElement("code");
    shown.textContent = tex;
    return shown;
  }
}

function row(reader, end) {
  if (++reader.depth > DEEPEST) throw new Error("too deep");
  const found = [];
  for (;;) {
    while (/^\s/.test(reader.rest[reader.at] ?? "")) reader.at++;
    const token = reader.rest[reader.at];
    if (token === undefined) {
      if (end !== null) throw new Error("a group does not end");
      break;
    }
    if (token === end) {
      reader.at++;
      break;
    }
    if (token === "^" || token === "_") {
      found.push(scripts(reader, found.pop() ?? make("mrow")));
    } else {
      found.push(atom(reader));
    }
  }
  reader.depth--;
  return make("mrow", ...found);
}

function scripts(reader, base) {
  const parts = {};
  while (["^", "_"].includes(reader.rest[reader.at])) {
    const sign = reader.rest[reader.at++];
    if (sign in parts) throw new Error("two scripts of one kind");
    parts[sign] = atom(reader);
  }
  if (parts["^"] && parts._) return make("msubsup", base, parts._, parts["^"]);
  return parts["^"] ? make("msup", base, parts["^"]) : make("msub", base, parts._);
}

function atom(reader) {
  while (/^\s/.test(reader.rest[reader.at] ?? "")) reader.at++;
  const token = reader.rest[reader.at++];
  if (token === undefined || token === "}") throw new Error("something is missing");
  if (token === "{") return row(reader, "}");
  if (/^[0-9]/.test(token)) return make("mn", token);
  if (!token.startsWith("\\")) return make(/^\p{L}$/u.test(token) ? "mi" : "mo", token === "-" ? "−" : token === "'" ? "′" : token);
  const name = token.slice(1);
  if (Object.hasOwn(LETTERS, name)) return make("mi", LETTERS[name]);
  if (Object.hasOwn(SIGNS, name)) return make("mo", SIGNS[name]);
  if (NAMES.has(name)) return make("mi", name);
  if (Object.hasOwn(SPACES, name)) {
    const space = make("mspace");
    space.setAttribute("width", `${SPACES[name]}em`);
    return space;
  }
  if (name === "frac" || name === "dfrac" || name === "tfrac") return make("mfrac", atom(reader), atom(reader));
  if (name === "binom") {
    const inner = make("mfrac", atom(reader), atom(reader));
    inner.setAttribute("linethickness", "0");
    return make("mrow", make("mo", "("), inner, make("mo", ")"));
  }
  if (name === "sqrt") return make("msqrt", atom(reader));
  if (["text", "mathrm", "operatorname", "textbf", "mathbf", "mathbb", "mathcal", "mathit"].includes(name)) return text(reader, name);
  if (["hat", "bar", "vec", "tilde", "overline", "dot"].includes(name)) {
    const marks = { hat: "^", bar: "¯", overline: "¯", vec: "→", tilde: "~", dot: "˙" };
    return make("mover", atom(reader), make("mo", marks[name]));
  }
  if (name === "left" || name === "right") return reader.rest[reader.at] === "." ? (reader.at++, make("mrow")) : atom(reader);
  throw new Error(`\\${name} is not known`);
}

function text(reader, name) {
  if (reader.rest[reader.at] !== "{") return atom(reader);
  const end = reader.rest.indexOf("}", reader.at);
  if (end < 0) throw new Error("a text does not end");
  const node = make(name === "text" || name === "textbf" ? "mtext" : "mi", reader.rest.slice(reader.at + 1, end).join(""));
  if (name === "mathbf" || name === "textbf") node.setAttribute("class", "bold");
  reader.at = end + 1;
  return node;
}
