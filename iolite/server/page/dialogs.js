// What asks before it does something, and the settings of a chat.

import { $ } from "./dom.js";

/** Asks for a yes, or with `value` for a text. Resolves to true or the text, null for no. */
export function ask({ title, text = "", yes, value = null, danger = false }) {
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-field").hidden = value === null;
  $("ask-input").value = value ?? "";
  $("ask-yes").textContent = yes;
  $("ask-yes").classList.toggle("strong-danger", danger);
  $("ask").returnValue = "";
  $("ask").showModal();
  (value === null ? $("ask-yes") : $("ask-input")).focus();
  $("ask-input").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); $("ask").close("yes"); } };
  return new Promise((resolve) => {
    $("ask").addEventListener("close", () => resolve($("ask").returnValue !== "yes" ? null : value === null ? true : $("ask-input").value.trim()), { once: true });
  });
}

const NUMBERS = ["temperature", "top_p", "top_k", "seed", "max_tokens", "thinking_budget"];

export class SettingsDialog {
  /** save(settings) is called with what was chosen. pause: how the end of speech is known, in this browser. */
  constructor(about, save, pause) {
    this.pause = pause;
    this.form = $("settings").querySelector("form");
    for (const name of ["temperature", "top_p", "top_k", "max_tokens"]) this.form.elements[name].placeholder = String(about.defaults[name]);
    this.form.addEventListener("submit", (event) => {
      if (event.submitter?.value !== "save") return;
      const chosen = this.read();
      if (!chosen) { event.preventDefault(); return; }
      pause.set(this.form.elements.hands_free.checked ? Number(this.form.elements.pause.value || pause.usual) : null);
      save(chosen);
    });
    $("settings-speech").hidden = !about.modalities.includes("audio");
    this.form.elements.hands_free.addEventListener("change", () => this.showPause());
    this.form.elements.system.addEventListener("keydown", (event) => event.stopPropagation());
    $("settings").querySelector('[value="close"]').formNoValidate = true;
    $("settings-reset").addEventListener("click", () => this.fill({}, pause.usual));
  }

  open(settings) {
    this.kept = settings;
    this.fill(settings);
    $("settings").showModal();
    this.form.elements.system.focus();
  }

  fill(settings, silence = this.pause.get()) {
    this.form.elements.hands_free.checked = silence !== null;
    this.form.elements.pause.value = silence ?? this.pause.usual;
    this.showPause();
    this.form.elements.system.value = settings.system ?? "";
    for (const name of NUMBERS) this.form.elements[name].value = settings[name] ?? "";
    this.form.elements.tools.value = settings.tools ? JSON.stringify(settings.tools, null, 2) : "";
    this.form.querySelector("details").open = Boolean(settings.tools);
    $("tools-trouble").hidden = true;
  }

  showPause() {
    this.form.elements.pause.disabled = !this.form.elements.hands_free.checked;
  }

  /** The settings, null when the tools are no JSON. */
  read() {
    const chosen = { system: this.form.elements.system.value };
    if (this.kept.thinking !== undefined) chosen.thinking = this.kept.thinking;
    for (const name of NUMBERS) if (this.form.elements[name].value !== "") chosen[name] = Number(this.form.elements[name].value);
    const tools = this.form.elements.tools.value.trim();
    if (!tools) return chosen;
    try {
      chosen.tools = JSON.parse(tools);
      if (!Array.isArray(chosen.tools)) throw new Error("a list is needed: [ … ]");
      return chosen;
    } catch (error) {
      $("tools-trouble").textContent = `This is no JSON list: ${error.message}`;
      $("tools-trouble").hidden = false;
      return null;
    }
  }
}
