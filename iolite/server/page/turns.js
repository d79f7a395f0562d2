// How one message is shown.

import { el, fragment, icon, iconButton, number, seconds } from "./dom.js";
import { fileLink } from "./api.js";

/** `does` has what its buttons do: edit, again, branch, give. */
export function turn(message, siblings, does) {
  const card = el("div", { class: "card" });
  const item = el("li", { class: `turn ${message.role}`, "data-id": message.id }, el("span", { class: "hidden" }, WHO[message.role]), card);
  if (message.role === "assistant") {
    fillAnswer(card, message, does);
    item.classList.toggle("writing", message.info.state === "writing");
  } else if (message.role === "tool") {
    card.append(el("span", { class: "quiet" }, `Result of ${message.info.name}`), el("div", { class: "said" }, message.text));
  } else {
    if (message.files.length) card.append(el("ul", { class: "files" }, ...message.files.map((file) => el("li", {}, shownFile(file)))));
    if (message.text) card.append(el("div", { class: "said" }, message.text));
  }
  if (message.info.state !== "writing") item.append(actions(message, siblings, does));
  return item;
}

const WHO = { user: "You:", assistant: "Model:", tool: "Tool:" };

function fillAnswer(card, message, does) {
  const { info } = message;
  if (message.thought) {
    const inside = el("div", { class: "inside prose" });
    inside.append(fragment(message.thought));
    card.append(fold("thought", thoughtLabel(info), inside));
  }
  if (message.html) {
    const prose = el("div", { class: "prose" });
    prose.append(fragment(message.html));
    card.append(prose);
  }
  for (const call of message.calls) card.append(shownCall(call));
  if (message.calls.length && does.isLast?.(message)) card.append(resultForm(message, does));
  const notice = info.notice ?? (info.state === "stopped" ? (message.text ? "Stopped here." : "Stopped before an answer began.") : null);
  if (notice) card.append(el("div", { class: `notice ${info.state === "failed" ? "failed" : ""}` }, upper(notice) + (/[.!?]$/.test(notice) ? "" : ".")));
}

const upper = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export function thoughtLabel(info) {
  const spent = info.thought_tokens ? ` · ${number(info.thought_tokens)} tokens` : "";
  return `Thought for ${seconds(info.thought_seconds ?? 0)}${spent}`;
}

export function fold(kind, label, inside) {
  return el("details", { class: `fold ${kind}` }, el("summary", {}, el("span", {}, label)), inside);
}

export function shownCall(call) {
  let text = call.arguments;
  try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* shown as it is */ }
  return fold("call", `Calls ${call.name} · ${seconds(call.seconds)}`, el("div", { class: "inside" }, el("pre", {}, text)));
}

/** Where the person says what the called tools gave. */
function resultForm(message, does) {
  const boxes = message.calls.map((call) => el("textarea", { rows: 2, required: true, "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} gives` }));
  const send = (event) => {
    event.preventDefault();
    does.give(message, message.calls.map((call, at) => ({ call: call.id, text: boxes[at].value })));
  };
  return el("form", { class: "give", onsubmit: send }, ...boxes, el("button", { class: "primary" }, "Give"));
}

export function shownFile(file) {
  const link = fileLink(file.file);
  if (file.kind === "image") {
    const picture = el("img", { src: link, alt: file.name, loading: "lazy" });
    picture.addEventListener("error", () => picture.replaceWith(documentLink(file, link)));  // a format that browsers do not show
    return el("a", { href: link, target: "_blank", rel: "noopener", title: file.name }, picture);
  }
  if (file.kind === "audio") return el("figure", {}, el("audio", { src: link, controls: true, preload: "metadata", "aria-label": file.name }), el("figcaption", {}, file.name));
  if (file.kind === "video") return el("video", { src: link, controls: true, preload: "metadata", "aria-label": file.name });
  return documentLink(file, link);
}

const documentLink = (file, link) => el("a", { class: "doc", href: link, download: file.name }, icon("file"), file.name);

function actions(message, siblings, does) {
  const row = el("div", { class: "actions" });
  if (siblings.length > 1) {
    const at = siblings.indexOf(message);
    row.append(el("span", { class: "branch", role: "group", "aria-label": "Branches" },
      iconButton("left", "Earlier version", () => does.branch(siblings[at - 1]), { disabled: at === 0 }),
      el("span", {}, `${at + 1} / ${siblings.length}`),
      iconButton("right", "Later version", () => does.branch(siblings[at + 1]), { disabled: at === siblings.length - 1 })));
  }
  if (message.role === "assistant") {
    row.append(iconButton("copy", "Copy the answer", (event) => copy(message.text, event.currentTarget)),
      iconButton("again", "Answer again", () => does.again(message)));
    const spent = costs(message.info);
    if (spent) row.append(spent);
  } else if (message.role === "user") {
    row.append(iconButton("copy", "Copy the message", (event) => copy(message.text, event.currentTarget)),
      iconButton("edit", "Edit the message", () => does.edit(message)));
  }
  return row;
}

/** Speed first; the rest in smaller print and in the tooltip. */
function costs(info) {
  if (!info.tokens) return null;
  const title = [
    `${number(info.tokens)} tokens drawn`, `${number(info.prompt_tokens)} read, ${number(info.cached_tokens)} of them remembered`,
    info.spoken ? `first token ${info.first_token.toFixed(2)} s after the last sample: the rest was read while it was spoken` : `first token after ${seconds(info.first_token)}`,
    info.gain ? `drafting makes it ${info.gain.toFixed(1)} times as fast` : "without drafts",
  ].join("\n");
  const parts = [];
  if (info.tokens_per_second) parts.push(`${info.tokens_per_second.toFixed(info.tokens_per_second < 10 ? 1 : 0)} tokens/s`);
  if (info.gain) parts.push(`${info.gain.toFixed(1)}× by drafting`);
  const rest = `${parts.length ? " · " : ""}${number(info.tokens)} tokens · first ${info.spoken ? "" : "after "}${info.first_token.toFixed(2)} s${info.spoken ? " after the last sample" : ""}`;
  return el("span", { class: "spent", title }, parts.join(" · "), el("span", { class: "more" }, rest));
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // no clipboard on this page: an address other than this machine's, without TLS
    const box = el("textarea", { value: text, class: "hidden" });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  const before = button.title || button.textContent;
  if (button.classList.contains("copy")) button.textContent = "Copied";
  else button.title = "Copied";
  setTimeout(() => { if (button.classList.contains("copy")) button.textContent = "Copy"; else button.title = before; }, 1600);
}

/** An answer that grows: what is settled stays in the document, only the rest is put there anew. */
export class Growing {
  constructor(item) {
    this.item = item;
    this.card = item.querySelector(".card");
    this.begun = performance.now();
    this.wait = el("span", { class: "waiting" }, el("i"), el("i"), el("i"), el("span", {}, "Reading"));
    this.card.append(this.wait);
    this.parts = {};
  }

  reading(tokens) {
    this.wait.lastChild.textContent = `Reading ${number(tokens)} tokens`;
  }

  grow(kind, settled, tail) {
    this.wait.remove();
    const part = this.parts[kind] ?? this.make(kind);
    if (settled) part.settled.append(fragment(settled));
    part.tail.replaceChildren(fragment(tail));
    if (kind === "thought") part.label.textContent = `Thinking · ${seconds((performance.now() - this.begun) / 1000)}`;
  }

  make(kind) {
    const settled = el("div"), tail = el("div");
    const prose = el("div", { class: kind === "thought" ? "inside prose" : "prose" }, settled, tail);
    const part = { settled, tail };
    if (kind === "thought") {
      const folded = fold("thought", "Thinking", prose);
      part.label = folded.querySelector("summary span");
      this.card.append(folded);
    } else {
      this.card.append(prose);
    }
    return (this.parts[kind] = part);
  }

  call(call) {
    this.wait.remove();
    this.card.append(shownCall(call));
  }
}
