// The page: which chat is open, what is said in it, and the keys.

import { $, number, say } from "./dom.js";
import * as api from "./api.js";
import { Composer } from "./composer.js";
import { SettingsDialog, ask } from "./dialogs.js";
import { Side } from "./side.js";
import { Speech, pause } from "./speech.js";
import { Tree } from "./tree.js";
import { Growing, copy, turn } from "./turns.js";

const about = await api.about().catch((error) => { $("model").textContent = error.message; throw error; });

const page = {
  chat: null,  // null: one that is not begun yet
  settings: {},
  tree: new Tree(),
  parent: undefined,  // of the message that is edited, null for the first; undefined when none is
  writing: null,  // the id of the answer that is drawn
  opened: 0,  // counts, so that an answer that comes late is not shown in another chat
};

let following = true;  // whether the view is at the end, and stays there

const composer = new Composer(about, send);
const speech = new Speech(about, composer, spoken);
const side = new Side(open);
const settings = new SettingsDialog(about, saveSettings, pause);
const does = {
  edit, give,
  again: (message) => run({ parent: message.parent, again: true }),
  branch: async (message) => { page.tree.head = page.tree.leaf(message).id; show(); await tell(() => api.change(page.chat, { head: page.tree.head })); },
  isLast: (message) => page.tree.head === message.id && !page.writing,
};

// ---- chats ----

async function open(id) {
  if (page.writing) await api.stop(page.writing).catch(() => {});
  speech.leave();
  const mine = (page.opened += 1);
  leaveEditing();
  composer.trouble(null);
  $("empty").hidden = true;
  $("messages").replaceChildren();
  const timer = setTimeout(() => { $("loading").hidden = page.opened !== mine; }, 150);
  try {
    const chat = id === null ? { id: null, title: "", settings: {}, messages: [], head: null } : await api.chat(id);
    if (page.opened !== mine) return;
    Object.assign(page, { chat: chat.id, settings: chat.settings, tree: new Tree(chat.messages, chat.head) });
    setTitle(chat.title);
    history.replaceState(null, "", id === null ? "/" : `/#${id}`);
  } catch (error) {
    if (page.opened !== mine) return;
    if (error.status === 404) return open(null);
    composer.trouble(error.message);
  } finally {
    clearTimeout(timer);
    if (page.opened === mine) $("loading").hidden = true;
  }
  side.current = page.chat;
  show();
  tell(() => side.refresh());
  showThinking();
  if (matchMedia("(hover: hover)").matches) composer.text.focus();
}

function setTitle(title) {
  $("title").textContent = title || "New chat";
  document.title = title ? `${title} · iolite` : "iolite";
  $("menu-open").hidden = page.chat === null;
}

async function tell(work) {
  try {
    return await work();
  } catch (error) {
    composer.trouble(error.message);
  }
}

// ---- messages ----

function show() {
  const path = page.tree.path;
  $("empty").hidden = path.length > 0;
  $("messages").replaceChildren(...path.map((message) => turn(message, page.tree.siblings(message), does)));
  showMeter();
  toEnd(true);
}

function showMeter() {
  const last = page.tree.path.findLast((message) => message.info.prompt_tokens);
  $("meter").hidden = !last;
  if (!last) return;
  const used = last.info.prompt_tokens + last.info.tokens, share = Math.min(100, (100 * used) / about.context);
  $("meter-arc").style.strokeDasharray = `${share} 100`;
  $("meter-text").textContent = `${number(used)} / ${number(about.context)}`;
  $("meter").setAttribute("aria-label", `${number(used)} of ${number(about.context)} tokens of context used`);
}

function send(message) {
  run(turnOf(message), () => taken(message));
}

/** What is in the composer as the server takes it. */
function turnOf({ text, files }) {
  const sent = files.map((file) => ({ file: file.file, name: file.name, tokens: file.tokens ?? null }));
  return { parent: page.parent === undefined ? page.tree.head : page.parent, text, files: sent };
}

function taken(message) {
  page.parent = undefined;
  $("editing").hidden = true;
  composer.taken(message);
}

function give(message, results) {
  run({ parent: message.id, results });
}

/** What the composer holds begins the message that somebody is about to say. */
function spoken() {
  const message = composer.message, start = { chat: page.chat, ...turnOf(message) };
  if (page.chat === null) start.settings = page.settings;
  const mine = page.opened, answer = showing((event) => {
    if (page.opened === mine) called(event.chat);
    taken(message);
  });
  return { start, answer };
}

/** The chat that was not begun has a name for the server now. */
function called(id) {
  page.chat = side.current = id;
  history.replaceState(null, "", `/#${id}`);
}

/** Sends a turn and shows its answer as it grows. begun() is called when the server has taken it. */
async function run(request, begun = () => {}) {
  if (page.writing || composer.busy) return;
  composer.setBusy(true);
  composer.trouble(null);
  const answer = showing(begun);
  let failed = null;
  try {
    if (page.chat === null) called((await api.create(page.settings)).id);
    await api.answer(page.chat, request, (event) => { if (event.type === "error") failed = event.message; else answer.on(event); });
  } catch (error) {
    failed = error.message;
  }
  answer.over(failed);
}

/** Shows an answer whose events come in here, unless another chat is opened meanwhile. */
function showing(begun) {
  const mine = page.opened;
  let growing = null, ended = false;
  function on(event) {
    if (event.type === "begin") { page.writing = event.message.id; begun(event); }
    if (event.type === "end") over(null);  // the next may begin, however long the connection takes to close
    if (page.opened !== mine) return;
    if (event.type === "begin") growing = begin(event);
    else if (event.type === "call") growing.call(event.call);
    else if (event.type === "end") { page.tree.add(event.message); finish(event.message); }
    else growing.grow(event.type, event.settled, event.tail);
    toEnd(false);
  }
  /** failed: why it ended before it was complete; null when it was. */
  async function over(failed) {
    if (ended) return;
    ended = true;
    page.writing = null;
    composer.setBusy(false);
    tell(() => side.refresh());
    if (!failed || page.opened !== mine) return;
    if (growing) await open(page.chat);
    composer.trouble(failed);
  }
  return { on, over };
}

function begin(event) {
  for (const message of [...event.asked, event.message]) page.tree.add(message);
  setTitle(event.title);
  tell(() => side.refresh());
  show();
  const item = $("messages").lastElementChild;
  item.setAttribute("aria-busy", "true");
  const growing = new Growing(item);
  growing.reading(event.prompt_tokens);
  return growing;
}

function finish(message) {
  const old = $("messages").lastElementChild, folds = [...old.querySelectorAll("details")].map((fold) => fold.open);
  page.writing = null;
  const made = turn(message, page.tree.siblings(message), does);
  made.querySelectorAll("details").forEach((fold, at) => { fold.open = folds[at] ?? false; });
  old.replaceWith(made);
  showMeter();
  say(message.info.state === "stopped" ? "Stopped" : "The answer is complete");
}

function edit(message) {
  if (speech.on) return;
  page.parent = message.parent;
  $("editing").hidden = false;
  composer.set(message.text, message.files);
  composer.text.focus();
}

function leaveEditing() {
  if (page.parent === undefined) return;
  page.parent = undefined;
  $("editing").hidden = true;
  composer.set("");
}

// ---- the view follows what grows, unless somebody has scrolled up ----

$("scroll").addEventListener("scroll", () => {
  const box = $("scroll");
  following = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  $("down").hidden = following;
});
function toEnd(always) {
  if (always || following) $("scroll").scrollTop = $("scroll").scrollHeight;
}
$("down").addEventListener("click", () => toEnd(true));

// ---- settings and the menu ----

async function saveSettings(chosen) {
  page.settings = chosen;
  if (page.chat) await tell(() => api.change(page.chat, { settings: chosen }));
  showThinking();
  composer.text.focus();
}

function showThinking() {
  $("think").setAttribute("aria-pressed", String(page.settings.thinking ?? about.thinking));
}
$("think").addEventListener("click", () => saveSettings({ ...page.settings, thinking: !(page.settings.thinking ?? about.thinking) }));
$("settings-open").addEventListener("click", () => settings.open(page.settings));
$("keys").addEventListener("click", () => $("shortcuts").showModal());
$("editing").querySelector("button").addEventListener("click", leaveEditing);
$("new").addEventListener("click", () => { side.slide(false); open(null); });
$("stop").addEventListener("click", stop);

function stop() {
  if (page.writing) tell(() => api.stop(page.writing));
}

function menu(open) {
  $("menu").hidden = !open;
  $("menu-open").setAttribute("aria-expanded", String(open));
  for (const form of ["markdown", "json"]) $("menu").querySelector(`[data-do=${form}]`).href = api.exportLink(page.chat, form);
  if (open) $("menu").querySelector("button").focus();
}
$("menu-open").addEventListener("click", () => menu($("menu").hidden));
$("menu").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key], items = [...$("menu").children];
  if (step) { event.preventDefault(); items.at((items.indexOf(document.activeElement) + step) % items.length).focus(); }
  if (event.key === "Escape") { event.stopPropagation(); menu(false); $("menu-open").focus(); }
});
$("menu").addEventListener("click", async (event) => {
  const what = event.target.dataset.do, title = $("title").textContent;
  menu(false);
  if (what === "rename") {
    const name = await ask({ title: "Rename this chat", yes: "Rename", value: title });
    if (name) { await tell(() => api.change(page.chat, { title: name })); setTitle(name); tell(() => side.refresh()); }
  } else if (what === "delete") {
    const sure = await ask({ title: "Delete this chat?", text: `“${title}” and what was attached to it are removed for good.`, yes: "Delete", danger: true });
    if (sure) { await tell(() => api.remove(page.chat)); page.writing = null; open(null); }
  }
});
document.addEventListener("click", (event) => {
  if (!$("menu").hidden && !event.target.closest("#menu, #menu-open")) menu(false);
  const button = event.target.closest(".copy");
  if (button) copy(button.closest("figure").querySelector("pre").textContent, button);
});

// ---- keys ----

document.addEventListener("keydown", (event) => {
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key.toLowerCase() === "k") { event.preventDefault(); side.slide(matchMedia("(max-width: 800px)").matches); $("search").focus(); }
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") { event.preventDefault(); open(null); }
  else if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (speech.on) speech.cancel();
    else if (page.writing) stop();
    else if (page.parent !== undefined) leaveEditing();
    else side.slide(false);
  } else if (event.key === "ArrowUp" && event.target === composer.text && !composer.text.value && !composer.busy) {
    const last = page.tree.path.findLast((message) => message.role === "user");
    if (last) { event.preventDefault(); edit(last); }
  }
});
addEventListener("hashchange", () => { if (location.hash.slice(1) !== page.chat) open(location.hash.slice(1) || null); });

// ---- begin ----

$("model").textContent = about.name + (about.drafts ? " · with drafts" : "") + (about.kept ? "" : " · chats are not kept");
$("version").textContent = about.version;
$("senses").textContent = `${about.name} reads ${new Intl.ListFormat("en").format(about.modalities.map((kind) => ({ image: "pictures", audio: "sound", video: "video" }[kind] ?? kind)))}, on this computer alone. Drop something here, or ask.`;
await open(location.hash.slice(1) || null);
