/** The settings in force, and the address that carries them. */

import { fromFragment, toFragment, topLambda } from "./settings.js";
import { project, quantise } from "./weights.js";

/**
 * Changes of one gesture (a drag, a run of arrow keys) share one entry of the browser's history, so that
 * "back" undoes the gesture and not its last pixel.
 */
export class Store {
  constructor(card, fallback) {
    this.card = card;
    this.fallback = fallback;
    this.settings = fromFragment(location.hash, card, fallback);
    this.locked = new Set();
    this.listeners = [];
    this.gesture = null;
    history.replaceState(null, "", `#${toFragment(this.settings)}`);
    addEventListener("popstate", () => this.#restore());
  }

  subscribe(listener) {
    this.listeners.push(listener);
  }

  /** Merge `patch` into the settings. `gesture` names what the user is doing; `force` asks for a new image anyway. */
  update(patch, { gesture = null, force = false } = {}) {
    const next = { ...this.settings, ...patch };
    next.kl_lambda = Math.min(next.kl_lambda, topLambda(this.card, next.method));
    this.#release(next.weights);
    const before = toFragment(this.settings);
    const fragment = toFragment(next);
    this.settings = next;
    if (fragment !== before) {
      const same = gesture !== null && gesture === this.gesture;
      history[same ? "replaceState" : "pushState"](null, "", `#${fragment}`);
    }
    this.gesture = gesture;
    if (fragment !== before || force) this.#tell({ force, gesture });
  }

  /** Move the picker towards `target`, as far as the locks allow, in steps of 1 / units. */
  aim(target, { gesture, units = 1000 }) {
    const coarse = quantise(project(target), units);
    this.update({ weights: quantise(project(coarse, this.settings.weights, this.locked)) }, { gesture });
  }

  toggleLock(name) {
    if (!this.locked.delete(name)) this.locked.add(name);
    this.#tell({ force: false, locks: true });
  }

  /** A lock yields to a mix that was chosen as a whole. */
  #release(weights) {
    for (const name of [...this.locked]) {
      if (Math.abs(weights[name] - this.settings.weights[name]) > 1e-9) this.locked.delete(name);
    }
  }

  #restore() {
    const found = fromFragment(location.hash, this.card, this.fallback);
    if (toFragment(found) === toFragment(this.settings)) return;
    this.#release(found.weights);
    this.settings = found;
    this.gesture = null;
    this.#tell({ force: false });
  }

  #tell(change) {
    for (const listener of this.listeners) listener(this.settings, change);
  }
}
