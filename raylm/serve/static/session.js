// One session: a conversation that the server remembers. A turn that does not reach its end leaves no trace in it.

import { Answer } from "./answer.js";
import { cancelRequest, endSession, forkSession, loadSession, newId, streamChat } from "./api.js";
import { element } from "./dom.js";

/** How long a cancelled stream may take to end by itself before the connection is closed, in milliseconds. */
const STOP_GRACE = 2000;

export class Session {
  /** The turn that is running: `{requestId, controller, stopped}`, or null. */
  #turn = null;
  #following = true;
  #loading = false;
  #lastAnswer = null;

  /**
   * @param {object} options
   * @param {string} options.id
   * @param {number} options.number  What the tab calls it.
   * @param {string} options.model
   * @param {string} options.system  The system prompt.
   * @param {function(): object} options.parameters  Returns the generation parameters of the next turn.
   * @param {function(Session)} options.onChange  Called when a turn begins or ends, or the log is scrolled.
   * @param {function(string)} options.announce  Tells a screen reader.
   * @param {function(string)} options.onRestart  Sends a message in a new session.
   * @param {function()} options.onRetry  Called when a message is sent again, and the button for it is gone.
   */
  constructor({ id = newId(), number, model, system, parameters, onChange, announce, onRestart, onRetry }) {
    Object.assign(this, { id, number, model, system });
    this.title = "";
    this.started = false; // the server has a transcript
    this.ended = false;
    this.#parameters = parameters;
    this.#onChange = onChange;
    this.#announce = announce;
    this.#onRestart = onRestart;
    this.#onRetry = onRetry;
    this.log = element("div", {
      class: "log",
      role: "log",
      "aria-live": "off", // the announcer says when an answer is complete
      "aria-label": `Conversation ${number}`,
      tabindex: "0",
      hidden: true,
      scroll: () => this.#scrolled(),
    });
  }

  #parameters;
  #onChange;
  #announce;
  #onRestart;
  #onRetry;

  get running() {
    return this.#turn !== null;
  }

  /** Whether a message has to wait: for a turn, or for the transcript to be loaded. */
  get busy() {
    return this.running || this.#loading;
  }

  get following() {
    return this.#following;
  }

  get empty() {
    return this.log.childElementCount === 0;
  }

  /** Scroll to the end and stay there. */
  follow() {
    const changed = !this.#following;
    this.#following = true;
    this.grown();
    if (changed) this.#onChange(this);
  }

  /** Keep the end in view, unless the reader has scrolled away from it. */
  grown() {
    if (this.#following) this.log.scrollTop = this.log.scrollHeight;
  }

  #scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    if (clientHeight === 0) return; // hidden
    const following = scrollHeight - scrollTop - clientHeight < 32;
    if (following === this.#following) return;
    this.#following = following;
    this.#onChange(this);
  }

  /** Send a message and stream its answer. */
  async send(text) {
    this.title ||= text.trim().split("\n")[0].slice(0, 60);
    this.#question(text);
    await this.#answer(text);
  }

  /** Stop the running answer: in the engine first, then the connection. */
  async stop() {
    const turn = this.#turn;
    if (turn === null || turn.stopped) return;
    turn.stopped = true;
    this.#onChange(this);
    const grace = setTimeout(() => turn.controller.abort(), STOP_GRACE);
    try {
      await cancelRequest(turn.requestId);
    } catch {
      turn.controller.abort(); // the server aborts what its client leaves
    }
    await turn.over;
    clearTimeout(grace);
  }

  async end() {
    await this.stop();
    if (this.started) await endSession(this.id, this.model);
    this.#close("Session ended. The server has forgotten it.");
  }

  /** Copy the transcript into `copy`, which goes its own way from here. */
  async fork(copy) {
    await forkSession(this.id, copy.id, this.model);
    await copy.restore();
    copy.remark(`Copy of session ${this.number}`);
  }

  /** Show the transcript that the server has. */
  async restore() {
    this.started = true;
    this.#loading = true;
    this.#onChange(this);
    try {
      this.#recall(await loadSession(this.id, this.model));
    } finally {
      this.#loading = false;
      this.#onChange(this);
    }
  }

  #recall({ messages, model }) {
    this.model = model;
    for (const { role, content } of messages) {
      if (role === "system") this.system = content;
      else if (role === "assistant") {
        const answer = new Answer(model, () => this.grown());
        this.log.append(answer.element);
        answer.recall(content);
      } else {
        this.title ||= content.trim().split("\n")[0].slice(0, 60);
        this.#question(content);
      }
    }
  }

  /** Write a line into the log that neither side said. */
  remark(text) {
    this.log.append(element("p", { class: "remark" }, text));
    this.grown();
  }

  #question(text) {
    this.#lastAnswer?.settle();
    this.log.append(
      element("article", { class: "question" }, element("h3", {}, "You"), element("p", { class: "text" }, text)),
    );
    this.follow();
  }

  #close(reason) {
    this.ended = true;
    this.remark(reason);
    this.#onChange(this);
  }

  #again(text) {
    this.#answer(text);
    this.#onRetry();
  }

  async #answer(text) {
    const answer = new Answer(this.model, () => this.grown());
    this.#lastAnswer?.settle();
    this.#lastAnswer = answer;
    this.log.append(answer.element);
    this.follow();
    let over;
    const turn = { requestId: newId(), controller: new AbortController(), stopped: false };
    turn.over = new Promise((resolve) => {
      over = resolve;
    });
    this.#turn = turn;
    this.#announce("Answering");
    this.#onChange(this);
    try {
      const last = await this.#stream(text, turn, answer);
      this.#conclude(last, turn, answer, text);
    } catch (error) {
      if (turn.stopped) {
        answer.stop();
        this.#announce("Stopped");
      } else {
        const again = { label: "Try again", act: () => this.#again(text) };
        answer.failWith(error, error.type === "PoisonRequestError" ? [] : [again]);
        this.#announce(`The answer failed: ${error.message}`);
      }
    } finally {
      this.#turn = null;
      over();
      this.#onChange(this);
    }
  }

  async #stream(text, turn, answer) {
    const user = { role: "user", content: text };
    const first = !this.started;
    const body = {
      ...(this.model ? { model: this.model } : {}),
      inputs: first && this.system.trim() ? [{ role: "system", content: this.system }, user] : text,
      session_id: this.id,
      request_id: turn.requestId,
      sequence_start: first,
      sequence_end: false,
      ...this.#parameters(),
    };
    let last = null;
    for await (last of streamChat(body, turn.controller.signal)) {
      if (last.status === 1) answer.progress(last.text, last.n_tokens);
    }
    return last;
  }

  #conclude({ status, text: whole, receipt }, turn, answer, text) {
    const restart = [{ label: "Send in a new session", act: () => this.#onRestart(text) }];
    switch (status) {
      case 0:
        this.started = true;
        answer.finish(whole, receipt, turn);
        this.#announce(`${turn.stopped ? "Stopped" : "Answer"}: ${whole}`);
        break;
      case -2:
        answer.fail("The session is closed", "The server has ended it, or forgotten it because it was idle.", {
          advice: "What was said here stays on this page, but the model no longer knows it.",
          actions: restart,
          kind: "closed",
        });
        this.#close("Session closed by the server.");
        this.#announce("The session is closed");
        break;
      case -3:
        answer.fail("The conversation is too long", "With this message it no longer fits into the model's context.", {
          advice: "The session is as it was before: send something shorter, or go on in a new session.",
          actions: restart,
          kind: "closed",
        });
        this.#announce("The conversation is too long for the model");
        break;
      default:
        answer.fail(`Status ${status}`, whole || "The server gave no reason.", { actions: restart });
        this.#announce(`The answer failed with status ${status}`);
    }
  }
}
