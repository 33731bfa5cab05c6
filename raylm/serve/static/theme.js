// Applies the theme that was chosen here before; without one the system's holds. Runs before the first paint.
"use strict";

(() => {
  const chosen = localStorage.getItem("raylm.theme");
  if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
})();
