// Asks the node that this page comes from.

const KEY = "meshnode-key";

/** The node said no. `status`: of HTTP, 0 when it did not answer at all. */
export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** One request; the response, when it went well. Throws Refused with the node's own sentence. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "This node does not answer. Does it still run?");
  }
  if (!response.ok) throw new Refused(response.status, await complaint(response));
  return response;
}

export async function json(path, options) {
  return (await request(path, options)).json();
}

async function complaint(response) {
  try {
    const document = await response.json();
    const error = document.error ?? document;
    return (typeof error === "string" ? error : error.message) || `The node answered ${response.status}.`;
  } catch {
    return `The node answered ${response.status}.`;
  }
}

/** Server-sent events of a response (WHATWG HTML, section 9.2): {name, data}. Comments come as {name: "comment"}. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) yield event(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function event(block) {
  let name = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  return data.length ? { name, data: data.join("\n") } : { name: "comment", data: "" };
}
