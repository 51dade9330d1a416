// Requests to the server that this page came from.

export function key() {
  return sessionStorage.getItem("key") ?? "";
}

export async function ask(path, body, signal) {
  const headers = key() ? { authorization: `Bearer ${key()}` } : {};
  const options = body ? { method: "POST", body: JSON.stringify(body), headers: { ...headers, "content-type": "application/json" } } : { headers };
  const answer = await fetch(path, { ...options, signal });
  if (!answer.ok) {
    const error = (await answer.json().catch(() => ({}))).error ?? {};
    throw Object.assign(new Error(error.message ?? `the server answered ${answer.status}`), { status: answer.status });
  }
  return answer;
}

// The values of a stream of events, to the one of its end. Throws for an error, and when it is cut.
export async function* events(path, body, signal) {
  const answer = await ask(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection was cut");
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
      if (event.type === "answer") return;
    }
  }
}

// The chunks of a stream of chat completions.
export const chunks = (body, signal) => events("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
