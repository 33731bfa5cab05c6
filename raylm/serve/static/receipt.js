// Words for receipts and failures.

import { element } from "./dom.js";

const CAUSES = {
  died: "its actor died",
  silent: "its actor fell silent",
  failed: "its engine failed",
  full: "the server behind its engine was full",
  lease: "the gateway lost its lease",
};

/** Return what a move was, in words, or null when the answer stayed where it began. */
export function moveOf(receipt) {
  if (!receipt.why.startsWith("moved:")) return null;
  const cause = receipt.why.slice("moved:".length);
  return `Moved: ${CAUSES[cause] ?? cause}; slot ${receipt.slot} took the answer up where it was.`;
}

function item(label, value, title = "") {
  return element("span", title ? { title } : {}, label, " ", element("span", { class: "value" }, value));
}

function rate(tokensPerSecond) {
  const title = "After the first token, as this browser saw it";
  return element("span", { title }, element("span", { class: "value" }, tokensPerSecond.toFixed(1)), " tok/s");
}

/**
 * Return the items of an answer's last line.
 * @param {object} receipt
 * @param {{firstTokenMs: number|null, tokensPerSecond: number|null}} timing  As this browser saw it.
 */
export function receiptItems(receipt, timing) {
  const { usage } = receipt;
  const items = [
    item("slot", String(receipt.slot)),
    item("actor", receipt.actor.slice(0, 8), receipt.actor),
    item("node", receipt.node),
    element("span", { class: receipt.why.startsWith("moved:") ? "moved" : "value" }, receipt.why),
    item("queued", `${receipt.queue_ms.toFixed(receipt.queue_ms < 10 ? 1 : 0)} ms`),
    item("attempts", String(receipt.attempts)),
    item("tokens", `${usage.prompt_tokens} in, ${usage.completion_tokens} out`),
  ];
  if (timing.tokensPerSecond !== null) items.push(rate(timing.tokensPerSecond));
  if (timing.firstTokenMs !== null) items.push(item("first token", `${Math.round(timing.firstTokenMs)} ms`));
  items.push(
    receipt.engine === "simulated"
      ? element("span", { class: "simulated", title: "A clock, not a model" }, "simulated")
      : element("span", {}, `${receipt.engine} ${receipt.engine_version}`),
  );
  return items;
}

/** Return what an error is called: by the server, or by this page where the server had no part in it. */
export function titleOf(error) {
  return { Unreachable: "Server unreachable", Disconnected: "Connection lost" }[error.type] ?? error.type;
}

/** Return what a person can do about an error, or "" when its message says so itself. */
export function adviceFor(error) {
  const wait = error.retryAfter ? `in ${Math.ceil(error.retryAfter)} s` : "in a moment";
  switch (error.type) {
    case "Unreachable":
      return "Check that the server is running and reachable from here, then try again.";
    case "Disconnected":
      return "The server may have been restarted. Try again.";
    case "AuthenticationError":
      return "Try again and give a key that the server accepts.";
    case "PoolSaturatedError":
      return `The server has as much as it can take. Try again ${wait}.`;
    case "NoActorError":
    case "PlacementError":
    case "ActorLostError":
      return `See the slots under Cluster; try again ${wait}.`;
    case "SessionBusyError":
      return "Wait for the other turn of this session, then try again.";
    case "ContextLengthError":
      return "Shorten the message, or begin a new session.";
    case "PoisonRequestError":
      return "Two engines were lost on this message, so it is not tried again. Change it.";
    case "RequestTimeoutError":
      return "The server is busy or a slot hangs: see Cluster. Try again.";
    case "InvalidRequestError":
      return error.param ? `Change ${error.param} under Settings and try again.` : "Change the request and try again.";
    default:
      return error.status >= 500 || error.retryAfter ? `Other requests are not affected. Try again ${wait}.` : "";
  }
}
