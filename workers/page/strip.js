/** The same prompt and seed at every corner, at the centre and where the user is. */

import { requestImage } from "./api.js";
import { byId, el } from "./dom.js";
import { recall, remember } from "./results.js";
import { requestBody } from "./settings.js";
import { equalWeights, oneHot, sameWeights } from "./weights.js";

/** Fills tiles one at a time whenever `resume` is called, until `pause`: the user's own image goes first. */
export class Strip {
  #controller = null;

  constructor(names, onPick) {
    const places = names.map((name) => ({ label: name, weights: oneHot(names, name) }));
    places.push({ label: "centre", weights: equalWeights(names) });
    this.tiles = places.map((place) => createTile(place, () => onPick(place.weights)));
    this.you = createTile({ label: "you" }, null);
    byId("strip").replaceChildren(...[...this.tiles, this.you].map((tile) => tile.item));
  }

  /** Show what is known of the tiles for these settings. */
  show(settings) {
    for (const tile of this.tiles) {
      tile.settings = { ...settings, weights: tile.weights };
      const chosen = sameWeights(tile.weights, settings.weights);
      tile.face.setAttribute("aria-pressed", chosen);
      paint(tile, recall(tile.settings));
    }
  }

  /** The user's own image. */
  showOwn(result) {
    paint(this.you, result);
  }

  pause() {
    this.#controller?.abort();
    this.#controller = null;
  }

  async resume() {
    this.pause();
    const controller = (this.#controller = new AbortController());
    for (const tile of this.tiles) {
      if (controller.signal.aborted) return;
      const wanted = tile.settings;
      const result = recall(wanted) ?? (await ask(wanted, controller.signal));
      if (controller.signal.aborted) return;
      paint(tile, result);
      if (result) remember(wanted, result);
      else tile.face.classList.add("failed");
    }
  }
}

/** The image, or null when it cannot be had; a busy server is asked again. */
async function ask(settings, signal) {
  for (;;) {
    try {
      return await requestImage(requestBody(settings), signal);
    } catch (error) {
      if (signal.aborted || !error.retryAfter) return null;
      await new Promise((resume) => setTimeout(resume, error.retryAfter * 1000));
      if (signal.aborted) return null;
    }
  }
}

function createTile({ label, weights }, onClick) {
  const image = el("img", { alt: "", hidden: true, draggable: "false" });
  const face = onClick
    ? el("button", { type: "button", class: "tile", "aria-label": `Move to ${label}` })
    : el("div", { class: "tile" });
  const picture = el("span", { class: "picture" }, image);
  image.addEventListener("load", () => image.classList.toggle("pixelated", image.naturalWidth < 256));
  face.append(picture, el("span", { class: "name", title: label }, label));
  if (onClick) face.addEventListener("click", onClick);
  return { label, weights, face, image, item: el("li", { class: onClick ? "" : "you" }, face) };
}

function paint(tile, result) {
  tile.image.hidden = !result;
  if (!result) return tile.image.removeAttribute("src");
  tile.face.classList.remove("failed");
  if (tile.image.getAttribute("src") !== result.src) tile.image.src = result.src;
}
