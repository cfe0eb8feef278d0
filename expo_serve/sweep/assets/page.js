"use strict";

// Theme: as the system has it, unless one was chosen; remembered where the browser lets pages of this address do so.

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

function remembered(theme) {
  try {
    if (theme === undefined) return localStorage.getItem("expo-serve-theme") || "";
    localStorage.setItem("expo-serve-theme", theme);
  } catch {
    // A page from a file may have no storage.
  }
  return theme || "";
}

function startTheme() {
  const choice = document.querySelector(".theme");
  choice.hidden = false;
  const theme = remembered();
  setTheme(theme);
  for (const input of choice.querySelectorAll("input")) {
    input.checked = input.value === theme;
    input.addEventListener("change", () => setTheme(remembered(input.value)));
  }
}

// Copy buttons.

async function copyText(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(element);
    return document.execCommand("copy");
  }
}

function startCopying() {
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", async () => {
      const element = document.getElementById(button.dataset.copy);
      const done = await copyText(element.textContent, element);
      button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
      document.getElementById("copied").textContent = button.textContent;
      setTimeout(() => { button.textContent = "Copy"; }, 2500);
    });
  }
}
