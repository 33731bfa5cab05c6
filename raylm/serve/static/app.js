// Starts the page: settings, chat and the cluster's state, which is asked for once a second while the page is in sight.

import { ApiError, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { Settings } from "./settings.js";

const PERIOD = 1000; // milliseconds between two questions for the state
const MAX_PERIOD = 5000; // the same, while they fail
const TIMEOUT = 5000; // how long one may take

const root = document.documentElement;

function showView(view) {
  root.dataset.view = view;
  for (const button of document.querySelectorAll(".views button")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
}

function bindViews() {
  for (const button of document.querySelectorAll(".views button")) {
    button.addEventListener("click", () => showView(button.dataset.view));
  }
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    showView("chat");
    document.getElementById("message").focus();
  });
}

function bindTheme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    localStorage.setItem("raylm.theme", root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}

/** Return a promise of the page being in sight. */
function visible() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", function check() {
      if (document.hidden) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    });
  });
}

function sleep(milliseconds) {
  return new Promise((resolve) => {
    setTimeout(resolve, Math.max(0, milliseconds));
  });
}

/** Keep the cluster's panel, and what the chat knows of models, up to date for as long as the page is open. */
async function watchState(chat, cluster) {
  let known = null;
  let ask = true;
  let period = PERIOD;
  for (;;) {
    await visible();
    const askedAt = performance.now();
    try {
      const state = await getJson("state", { ask, signal: ask ? undefined : AbortSignal.timeout(TIMEOUT) });
      // A model's context length is known once a slot of it is up.
      const present = JSON.stringify(
        state.models.map(({ name, slots }) => [name, slots.some(({ capacity }) => capacity > 0)]),
      );
      if (present !== known) {
        chat.showModels((await getJson("v1/models", { signal: AbortSignal.timeout(TIMEOUT) })).data);
        known = present;
      }
      cluster.show(state, performance.now());
      chat.showState(state);
      period = PERIOD;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      cluster.fail(error);
      chat.showState(null);
      period = Math.min(period * 1.5, MAX_PERIOD);
    }
    ask = false; // a person who has closed the dialog is not asked again by a timer
    await sleep(period - (performance.now() - askedAt));
  }
}

bindViews();
bindTheme();
const settings = new Settings(showView);
const chat = new Chat(settings);
const cluster = new Cluster();
document.getElementById("message").focus();
watchState(chat, cluster);
