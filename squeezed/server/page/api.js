/** The server's addresses, its errors in words, its streams, and the key, if it wants one. */

const ROOT = new URL("../", import.meta.url);
const STORED = "squeezed-api-key";

export class Failure extends Error {
  constructor(message, status = 0, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The key lives as long as this tab. */
export const key = {
  get: () => sessionStorage.getItem(STORED),
  set: (value) => sessionStorage.setItem(STORED, value),
  forget: () => sessionStorage.removeItem(STORED),
};

/** An answer of the server, or a `Failure` that says why there is none. */
export async function send(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  const plain = body !== undefined && !(body instanceof FormData);
  if (plain) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const sent = plain ? JSON.stringify(body) : body;
    answer = await fetch(new URL(path, ROOT), { method, headers, body: sent, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("The server does not answer. Is it still running?");
  }
  if (!answer.ok) throw await refused(answer);
  return answer;
}

export async function get(path) {
  return (await send(path)).json();
}

/** Server-sent events of an answer: `{name, data}` each. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n\n");
      rest = whole.pop();
      yield* whole.map(parsed);
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Failure) throw error;
    throw new Failure("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What an error object of the server says, with a hint where it helps. */
export function failureOf(error, status = 0, retry = null) {
  const said = error?.message ?? "the server failed, and did not say why";
  const sentence = said[0].toUpperCase() + said.slice(1);
  const later = retry ? ` Try again in ${retry} s.` : "";
  return new Failure(`${sentence}${/[.!?]$/.test(sentence) ? "" : "."}${later}`, status, error?.param);
}

async function refused(answer) {
  const body = await answer.json().catch(() => null);
  if (!body?.error) return new Failure(`The server answered with status ${answer.status}.`, answer.status);
  return failureOf(body.error, answer.status, answer.headers.get("Retry-After"));
}

function parsed(block) {
  const lines = block.split("\n");
  const of = (field) => lines.filter((line) => line.startsWith(`${field}: `)).map((line) => line.slice(field.length + 2));
  return { name: of("event")[0] ?? "message", data: of("data").join("\n") };
}
