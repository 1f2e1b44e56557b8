/** The last images of this tab, newest first; a click brings one back with all its settings. */

import { byId, el } from "./dom.js";
import { keyOf } from "./settings.js";
import { mixLabel } from "./weights.js";

const MOST = 12;

export class History {
  #entries = [];

  constructor(onPick) {
    this.onPick = onPick;
  }

  add(settings, result) {
    const key = keyOf(settings);
    const known = this.#entries.find((entry) => entry.key === key);
    if (known) return this.#mark(key);
    this.#entries.unshift({ key, item: this.#createItem(settings, result) });
    this.#entries.splice(MOST);
    byId("history").replaceChildren(...this.#entries.map((entry) => entry.item));
    byId("history-empty").hidden = true;
    this.#mark(key);
  }

  #mark(key) {
    for (const entry of this.#entries) {
      if (entry.key === key) entry.item.firstChild.setAttribute("aria-current", "true");
      else entry.item.firstChild.removeAttribute("aria-current");
    }
  }

  #createItem(settings, result) {
    const { prompt, weights, kl_lambda, method, seed } = settings;
    const about = `${prompt} ${mixLabel(weights)}, λ ${kl_lambda}, ${method}, seed ${seed}`;
    const image = el("img", { src: result.src, alt: "", draggable: "false" });
    image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth < 256));
    const button = el("button", { type: "button", class: "thumb", title: about, "aria-label": about }, image);
    button.addEventListener("click", () => this.onPick(settings, result));
    return el("li", {}, button);
  }
}
