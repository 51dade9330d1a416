// The tokens of an answer, coloured by how likely each was. A press shows what else was likely.

const CLASSES = [[0.05, "p1"], [0.3, "p2"], [0.8, "p3"], [2, "p4"]]; // below this probability

function element(name, text, className = "") {
  const node = document.createElement(name);
  node.textContent = text;
  node.className = className;
  return node;
}

// White space and control characters as JSON writes them, so that they are seen.
const visible = (token) => (/^\s*$|\p{Cc}/u.test(token) ? JSON.stringify(token) : token);

const percent = (nats) => `${(100 * Math.exp(nats)).toFixed(1)} %`;

export function tokensView(tokens) {
  const view = element("div", "");
  const detail = element("div", "", "likeliest");
  detail.setAttribute("role", "status");
  const text = element("div", "");
  for (const one of tokens) {
    const share = Math.exp(one.logprob);
    const node = element("button", one.token, `token ${CLASSES.find(([most]) => share < most)[1]}`);
    node.type = "button";
    node.title = percent(one.logprob);
    node.onclick = () => detail.replaceChildren(...(one.top_logprobs.length ? one.top_logprobs : [one]).flatMap(row));
    text.append(node);
  }
  view.append(text, detail);
  return view;
}

function row({ token, logprob }) {
  const meter = element("meter", "");
  meter.value = Math.exp(logprob);
  meter.setAttribute("aria-label", `probability of ${visible(token)}`);
  return [element("code", visible(token)), meter, element("span", percent(logprob))];
}
