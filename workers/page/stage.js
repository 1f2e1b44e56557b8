/** The large picture: previews while it is denoised, its progress, and what went wrong. */

import { announce, byId } from "./dom.js";
import { describe } from "./weights.js";

const SMALL = 256;

/** A view for the Runner. `hooks.done(settings, result)` follows each image, `hooks.failed(error)` each failure. */
export function createStage(hooks) {
  const image = byId("image");
  let shown = null;
  image.addEventListener("load", () => soften(image, shown));
  const stage = {
    began(settings) {
      clearMessage();
      busy(true);
      showProgress(0, settings.steps);
      announce("Making an image.");
      hooks.began(settings);
    },
    progress: showProgress,
    preview(src) {
      image.src = src;
      image.hidden = false;
    },
    done(settings, result) {
      shown = { settings, result };
      busy(false);
      clearMessage();
      image.src = result.src;
      image.alt = altOf(settings);
      image.hidden = false;
      showCaption(shown);
      showDownload(result);
      announce("The image is ready.");
      hooks.done(settings, result);
    },
    cancelled() {
      settle(image, shown);
      showMessage("Cancelled.", "Make it again");
      announce("Cancelled.");
      hooks.cancelled();
    },
    failed(error) {
      settle(image, shown);
      announce(error.message);
      hooks.failed(error);
    },
    waiting(seconds, error) {
      settle(image, shown);
      showMessage(error.status === 503 ? "The server is not ready." : "The server is busy.", "Try now");
      byId("message-more").textContent = `Trying again in ${seconds} s.`;
      hooks.cancelled();
    },
  };
  return stage;
}

/** Put the last finished image back after a preview that leads nowhere. */
function settle(image, shown) {
  busy(false);
  showCaption(shown);
  byId("frame").classList.add("stale");
  if (shown) image.src = shown.result.src;
  else image.hidden = true;
}

/** A small picture keeps its pixels; a preview at latent resolution is smoothed. */
function soften(image, shown) {
  const final = shown?.result.src === image.src;
  if (final) image.dataset.width = image.naturalWidth;
  const usual = Number(image.dataset.width) || image.naturalWidth;
  image.classList.toggle("pixelated", usual < SMALL && image.naturalWidth === usual);
}

function busy(on) {
  byId("frame").setAttribute("aria-busy", on);
  byId("frame").classList.remove("stale");
  byId("cancel").hidden = !on;
  byId("progress").hidden = !on;
}

function showProgress(step, total) {
  const bar = byId("progress");
  bar.max = total;
  bar.value = step;
  byId("caption").textContent = step === 0 ? "Starting…" : `Step ${step} of ${total}`;
}

export function showMessage(text, action = null) {
  byId("message").hidden = false;
  byId("message-text").textContent = text;
  byId("message-more").textContent = "";
  byId("retry").hidden = action === null;
  byId("retry").textContent = action ?? "";
}

export function clearMessage() {
  byId("message").hidden = true;
}

const altOf = (settings) => `${settings.prompt} ${describe(settings.weights)}, lambda ${settings.kl_lambda}`;

function showCaption(shown) {
  byId("caption").textContent = shown ? captionOf(shown.result) : "";
}

function captionOf({ usage }) {
  const seconds = (usage.queue_ms + usage.denoise_ms + usage.decode_ms) / 1000;
  return `${usage.steps} steps · ${usage.rows} model rows · ${seconds.toFixed(1)} s`;
}

function showDownload(result) {
  const link = byId("download");
  link.href = result.src;
  link.download = `${result.bundle.name}-${result.seed}.png`;
  link.removeAttribute("aria-disabled");
}
