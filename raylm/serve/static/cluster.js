// The live state of the cluster: models, their slots, their rates and their latest failures.

import { Chart, NUM_TINTS } from "./chart.js";
import { element, reconcile, setText } from "./dom.js";
import { apiKey, askForKey } from "./key.js";
import { Rates } from "./rates.js";

const COUNTS = [
  ["running", "num_running"],
  ["waiting", "num_waiting"],
  ["sessions", "num_sessions"],
  ["clients", "num_clients"],
  ["finished", "num_finished"],
  ["failed", "num_failed"],
  ["aborted", "num_aborted"],
  ["moved", "num_moved"],
];

/** How many failures are listed. */
const MAX_FAILURES = 6;

const format = new Intl.NumberFormat("en");

/** The simulated engine gives a clock as its device (raylm/engines/simulated.py). */
function isSimulated(slot) {
  return slot.device === "clock";
}

class SlotView {
  #state = element("span", { class: "state" });
  #device = element("span", { class: "device" });
  #rate = element("span", { class: "rate" });
  #load = element("progress", { max: "1", value: "0" });
  #numbers = element("span", { class: "numbers" });
  #place = element("span");
  #deaths = element("span", { class: "deaths" });
  #detail = element("p", { class: "detail" });
  #swatch = element("i", { class: "swatch" });

  constructor({ slot }) {
    this.#load.setAttribute("aria-label", `Load of slot ${slot}`);
    this.element = element(
      "li",
      { class: "slot" },
      element(
        "p",
        { class: "head" },
        this.#swatch,
        element("b", {}, String(slot)),
        this.#state,
        this.#device,
        this.#rate,
      ),
      element("p", { class: "load" }, this.#load, this.#numbers),
      element("p", { class: "place" }, this.#place, this.#deaths),
      this.#detail,
    );
  }

  show({ slot, tint, rate }) {
    this.element.dataset.state = slot.state;
    this.#swatch.className = `swatch tint-${tint}`;
    setText(this.#state, slot.state);
    setText(this.#device, isSimulated(slot) ? "simulated" : slot.device);
    this.#device.title = isSimulated(slot) ? "A clock, not a model" : slot.device;
    this.#device.classList.toggle("simulated", isSimulated(slot));
    setText(this.#detail, slot.detail ?? "");
    this.#detail.hidden = !slot.detail;
    setText(this.#rate, `${rate.toFixed(1)} tok/s`);
    this.#load.max = Math.max(1, slot.capacity);
    this.#load.value = slot.num_running;
    const cache = slot.engine?.cache_usage;
    const started = slot.capacity > 0; // what it will be able to do is not known before
    this.#load.parentElement.hidden = !started;
    const numbers = [
      `${slot.num_running}/${slot.capacity} running`,
      `${format.format(slot.outstanding_tokens)} tokens due`,
      ...(cache == null ? [] : [`cache ${Math.round(cache * 100)}%`]),
    ];
    setText(this.#numbers, numbers.join(" \u00b7 "));
    const place = [
      slot.node,
      slot.gpus.length ? `GPU ${slot.gpus.join(", ")}` : "",
      slot.actor ? `actor ${slot.actor.slice(0, 8)}` : "",
      slot.pid ? `pid ${slot.pid}` : "",
    ];
    setText(this.#place, place.filter(Boolean).join(" \u00b7 "));
    this.#place.title = slot.actor ?? "";
    setText(
      this.#deaths,
      slot.num_deaths ? ` \u00b7 ${slot.num_deaths} ${slot.num_deaths === 1 ? "death" : "deaths"}` : "",
    );
  }
}

class FailureView {
  #text = element("span");

  constructor(failure) {
    const time = new Date(failure.at * 1000);
    this.element = element(
      "li",
      {},
      element(
        "p",
        {},
        element("time", { datetime: time.toISOString() }, time.toLocaleTimeString()),
        " ",
        element("b", {}, failure.type),
      ),
      element("p", {}, failure.message),
      ...(failure.request_id ? [element("p", {}, `Request ${failure.request_id}`)] : []),
    );
  }

  show() {}
}

class ModelView {
  #rates = new Rates();
  #chart = new Chart();
  #counts = new Map();
  #slots = new Map();
  #failures = new Map();
  #total = element("b");
  #slotList = element("ul", { class: "slots" });
  #noSlots = element("p", { class: "empty" });
  #failureList = element("ul", { class: "failures" });
  #failureHead = element("h3", {}, "Latest failures");

  constructor({ name }) {
    const counts = element("dl", { class: "counts" });
    for (const [label, field] of COUNTS) {
      const value = element("dd");
      this.#counts.set(field, value);
      counts.append(element("div", {}, element("dt", {}, label), value));
    }
    this.element = element(
      "section",
      { class: "model", "aria-label": name },
      element(
        "h2",
        {},
        element("span", { class: "name" }, name),
        element("span", { class: "total" }, this.#total, " tok/s"),
      ),
      counts,
      this.#chart.element,
      this.#slotList,
      this.#noSlots,
      this.#failureHead,
      this.#failureList,
    );
  }

  show({ model, at }) {
    this.#rates.add(at, model.slots);
    setText(this.#total, this.#rates.total().toFixed(1));
    for (const [field, value] of this.#counts) {
      setText(value, model[field] === null ? "?" : format.format(model[field]));
      value.parentElement.classList.toggle("zero", model[field] === 0);
    }
    const numbers = model.slots.map(({ slot }) => slot);
    this.#chart.draw(this.#rates.samples, numbers);
    reconcile(
      this.#slotList,
      model.slots.map((slot, index) => ({ slot, tint: index % NUM_TINTS, rate: this.#rates.now(slot.slot) })),
      ({ slot }) => String(slot.slot),
      ({ slot }) => new SlotView(slot),
      this.#slots,
    );
    setText(this.#noSlots, model.problem || "No slots.");
    this.#noSlots.hidden = model.slots.length > 0;
    const failures = [...model.failures].sort((a, b) => b.at - a.at).slice(0, MAX_FAILURES);
    reconcile(
      this.#failureList,
      failures,
      ({ at: time, request_id: id, type }) => `${time} ${id} ${type}`,
      (failure) => new FailureView(failure),
      this.#failures,
    );
    this.#failureHead.hidden = failures.length === 0;
  }
}

/** The panel beside the chat. */
export class Cluster {
  #views = new Map();
  #message = document.getElementById("cluster-message");
  #models = document.getElementById("models");
  #connection = document.getElementById("connection");
  #keyButton = document.getElementById("enter-key");
  #seenAt = null;

  constructor() {
    this.#keyButton.addEventListener("click", () => askForKey(apiKey()));
  }

  /**
   * Show a state.
   * @param {object} state  The answer of GET /state.
   * @param {number} at  When it came, in milliseconds, monotonic.
   */
  show(state, at) {
    this.#seenAt = new Date();
    this.#models.classList.remove("stale");
    this.#message.classList.remove("trouble");
    this.#keyButton.hidden = true;
    this.#connect("live", "live");
    this.#say(
      state.models.length ? "" : "No models. The server is up, but it serves none: name one in its configuration.",
    );
    reconcile(
      this.#models,
      state.models.map((model) => ({ model, at })),
      ({ model }) => model.name,
      ({ model }) => new ModelView(model),
      this.#views,
    );
  }

  /** Say that there is no newer state, and why. */
  fail(error) {
    this.#models.classList.add("stale");
    this.#message.classList.add("trouble");
    const last = this.#seenAt ? ` What is shown is from ${this.#seenAt.toLocaleTimeString()}.` : "";
    this.#keyButton.hidden = error.status !== 401;
    if (error.status === 401) {
      this.#connect("failed", "API key needed");
      this.#say(`The server wants an API key.${last}`);
    } else if (error.type === "Unreachable") {
      this.#connect("failed", "server unreachable");
      this.#say(`${error.message} Is the server running? This page goes on trying.${last}`);
    } else {
      this.#connect("failed", "no state");
      this.#say(`${error.type}: ${error.message}${last}`);
    }
  }

  #connect(state, text) {
    this.#connection.dataset.state = state;
    setText(this.#connection, text);
  }

  #say(text) {
    this.#message.hidden = text === "";
    setText(this.#message, text);
  }
}
