// Elements, icons, and the one place where a string becomes part of the document.

export const $ = (id) => document.getElementById(id);

/** An element. Attributes that begin with "on" are listeners; true is an empty attribute, false and null are none. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "muted") made[name] = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export const iconButton = (name, label, onclick, more = {}) =>
  el("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...more }, icon(name));

const policy = window.trustedTypes?.createPolicy("iolite", { createHTML: (html) => html }) ?? { createHTML: (html) => html };

/** HTML that the server has made and cleaned, as a fragment. */
export function fragment(html) {
  const template = document.createElement("template");
  template.innerHTML = policy.createHTML(html);
  return template.content;
}

/** Tells screen readers, and nobody else. */
export function say(text) {
  $("say").textContent = "";
  requestAnimationFrame(() => { $("say").textContent = text; });
}

export const number = (value) => value.toLocaleString("en");

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  return value < 60 ? `${Math.round(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}
