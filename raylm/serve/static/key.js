// The API key: asked for when the server wants one, kept for as long as the browser tab lives.

const STORED = "raylm.key";
const dialog = document.getElementById("key-dialog");
const input = document.getElementById("key");
let asking = null;

/** Return the key, or null when none has been given. */
export function apiKey() {
  return sessionStorage.getItem(STORED);
}

/**
 * Ask for the key. Calls that come while the dialog is open share its answer.
 * @param {string|null} refused  The key that the server did not accept.
 * @returns {Promise<boolean>} Whether there is a key to try.
 */
export function askForKey(refused) {
  if (apiKey() !== refused) return Promise.resolve(true); // given while the refused request was under way
  asking ??= new Promise((resolve) => {
    document.getElementById("key-reason").textContent = refused
      ? "The server did not accept that key."
      : "This server asks for an API key.";
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const given = dialog.returnValue === "use";
        if (given) sessionStorage.setItem(STORED, input.value.trim());
        input.value = "";
        resolve(given);
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
