// What the page asks of its server.

export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(method, path, body, more = {}) {
  let response;
  const json = body !== undefined && !(body instanceof FormData);
  try {
    response = await fetch(path, {
      method, body: json ? JSON.stringify(body) : body, credentials: "same-origin",
      headers: json ? { "Content-Type": "application/json" } : {}, ...more,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server does not answer. Is it still running?", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) throw new Refused("The server asks for its key again: open the link that it printed.", 401);
  const said = await response.json().catch(() => ({}));
  throw new Refused(sentence(said.error?.message ?? `the server answered with ${response.status}`), response.status);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const read = async (...request) => (await ask(...request)).json();

export const about = () => read("GET", "/page/about");
export const chats = (words) => read("GET", `/page/chats?q=${encodeURIComponent(words)}`);
export const chat = (id) => read("GET", `/page/chats/${id}`);
export const create = (settings) => read("POST", "/page/chats", { settings });
export const change = (id, values) => read("PATCH", `/page/chats/${id}`, values);
export const remove = (id) => ask("DELETE", `/page/chats/${id}`);
export const stop = (id) => ask("POST", `/page/answers/${id}/stop`, {});
export const exportLink = (id, form) => `/page/chats/${id}/export?form=${form}`;
export const fileLink = (id) => `/page/files/${id}`;

export function upload(file, signal) {
  const form = new FormData();
  form.append("file", file, file.name);
  return read("POST", "/page/files", form, { signal });
}

/** Sends a turn and calls `on` with each event of its answer. Resolves when the stream is over. */
export async function answer(id, turn, on) {
  const response = await ask("POST", `/page/chats/${id}/answers`, turn);
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read().catch(() => ({ done: true }));
    if (done) break;
    const events = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = events.pop();
    for (const text of events) {
      if (!text.startsWith("data: ")) continue;
      const event = JSON.parse(text.slice(6));
      ended ||= event.type === "end" || event.type === "error";
      on(event);
    }
  }
  if (!ended) throw new Refused("The connection broke off before the answer was complete.", 0);
}

/** Says one message, whose text and files are in `start`. on(event) is called with what the server tells, and with one
    event "error" where that ends before the answer does. */
export function speak(start, on) {
  const socket = new WebSocket(`${location.origin.replace("http", "ws")}/page/live`);
  const waiting = [JSON.stringify({ type: "start", ...start })];
  let opened = false, over = false;
  const tell = (event) => {
    if (over) return;
    over = event.type === "end" || event.type === "error";
    on(event);
  };
  const send = (data) => { if (opened) socket.send(data); else waiting.push(data); };
  socket.addEventListener("open", () => { opened = true; waiting.splice(0).forEach((data) => socket.send(data)); });
  socket.addEventListener("message", ({ data }) => {
    const event = JSON.parse(data);
    tell(event.type === "error" ? { type: "error", message: sentence(event.error.message) } : event);
  });
  socket.addEventListener("close", () => tell({
    type: "error", message: opened ? "The connection broke off before the answer was complete." : "The server takes no live connection; is it still running?",
  }));
  return { hear: send, commit: () => send('{"type": "commit"}'), close: () => { over = true; socket.close(); } };
}
