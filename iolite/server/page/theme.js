// Before anything is painted: light or dark, if somebody has chosen; otherwise the system's.
"use strict";
const chosen = localStorage.getItem("theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
