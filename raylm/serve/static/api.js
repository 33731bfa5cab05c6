// The gateway's HTTP API. Addresses are relative, so the page works behind a path prefix too.

import { apiKey, askForKey } from "./key.js";
import { serverSentEvents } from "./sse.js";

/** A request that failed. `type` is the server's error class, or `Unreachable` or `Disconnected` of this page. */
export class ApiError extends Error {
  constructor(message, { type = "Error", status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    this.type = type;
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter; // seconds
  }
}

/**
 * Send a request and return the response when it is a success.
 * @param {string} path
 * @param {RequestInit & {ask?: boolean}} options  `ask`: open the dialog when the server wants a key.
 * @throws {ApiError}
 * @throws {DOMException} AbortError, when `options.signal` was aborted.
 */
async function send(path, { ask = true, ...options } = {}) {
  for (;;) {
    const key = apiKey();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (options.signal?.aborted && error.name === "AbortError") throw error;
      throw new ApiError(`No answer from ${location.host}.`, { type: "Unreachable" });
    }
    if (response.ok) return response;
    if (response.status === 401 && ask && (await askForKey(key))) continue;
    throw await failure(response);
  }
}

async function failure(response) {
  const text = await response.text().catch(() => "");
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // Not the gateway's own words: a proxy in front of it, for example.
  }
  const retryAfter = Number(response.headers.get("Retry-After"));
  return new ApiError(error.message ?? (text.slice(0, 300) || `${response.status} ${response.statusText}`), {
    type: error.type ?? `HTTP ${response.status}`,
    status: response.status,
    param: error.param ?? null,
    retryAfter: retryAfter > 0 ? retryAfter : null,
  });
}

/** Return the JSON of a GET. */
export async function getJson(path, options) {
  const response = await send(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw new ApiError(`The answer from ${location.host} broke off: ${error.message}.`, { type: "Disconnected" });
  }
}

function post(path, body, options) {
  return send(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    ...options,
  });
}

/**
 * Stream one turn.
 * @yields {{status: number, text: string, n_tokens: number, receipt?: object}}
 * @throws {ApiError} Before the first event or in the middle.
 */
export async function* streamChat(body, signal) {
  const response = await post("stream_chat", body, { signal });
  try {
    for await (const { event, data } of serverSentEvents(response.body)) {
      const message = JSON.parse(data);
      if (event === "error") {
        const { message: text, type, code, param } = message.error;
        throw new ApiError(text, { type, status: code, param });
      }
      yield message;
      if (message.status <= 0) return;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    throw new ApiError(`The connection to ${location.host} broke: ${error.message}.`, { type: "Disconnected" });
  }
  throw new ApiError("The connection ended before the answer did.", { type: "Disconnected" });
}

/** Cancel a running request. A request that has just ended is no error. */
export async function cancelRequest(requestId) {
  try {
    await post(`requests/${encodeURIComponent(requestId)}/cancel`, {});
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}

/** Another model may have a session of the same name. */
function sessionPath(id, model) {
  return `sessions/${encodeURIComponent(id)}?model=${encodeURIComponent(model)}`;
}

/** Return a session's transcript. */
export function loadSession(id, model) {
  return getJson(sessionPath(id, model));
}

/** End a session. One that the server has forgotten already is no error. */
export async function endSession(id, model) {
  try {
    await send(sessionPath(id, model), { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) throw error;
  }
}

/** Copy a session's transcript to a new session. */
export function forkSession(id, newId, model) {
  return post(`sessions/${encodeURIComponent(id)}/fork`, { session_id: newId, model });
}

/** Return a new id. (`crypto.randomUUID` exists on secure origins only.) */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
