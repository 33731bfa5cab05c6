// The settings panel: the session's model and system prompt, and how to generate.

import { element, setText } from "./dom.js";

const NUMBERS = ["max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"];
const byId = (id) => document.getElementById(id);

/** Return the generation parameters that are filled in, by their names on the wire. */
export function readParameters() {
  const parameters = {};
  for (const name of NUMBERS) {
    const input = byId(name);
    if (input.value !== "") parameters[name] = input.valueAsNumber;
  }
  const words = byId("stop_words")
    .value.split("\n")
    .filter((word) => word !== "");
  if (words.length) parameters.stop_words = words;
  return parameters;
}

export class Settings {
  #form = byId("settings");
  #model = byId("model");
  #system = byId("system");
  #offered = "";

  /** Called with `{model, system}` when a person changes them. */
  onChange = () => {};

  /** @param {function(string)} showView  Brings a view into sight. */
  constructor(showView) {
    this.showView = showView;
    const changed = () => this.onChange({ model: this.#model.value, system: this.#system.value });
    this.#model.addEventListener("change", changed);
    this.#system.addEventListener("input", changed);
    this.#form.addEventListener("submit", (event) => event.preventDefault());
  }

  /** Return whether every value is allowed; if not, point at the first that is not. */
  check() {
    if (this.#form.checkValidity()) return true;
    this.showView("setup"); // what is not in sight cannot be pointed at
    this.#form.reportValidity();
    return false;
  }

  /** Show a session's model and system prompt among the models on offer. */
  show(models, session) {
    const names = models.map(({ id }) => id);
    if (session.model && !names.includes(session.model)) names.push(session.model); // no longer served
    if (this.#offered !== names.join("\n")) {
      this.#offered = names.join("\n");
      this.#model.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
    }
    if (this.#model.value !== session.model) this.#model.value = session.model;
    if (this.#system.value !== session.system) this.#system.value = session.system;
    const fixed = session.started || session.running;
    this.#model.disabled = fixed || names.length === 0;
    this.#system.readOnly = fixed;
    byId("fixed-hint").hidden = !fixed;
    const length = models.find(({ id }) => id === session.model)?.max_model_len;
    setText(byId("model-hint"), length ? `context ${length.toLocaleString("en")} tokens` : "");
  }
}
