// One answer in a conversation: its text as it grows, its receipt, and what went wrong.

import { renderBlocks } from "./blocks.js";
import { element, setText } from "./dom.js";
import { adviceFor, moveOf, receiptItems, titleOf } from "./receipt.js";

export class Answer {
  #text = "";
  #shown = "";
  #numTokens = 0;
  #askedAt = performance.now();
  #firstAt = null;
  #frame = 0;
  #onGrow;
  #body = element("div", { class: "text" });
  #footer = element("p", { class: "receipt" });
  #speaker;

  /**
   * @param {string} model
   * @param {function()} onGrow  Called after the answer has become taller.
   */
  constructor(model, onGrow) {
    this.#onGrow = onGrow;
    this.#speaker = element("h3", {}, model || "model");
    this.element = element(
      "article",
      { class: "answer", "aria-busy": "true" },
      this.#speaker,
      this.#body,
      this.#footer,
    );
    this.#footer.append(element("span", { class: "waiting" }, "waiting for the first token"));
  }

  get text() {
    return this.#text;
  }

  /** Show all of the text so far. Painted at most once a frame. */
  progress(text, numTokens) {
    this.#firstAt ??= performance.now();
    this.#text = text;
    this.#numTokens = numTokens;
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /** Show the receipt of a finished answer. */
  finish(text, receipt, { stopped = false } = {}) {
    this.#text = text;
    this.#end();
    const move = moveOf(receipt);
    if (move) this.note("moved", move);
    if (text.trim() === "") this.#body.append(element("p", { class: "hint" }, "The answer is empty."));
    const seconds = (performance.now() - (this.#firstAt ?? this.#askedAt)) / 1000;
    const later = receipt.usage.completion_tokens - 1; // the first token's time is the prompt's
    const timing = {
      firstTokenMs: this.#firstAt === null ? null : this.#firstAt - this.#askedAt,
      tokensPerSecond: later > 0 && seconds > 0.05 ? later / seconds : null,
    };
    setText(this.#speaker, receipt.model);
    this.#footer.replaceChildren(
      ...(stopped ? [element("span", {}, "stopped")] : []),
      ...receiptItems(receipt, timing),
    );
    this.#addCopy();
    this.#onGrow();
  }

  /** Show an answer that was given before, without its receipt. */
  recall(text) {
    this.#text = text;
    this.#end();
    this.#footer.replaceChildren(element("span", {}, "from the transcript"));
    this.#addCopy();
  }

  /** Say that the answer was stopped before its end. What had come stays. */
  stop() {
    this.#end();
    this.#footer.replaceChildren(
      element("span", {}, `stopped after ${this.#numTokens} tokens`),
      element("span", {}, "not part of the session"),
    );
    this.#onGrow();
  }

  /**
   * Say why there is no answer, or only a part of one. What had come stays.
   * @param {string} title
   * @param {string} message
   * @param {{advice?: string, actions?: Array<{label: string, act: function()}>, kind?: string}} options
   */
  fail(title, message, { advice = "", actions = [], kind = "error" } = {}) {
    this.#end();
    this.#footer.replaceChildren(
      ...(this.#text ? [element("span", {}, `${this.#numTokens} tokens came`)] : []),
      element("span", {}, "not part of the session"),
    );
    this.note(kind, title, message, advice, actions);
    this.#onGrow();
  }

  /** Show a raylm error. */
  failWith(error, actions) {
    this.fail(titleOf(error), error.message, { advice: adviceFor(error), actions });
  }

  note(kind, title, message = "", advice = "", actions = []) {
    const note = element("div", { class: `note ${kind}` }, element("p", {}, element("strong", {}, title)));
    if (message) note.append(element("p", {}, message));
    if (advice) note.append(element("p", { class: "next" }, advice));
    if (actions.length) {
      const buttons = actions.map(({ label, act }) => element("button", { type: "button", click: act }, label));
      note.append(element("p", { class: "actions" }, ...buttons));
    }
    this.#footer.before(note);
  }

  /** Take the buttons away: a later message has gone past this one. */
  settle() {
    this.element.querySelector(".note .actions")?.remove();
  }

  #paint() {
    this.#frame = 0;
    if (this.#shown !== this.#text) {
      this.#shown = this.#text;
      renderBlocks(this.#body, this.#text);
    }
    if (this.element.hasAttribute("aria-busy")) {
      const seconds = (performance.now() - this.#firstAt) / 1000;
      const rate = this.#numTokens > 1 && seconds > 0.2 ? `${((this.#numTokens - 1) / seconds).toFixed(1)} tok/s` : "";
      if (this.#footer.children.length !== 2) this.#footer.replaceChildren(element("span"), element("span"));
      setText(this.#footer.firstElementChild, `${this.#numTokens} tokens`);
      setText(this.#footer.lastElementChild, rate);
    }
    this.#onGrow();
  }

  #end() {
    cancelAnimationFrame(this.#frame);
    this.element.removeAttribute("aria-busy");
    this.#paint();
  }

  #addCopy() {
    if (!navigator.clipboard || !this.#text) return; // there is none on an insecure origin
    const button = element("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(this.#text);
        setText(button, "Copied");
      } catch {
        setText(button, "Not allowed"); // the browser refused
      }
      setTimeout(() => setText(button, "Copy"), 1500);
    });
    this.#footer.append(button);
  }
}
