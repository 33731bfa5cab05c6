// The chat: the sessions of this browser tab, and the box to write in.

import { element, reconcile, setText } from "./dom.js";
import { adviceFor } from "./receipt.js";
import { Session } from "./session.js";
import { readParameters } from "./settings.js";
import { newId } from "./api.js";

const STORED = "raylm.sessions";
const byId = (id) => document.getElementById(id);

export class Chat {
  #sessions = [];
  #current = null;
  #number = 0;
  #models = [];
  #state = null;
  #away = false;
  #tabs = new Map();
  #message = byId("message");
  #settings;

  /** @param {import("./settings.js").Settings} settings */
  constructor(settings) {
    this.#settings = settings;
    settings.onChange = ({ model, system }) => {
      Object.assign(this.#current, { model, system });
      this.#show();
    };
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#message.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    this.#message.addEventListener("input", () => this.#show());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      if (!document.querySelector("dialog[open]")) this.#current.stop();
    });
    byId("stop").addEventListener("click", () => {
      this.#current.stop();
      this.#message.focus();
    });
    byId("latest").addEventListener("click", () => {
      this.#current.follow();
      this.#message.focus();
    });
    byId("new-session").addEventListener("click", () => {
      this.#select(this.#add());
      this.#message.focus();
    });
    byId("fork-session").addEventListener("click", () => this.#fork());
    byId("end-session").addEventListener("click", () => this.#end());
    this.#restore();
  }

  /** Open the sessions that this tab had before it was loaded again, or a new one. */
  #restore() {
    const stored = JSON.parse(sessionStorage.getItem(STORED) ?? "[]");
    const sessions = stored.map((session) => this.#add(session));
    this.#select(sessions[stored.findIndex(({ current }) => current)] ?? sessions[0] ?? this.#add());
    for (const session of sessions) {
      session.restore().catch((error) => {
        if (error.status === 404)
          this.#remove(session); // ended or expired meanwhile
        else session.remark(`This session could not be loaded. ${error.message} ${adviceFor(error)}`);
      });
    }
  }

  /** Offer these models: the `data` of GET /v1/models. */
  showModels(models) {
    this.#models = models;
    const [first] = models;
    for (const session of this.#sessions) {
      if (!session.started && !models.some(({ id }) => id === session.model)) session.model = first?.id ?? "";
    }
    this.#show();
  }

  /** Take up the cluster's state, or null when the server cannot be reached. */
  showState(state) {
    this.#state = state;
    this.#away = state === null;
    this.#showAdvice();
  }

  #add({
    id = newId(),
    number = this.#number + 1,
    model = this.#current?.model ?? this.#models[0]?.id ?? "",
  } = {}) {
    this.#number = Math.max(this.#number, number);
    const session = new Session({
      id,
      number,
      model,
      system: this.#current?.system ?? "",
      parameters: readParameters,
      onChange: () => this.#show(),
      announce: (text) => {
        if (session === this.#current) byId("announcer").textContent = text;
      },
      onRestart: (text) => {
        const next = this.#add();
        this.#select(next);
        next.send(text);
        this.#message.focus();
      },
      onRetry: () => this.#message.focus(),
    });
    this.#sessions.push(session);
    byId("latest").before(session.log);
    return session;
  }

  #remove(session) {
    const index = this.#sessions.indexOf(session);
    this.#sessions.splice(index, 1);
    session.log.remove();
    if (session === this.#current) this.#select(this.#sessions[Math.max(0, index - 1)] ?? this.#add());
    this.#show();
  }

  #select(session) {
    this.#current = session;
    for (const { log } of this.#sessions) log.hidden = log !== session.log;
    session.grown();
    this.#show();
    this.#tabs.get(session.id).element.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  #submit() {
    const text = this.#message.value;
    if (!this.#maySend(text) || !this.#settings.check()) return;
    this.#message.value = "";
    this.#current.send(text);
  }

  #maySend(text) {
    return text.trim() !== "" && this.#models.length > 0 && !this.#current.busy && !this.#current.ended;
  }

  async #fork() {
    const source = this.#current;
    const copy = this.#add();
    try {
      await source.fork(copy);
    } catch (error) {
      this.#remove(copy);
      source.remark(`The session could not be forked. ${error.message} ${adviceFor(error)}`);
      return;
    }
    if (this.#current === source) this.#select(copy);
    this.#message.focus();
  }

  async #end() {
    const session = this.#current;
    if (session.ended || !session.started) {
      await session.stop();
      this.#remove(session);
      this.#message.focus();
      return;
    }
    try {
      await session.end();
    } catch (error) {
      session.remark(`The session could not be ended. ${error.message} ${adviceFor(error)}`);
    }
  }

  #show() {
    const session = this.#current;
    if (session === null) return;
    reconcile(
      byId("sessions"),
      this.#sessions,
      ({ id }) => id,
      (one) => this.#tab(one),
      this.#tabs,
    );
    const focused = document.activeElement;
    byId("logs").classList.toggle("blank", session.empty);
    byId("latest").hidden = session.following;
    byId("stop").hidden = !session.running;
    byId("send").hidden = session.running;
    byId("send").disabled = !this.#maySend(this.#message.value);
    this.#message.disabled = session.ended;
    if (focused.hidden || focused.disabled) (session.ended ? byId("new-session") : this.#message).focus();
    byId("fork-session").disabled = !session.started || session.ended || session.busy;
    const onlyAndEmpty = this.#sessions.length === 1 && session.empty;
    byId("end-session").disabled = onlyAndEmpty;
    setText(byId("end-session"), session.ended || !session.started ? "Close" : "End");
    this.#settings.show(this.#models, session);
    this.#showAdvice();
    const open = this.#sessions.filter(({ started, ended }) => started && !ended);
    const stored = open.map(({ id, number, model }) => ({ id, number, model, current: id === session.id }));
    sessionStorage.setItem(STORED, JSON.stringify(stored));
  }

  #tab(session) {
    const label = element("span", { class: "title" });
    const button = element(
      "button",
      {
        type: "button",
        click: () => {
          this.#select(session);
          this.#message.focus();
        },
      },
      element("b", {}, String(session.number)),
      " ",
      label,
    );
    return {
      element: element("li", {}, button),
      show: (one) => {
        setText(label, one.title || "new session");
        button.title = one.title;
        button.classList.toggle("running", one.running);
        button.classList.toggle("ended", one.ended);
        button.setAttribute("aria-description", one.ended ? "ended" : one.running ? "answering" : "");
        if (one === this.#current) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
      },
    };
  }

  #showAdvice() {
    setText(byId("advice"), this.#advice());
  }

  #advice() {
    const session = this.#current;
    if (session.ended) return "This session has ended. Close it, or begin a new one.";
    if (this.#away && this.#models.length === 0) return "Nothing can be sent yet: see Cluster.";
    if (this.#state === null) return "";
    if (this.#models.length === 0) return "There is no model to talk to.";
    const model = this.#state.models.find(({ name }) => name === session.model);
    if (!model) return "";
    if (model.problem) return ""; // nothing is known of its actors
    if (model.slots.length === 0) return `${model.name} has no actor at present. A message waits until it has one.`;
    if (model.slots.some(({ state }) => state === "up" || state === "suspected")) return "";
    if (model.slots.every(({ state }) => state === "failed"))
      return `Every slot of ${model.name} has failed: see Cluster.`;
    return `No slot of ${model.name} is up. A message waits until one is.`;
  }
}
