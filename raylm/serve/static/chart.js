// A stacked area of tokens per second, one layer a slot. The slots' rows, which bear the same tints, are its legend.

import { element, setText } from "./dom.js";
import { sum, WINDOW } from "./rates.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = WINDOW / 1000; // one unit a second
const HEIGHT = 100;

/** How many tints there are; slots take them in turn. */
export const NUM_TINTS = 4;

/** What a key makes of the age that is read. The newest is at the right. */
const AGES = {
  ArrowLeft: (age) => age + 1000,
  ArrowRight: (age) => age - 1000,
  PageUp: (age) => age + 10000,
  PageDown: (age) => age - 10000,
  Home: () => WINDOW,
  End: () => 0,
};

function svg(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Return the least of 1, 2, 5 times a power of ten that is not below `value`, and at least 10. */
function niceCeiling(value) {
  if (value <= 10) return 10;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((limit) => limit >= value);
}

export class Chart {
  #layers = new Map();
  #samples = [];
  #areas = svg("g", {});
  #cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT, visibility: "hidden" });
  #plot;
  #top = element("span", { class: "top" });
  #middle = element("span", { class: "middle" });
  #readout = element("span", { class: "readout" });
  #slider;
  #age = null; // of the moment that is read, in milliseconds

  constructor() {
    this.#plot = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": "Tokens per second over the last two minutes",
    });
    for (const y of [0, HEIGHT / 2, HEIGHT])
      this.#plot.append(svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: y, y2: y }));
    this.#plot.append(this.#areas, this.#cursor);
    this.#plot.addEventListener("pointermove", (event) => {
      const { left, width } = this.#plot.getBoundingClientRect();
      this.#read(WINDOW * (1 - (event.clientX - left) / width));
    });
    this.#plot.addEventListener("pointerleave", () => this.#read(null));
    this.#slider = element(
      "div",
      {
        class: "plot",
        role: "slider",
        tabindex: "0",
        "aria-label": "Tokens per second at a moment, in seconds ago",
        "aria-valuemin": "0",
        "aria-valuemax": String(WINDOW / 1000),
        "aria-valuenow": "0",
        keydown: (event) => {
          const age = AGES[event.key]?.(this.#age ?? 0);
          if (age === undefined) return;
          event.preventDefault();
          this.#read(Math.min(WINDOW, Math.max(0, age)));
        },
        focus: () => this.#read(0),
        blur: () => this.#read(null),
      },
      this.#plot,
      this.#top,
      this.#middle,
      this.#readout,
    );
    this.element = element(
      "figure",
      { class: "chart" },
      this.#slider,
      element(
        "figcaption",
        { class: "axis" },
        ...["2 min ago", "1 min", "now"].map((text) => element("span", {}, text)),
      ),
    );
  }

  /** Draw the samples of a `Rates`; the newest is at the right edge. */
  draw(samples, slots) {
    this.#samples = samples;
    const limit = niceCeiling(Math.max(0, ...samples.map(({ rates }) => sum(rates))));
    setText(this.#top, String(limit));
    setText(this.#middle, String(limit / 2));
    const now = samples.at(-1)?.at ?? 0;
    const base = samples.map(() => 0);
    const segments = this.#segments(samples);
    for (const [slot, layer] of this.#layers) {
      if (slots.includes(slot)) continue;
      layer.remove();
      this.#layers.delete(slot);
    }
    slots.forEach((slot, index) => {
      if (!this.#layers.has(slot)) {
        const layer = svg("path", {});
        this.#layers.set(slot, layer);
        this.#areas.append(layer);
      }
      const below = [...base];
      samples.forEach(({ rates }, i) => {
        base[i] += rates.get(slot) ?? 0;
      });
      const point = (i, heights) => {
        const x = WIDTH - (now - samples[i].at) / 1000;
        return `${x.toFixed(2)} ${(HEIGHT * (1 - heights[i] / limit)).toFixed(2)}`;
      };
      const path = segments.map((indices) => {
        const upper = indices.map((i) => point(i, base));
        const lower = indices.map((i) => point(i, below)).reverse();
        return `M${[...upper, ...lower].join("L")}Z`;
      });
      const layer = this.#layers.get(slot);
      layer.setAttribute("class", `tint-${index % NUM_TINTS}`);
      layer.setAttribute("d", path.join(""));
    });
    this.#showReadout();
  }

  #segments(samples) {
    const segments = [];
    samples.forEach((sample, i) => {
      if (sample.gap) segments.push([]);
      else segments.at(-1)?.push(i);
    });
    return segments.filter((indices) => indices.length > 1);
  }

  #read(age) {
    this.#age = age;
    this.#showReadout();
    // Not at each redraw, which a screen reader would tell once a second.
    this.#slider.setAttribute("aria-valuenow", String(Math.round((age ?? 0) / 1000)));
    this.#slider.setAttribute("aria-valuetext", this.#readout.textContent);
  }

  #showReadout() {
    const now = this.#samples.at(-1)?.at;
    const shown = this.#age !== null && now !== undefined;
    this.#cursor.setAttribute("visibility", shown ? "visible" : "hidden");
    if (!shown) {
      setText(this.#readout, "");
      return;
    }
    const distance = ({ at }) => Math.abs(now - at - this.#age);
    const nearest = this.#samples.reduce((best, sample) => (distance(sample) < distance(best) ? sample : best));
    const age = Math.round((now - nearest.at) / 1000);
    const x = WIDTH - age;
    this.#cursor.setAttribute("x1", x);
    this.#cursor.setAttribute("x2", x);
    setText(
      this.#readout,
      nearest.gap ? `${age} s ago: not known` : `${age} s ago: ${sum(nearest.rates).toFixed(1)} tok/s`,
    );
  }
}
