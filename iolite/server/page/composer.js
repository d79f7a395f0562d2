// The message box: text that grows, files with their costs.

import { $, el, icon, iconButton, number, say, seconds } from "./dom.js";
import { fileLink, upload } from "./api.js";

const KINDS = { image: "image/*", audio: "audio/*", video: "video/*" };
const TEXTS = ".txt,.md,.csv,.tsv,.json,.yaml,.toml,.xml,.html,.css,.js,.ts,.py,.c,.h,.cpp,.rs,.go,.java,.sh,.sql,.log,.tex,.pdf";

export class Composer {
  /** submit({text, files}) sends; it is called only with something to send. */
  constructor(about, submit) {
    this.about = about;
    this.submit = submit;
    this.files = [];
    this.busy = false;
    this.text = $("text");
    this.text.addEventListener("input", () => this.changed());
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    $("trouble").querySelector("button").addEventListener("click", () => this.trouble(null));
    this.takeFiles();
    this.changed();
  }

  takeFiles() {
    const kinds = this.about.modalities.map((kind) => KINDS[kind]).filter(Boolean);
    $("picker").accept = [...kinds, TEXTS].join(",");
    $("attach").addEventListener("click", () => $("picker").click());
    $("picker").addEventListener("change", () => { this.attach($("picker").files); $("picker").value = ""; });
    this.text.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) {
        event.preventDefault();
        this.attach(event.clipboardData.files);
      }
    });
    let depth = 0;
    const carries = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => { if (carries(event)) { depth += 1; $("drop").hidden = false; } });
    addEventListener("dragleave", (event) => { if (carries(event) && --depth <= 0) { depth = 0; $("drop").hidden = true; } });
    addEventListener("dragover", (event) => { if (carries(event)) event.preventDefault(); });
    addEventListener("drop", (event) => {
      if (!carries(event)) return;
      event.preventDefault();
      depth = 0;
      $("drop").hidden = true;
      this.attach(event.dataTransfer.files);
    });
  }

  async attach(list) {
    await Promise.all([...list].map((file) => {
      const entry = { name: file.name || "picture", kind: file.type.split("/")[0], stop: new AbortController() };
      this.files.push(entry);
      return this.read(entry, file);
    }));
    this.text.focus();
  }

  async read(entry, file) {
    Object.assign(entry, { state: "busy", again: null });
    this.changed();
    try {
      Object.assign(entry, await upload(file, entry.stop.signal), { state: "here" });
      const looked = entry.kind === "image" || (entry.kind === "document" && entry.info.tokens === null);
      entry.tokens = looked ? this.about.budget : null;
      say(`${entry.name} attached, ${number(price(entry))} tokens`);
    } catch (error) {
      Object.assign(entry, { state: "bad", why: error.message });
      // Nobody has looked at it yet.
      if (error.status === 0 || error.status === 429) entry.again = () => this.read(entry, file);
      if (error.name !== "AbortError") say(`${entry.name}: ${error.message}`);
    }
    this.changed();
  }

  send() {
    if (!this.ready) return;
    this.trouble(null);
    this.submit(this.message);
  }

  /** What there is to be sent. */
  get message() {
    return { text: this.text.value, files: this.files.filter((file) => file.state === "here") };
  }

  /** A message has been sent: what came meanwhile stays. */
  taken({ files }) {
    this.text.value = "";
    this.files = this.files.filter((file) => !files.includes(file));
    this.changed();
  }

  /** While somebody speaks, what is written belongs to the message that is spoken, and stays as it is. */
  setListening(on) {
    $("composer").classList.toggle("listening", on);
    this.text.readOnly = $("files").inert = on;
    if (!on && matchMedia("(hover: hover)").matches) this.text.focus();
  }

  get ready() {
    const waiting = this.files.some((file) => file.state === "busy");
    return !this.busy && !this.text.readOnly && !waiting && (this.text.value.trim() !== "" || this.files.some((file) => file.state === "here"));
  }

  set(text, files = []) {
    this.text.value = text;
    this.files = files.map((file) => ({ ...file, state: "here" }));
    this.changed();
  }

  setBusy(busy) {
    this.busy = busy;
    $("send").hidden = busy;
    $("stop").hidden = !busy;
    this.changed();
  }

  trouble(message) {
    $("trouble").hidden = !message;
    $("trouble").querySelector("p").textContent = message ?? "";
  }

  changed() {
    this.text.style.height = "auto";
    this.text.style.height = `${this.text.scrollHeight}px`;
    $("send").disabled = !this.ready;
    $("files").replaceChildren(...this.files.map((file) => this.chip(file)));
    const here = this.files.filter((file) => file.state === "here");
    const sum = here.reduce((total, file) => total + price(file), 0);
    $("cost").textContent = here.length ? `+ ${number(sum)} of ${number(this.about.context)} tokens` : "";
  }

  chip(file) {
    const picture = file.kind === "image" && file.state === "here" ? el("img", { src: fileLink(file.file), alt: "" }) : icon({ audio: "sound", video: "film" }[file.kind] ?? "file");
    const below = file.state === "busy" ? "Reading …" : file.state === "bad" ? file.why : this.details(file);
    const again = file.again && iconButton("again", `Attach ${file.name} again`, file.again);
    const drop = iconButton("close", `Remove ${file.name}`, () => {
      file.stop?.abort();
      this.files = this.files.filter((other) => other !== file);
      this.changed();
      this.text.focus();
    });
    return el("li", { class: file.state }, picture, el("span", {}, el("span", { class: "name", title: file.name }, file.name), el("span", { class: "price" }, below)), again, drop);
  }

  /** What a file costs; of a picture and a PDF, a choice of how much the model sees. */
  details(file) {
    if (file.kind === "image") {
      return this.choice(file, `Detail of ${file.name}`, Object.entries(file.info.costs).map(([budget, tokens]) =>
        [budget, `Detail: ${number(tokens)} token${tokens === 1 ? "" : "s"}`]));
    }
    if (file.kind === "document") {
      const { pages, pictures, costs } = file.info;
      const seen = pictures ? `, ${number(pictures)} page${pictures === 1 ? "" : "s"} as picture${pictures === 1 ? "" : "s"}` : "";
      const text = file.info.tokens === null ? [] : [["", `Text${seen} · ${number(file.info.tokens)} tokens`]];
      return this.choice(file, `How ${file.name} is read`, [...text, ...Object.entries(costs).map(([budget, tokens]) =>
        [budget, `Pages as pictures · ${number(pages)} × ${number(Math.round(tokens / pages))} tokens`])]);
    }
    const tokens = `${number(file.info.tokens)} tokens`;
    if (file.kind === "audio") {
      const long = file.info.seconds > file.info.longest ? `; more than the ${seconds(file.info.longest)} that the model was made for` : "";
      return `${seconds(file.info.seconds)} · ${tokens}${long}`;
    }
    // A PDF of a chat that an earlier version kept.
    return file.info.pages ? `${number(file.info.pages)} page${file.info.pages === 1 ? "" : "s"} · ${tokens}` : tokens;
  }

  /** options: [tokens that it may become, "" for none, and words] */
  choice(file, label, options) {
    const choose = (event) => {
      file.tokens = event.target.value ? Number(event.target.value) : null;
      this.changed();
      [...$("files").querySelectorAll("select")].find((select) => select.ariaLabel === label)?.focus();  // it was made anew
    };
    return el("select", { "aria-label": label, onchange: choose }, ...options.map(([value, words]) =>
      el("option", { value, selected: value === String(file.tokens ?? "") }, words)));
  }
}

const price = (file) => {
  const { costs, tokens } = file.info;
  return file.kind === "image" || file.tokens ? costs[file.tokens] ?? Math.max(...Object.values(costs)) : tokens;
};
