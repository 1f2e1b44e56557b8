/** Makes the user's own image: never more than one request at a time, always the newest settings. */

import { streamImage } from "./api.js";
import { recall, remember } from "./results.js";
import { previewsFor, requestBody } from "./settings.js";

const QUIET_MS = 120;
// A drag that never rests still shows where it is going.
const PATIENCE_MS = 400;

/**
 * `view` is told what happens: began, progress, preview, done, cancelled, failed and waiting (seconds left
 * until a busy server is asked again).
 */
export class Runner {
  #timer = null;
  #clock = null;
  #askedAt = null;
  #wanted = null;
  #controller = null;
  #running = Promise.resolve();

  constructor(view) {
    this.view = view;
  }

  /** Ask for an image soon; whatever was asked before is stale. `force` makes it even if it is at hand. */
  want(settings, { force = false, atOnce = false } = {}) {
    const now = performance.now();
    this.#askedAt ??= now;
    this.#wanted = { settings, force };
    clearInterval(this.#clock);
    clearTimeout(this.#timer);
    const patience = Math.max(0, this.#askedAt + PATIENCE_MS - now);
    this.#timer = setTimeout(() => this.#start(), atOnce ? 0 : Math.min(QUIET_MS, patience));
  }

  /** Give up what is running or waiting; says whether there was anything. */
  cancel() {
    const busy = [this.#timer, this.#clock, this.#controller].some((part) => part !== null);
    this.#stop();
    if (busy) this.view.cancelled();
    return busy;
  }

  /** Make the image that was wanted last, now. */
  again() {
    if (this.#wanted) this.want(this.#wanted.settings, { force: true, atOnce: true });
  }

  #stop() {
    clearInterval(this.#clock);
    clearTimeout(this.#timer);
    this.#timer = this.#clock = this.#askedAt = null;
    this.#controller?.abort();
    this.#controller = null;
  }

  #start() {
    this.#stop();
    const { settings, force } = this.#wanted;
    const ready = force ? null : recall(settings);
    if (ready) return this.view.done(settings, ready);
    const controller = (this.#controller = new AbortController());
    const before = this.#running;
    this.view.began(settings);
    this.#running = before.then(() => this.#make(settings, controller));
  }

  async #make(settings, controller) {
    const { signal } = controller;
    if (signal.aborted) return;
    try {
      const body = { ...requestBody(settings), partial_images: previewsFor(settings) };
      const result = await streamImage(body, signal, {
        onProgress: (step, total) => signal.aborted || this.view.progress(step, total),
        onPreview: (src) => signal.aborted || this.view.preview(src),
      });
      if (signal.aborted) return;
      this.#controller = null;
      remember(settings, result);
      this.view.done(settings, result);
    } catch (error) {
      if (signal.aborted) return;
      this.#controller = null;
      if (error.retryAfter) this.#waitFor(error);
      else this.view.failed(error);
    }
  }

  #waitFor(error) {
    const until = performance.now() + error.retryAfter * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      if (left <= 0) this.again();
      else this.view.waiting(left, error);
    };
    this.#clock = setInterval(tick, 500);
    tick();
  }
}
