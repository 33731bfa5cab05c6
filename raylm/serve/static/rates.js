// Tokens per second of each slot, from the running totals in GET /state.

/** How far back the chart looks, in milliseconds. */
export const WINDOW = 120_000;

/** Totals further apart than this say nothing about the time between: the page was hidden or the server away. */
const GAP = 4_000;

/** A rate is the mean over this time, in milliseconds: engines report in bursts. */
const SMOOTHING = 3_000;

/** The rates of one model's slots. */
export class Rates {
  /** `{at, rates: Map<slot, tokens/s>, gap}` in order of time; `gap`: nothing is known of the time before it. */
  samples = [];
  #totals = []; // of the last seconds: {at, slots: Map<slot, number of tokens>}

  /**
   * Take up a state.
   * @param {number} at  Milliseconds, monotonic.
   * @param {Array} slots  As in GET /state.
   */
  add(at, slots) {
    const last = this.#totals.at(-1);
    const gap = last === undefined || at - last.at > GAP;
    if (gap) this.#totals = [];
    const totals = new Map();
    for (const { slot, engine } of slots) if (engine) totals.set(slot, engine.num_tokens);
    this.#totals.push({ at, slots: totals });
    // The oldest total that is kept is the last one that is at least as old as the smoothing.
    while (this.#totals.length > 2 && at - this.#totals[1].at >= SMOOTHING) this.#totals.shift();
    if (gap) {
      this.samples.push({ at, rates: new Map(), gap });
    } else {
      const rates = new Map([...totals.keys()].map((slot) => [slot, this.#rate(slot)]));
      this.samples.push({ at, rates, gap: false });
    }
    while (this.samples.length > 1 && at - this.samples[1].at > WINDOW) this.samples.shift();
  }

  #rate(slot) {
    let tokens = 0;
    for (let i = 1; i < this.#totals.length; i += 1) {
      const before = this.#totals[i - 1].slots.get(slot);
      const after = this.#totals[i].slots.get(slot);
      if (before === undefined || after === undefined) continue; // it was not up, so what it did is not known
      tokens += after >= before ? after - before : after; // a replacement counts from zero
    }
    return (tokens * 1000) / (this.#totals.at(-1).at - this.#totals[0].at);
  }

  /** Return a slot's present rate. */
  now(slot) {
    return this.samples.at(-1)?.rates.get(slot) ?? 0;
  }

  /** Return the present rate of all slots together. */
  total() {
    return sum(this.samples.at(-1)?.rates);
  }
}

/** Add up the rates of a sample. */
export function sum(rates) {
  let all = 0;
  for (const rate of rates?.values() ?? []) all += rate;
  return all;
}
