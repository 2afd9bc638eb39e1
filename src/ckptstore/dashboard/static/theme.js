// Runs before the first paint, so that the chosen theme never flashes.
"use strict";
try {
  const chosen = localStorage.getItem("ckptstore-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch { /* storage is off: the system's theme it is */ }
