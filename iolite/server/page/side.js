// The list of chats, its search, and the colours.

import { $, el, icon, say } from "./dom.js";
import * as api from "./api.js";

export class Side {
  /** open(id) shows a chat. */
  constructor(open) {
    this.open = open;
    this.current = null;
    let timer;
    $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => this.refresh(), 150); });
    $("search").addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown") { event.preventDefault(); $("chats").querySelector("button")?.focus(); }
      if (event.key === "Escape" && $("search").value) { event.stopPropagation(); $("search").value = ""; this.refresh(); }
    });
    $("chats").addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = [...$("chats").querySelectorAll("button")];
      (all[all.indexOf(document.activeElement) + step] ?? $("search")).focus();
    });
    $("side-open").addEventListener("click", () => this.slide(true));
    $("side-close").addEventListener("click", () => this.slide(false));
    $("shade").addEventListener("click", () => this.slide(false));
    $("theme").addEventListener("click", () => this.recolour());
    this.showTheme();
  }

  slide(open) {
    $("side").classList.toggle("open", open);
    $("shade").hidden = !open;
    if (open) $("search").focus({ preventScroll: true });
  }

  async refresh() {
    const words = $("search").value;
    const chats = await api.chats(words);
    if (words !== $("search").value) return;  // a later answer is on its way
    const parts = [];
    let day = null;
    for (const chat of chats) {
      if (dayOf(chat.changed) !== day) parts.push(el("h2", {}, (day = dayOf(chat.changed))));
      parts.push(el("button", { type: "button", "data-id": chat.id, "aria-current": chat.id === this.current && "page", onclick: () => { this.slide(false); this.open(chat.id); } },
        el("span", {}, chat.title || "Untitled"), chat.found && chat.found !== chat.title && el("span", { class: "found" }, chat.found)));
    }
    if (!chats.length) parts.push(el("p", { class: "none quiet" }, words.trim() ? "No chat has these words." : "Chats appear here."));
    const focused = $("chats").contains(document.activeElement) && document.activeElement.dataset.id;
    $("chats").replaceChildren(...parts);
    if (focused) parts.find((part) => part.dataset.id === focused)?.focus();
    if (words.trim()) say(`${chats.length} chats found`);
  }

  recolour() {
    const next = { system: "light", light: "dark", dark: "system" }[theme()];
    if (next === "system") { localStorage.removeItem("theme"); delete document.documentElement.dataset.theme; }
    else { localStorage.setItem("theme", next); document.documentElement.dataset.theme = next; }
    this.showTheme();
    say($("theme").getAttribute("aria-label"));
  }

  showTheme() {
    const label = { system: "Colours: as the system", light: "Colours: light", dark: "Colours: dark" }[theme()];
    $("theme").setAttribute("aria-label", label);
    $("theme").title = label;
    $("theme").replaceChildren(icon(theme()));
  }
}

const theme = () => document.documentElement.dataset.theme ?? "system";

function dayOf(time) {
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time * 1000).setHours(0, 0, 0, 0)) / 86400000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  if (days < 7) return "This week";
  return new Date(time * 1000).toLocaleDateString("en", { month: "long", year: "numeric" });
}
