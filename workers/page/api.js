/** The endpoint as the page sees it: cards, evaluations and images that stream in. */

const TOKEN_KEY = "diffusion-blend-token";
const USUAL_WAIT_S = 5;
const NO_ANSWER = "The server cannot be reached. Check that it is running.";

/** Where the endpoint begins, also behind a prefix; without a slash at the end. */
export const ROOT = new URL("..", import.meta.url).href.replace(/\/$/, "");

/** An answer that is not an image. `status` is 0 when there was no answer; `retryAfter` is in seconds or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export const hasToken = () => sessionStorage.getItem(TOKEN_KEY) !== null;
export const keepToken = (token) => sessionStorage.setItem(TOKEN_KEY, token);

/** The card of the bundle that is served. */
export async function fetchCard() {
  const answer = await send("/v1/models");
  return (await answer.json()).data[0];
}

/** The latest evaluation of this bundle, or null when there is none. */
export async function fetchEvaluation() {
  try {
    return await (await send("/v1/evaluations/latest")).json();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

/** One image, whole. */
export async function requestImage(body, signal) {
  const answer = await post(body, signal);
  const { data, ...facts } = await readJson(answer);
  return { ...facts, src: pngUrl(data[0].b64_json), seed: data[0].seed };
}

/** One image with previews on the way: `onProgress(step, total)` and `onPreview(url)`. */
export async function streamImage(body, signal, { onProgress, onPreview }) {
  const answer = await post({ ...body, stream: true }, signal);
  let result = null;
  for await (const event of events(answer.body)) {
    if (signal.aborted) throw new DOMException("aborted", "AbortError");
    if (event.error) throw brokenOff(event.error);
    if (event.type === "blend.progress") onProgress(event.step, event.total);
    if (event.type === "image_generation.partial_image") onPreview(pngUrl(event.b64_json));
    if (event.type === "image_generation.completed") result = { ...event, src: pngUrl(event.b64_json) };
  }
  if (result === null) throw new ApiError("The connection ended before the image was ready.");
  delete result.b64_json;
  return result;
}

/** What went wrong after the stream began; the engine may be back in a moment. */
function brokenOff({ message, type, param, retry_after_s: retryAfter = null }) {
  return new ApiError(message, { status: type === "rate_limit_error" ? 429 : 503, param, retryAfter });
}

const pngUrl = (base64) => `data:image/png;base64,${base64}`;

function post(body, signal) {
  return send("/v1/images/generations", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

async function send(path, options = {}) {
  const headers = { ...options.headers };
  if (hasToken()) headers.Authorization = `Bearer ${sessionStorage.getItem(TOKEN_KEY)}`;
  const answer = await fetch(ROOT + path, { ...options, headers }).catch(unreachable);
  if (answer.ok) return answer;
  throw await refusal(answer);
}

function unreachable(error) {
  if (error.name === "AbortError") throw error;
  throw new ApiError(NO_ANSWER);
}

async function readJson(answer) {
  return answer.json().catch(unreachable);
}

async function refusal(answer) {
  const detail = await answer
    .json()
    .then((body) => body.error)
    .catch(() => null);
  const message = detail?.message ?? `The server answered ${answer.status}.`;
  const busy = answer.status === 429 || answer.status === 503;
  const retryAfter = busy ? Number(answer.headers.get("Retry-After")) || USUAL_WAIT_S : null;
  return new ApiError(message, { status: answer.status, param: detail?.param ?? null, retryAfter });
}

/** The JSON of each server-sent event of a body. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read().catch(unreachable);
    if (done) return;
    buffer += value.replaceAll("\r", "");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trimStart())
        .join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}
