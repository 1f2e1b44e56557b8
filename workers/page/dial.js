/** The strength dial lambda: 0 is the base model, 1 as trained, above 1 extrapolates. */

import { byId, el } from "./dom.js";
import { methodName } from "./methods.js";
import { topLambda } from "./settings.js";

const STEP = 0.05;

/** Draws the marks and moves `store`; returns a function that shows settings. */
export function createDial(card, store) {
  const range = byId("lambda");
  const [low, high] = card.kl_lambda_range;
  Object.assign(range, { min: low, max: high, step: STEP });
  drawZones(card);
  let clamped = false;
  range.addEventListener("input", () => {
    const wanted = range.valueAsNumber;
    clamped = wanted > topLambda(card, store.settings.method);
    store.update({ kl_lambda: wanted }, { gesture: "lambda" });
    show(store.settings);
  });
  const show = (settings) => {
    range.value = settings.kl_lambda;
    byId("lambda-value").textContent = settings.kl_lambda.toFixed(2);
    range.setAttribute("aria-valuetext", `${settings.kl_lambda.toFixed(2)}, ${meaning(settings.kl_lambda)}`);
    const top = topLambda(card, settings.method);
    byId("lambda-beyond").classList.toggle("closed", top < high);
    byId("lambda-note").textContent = note(settings, card, top);
    byId("lambda-note").classList.toggle("soft-warning", clamped || isBeyond(settings, card));
    clamped = false;
  };
  return show;
}

function meaning(value) {
  if (value === 0) return "base model";
  if (value === 1) return "as trained";
  return value < 1 ? "between base and trained" : "extrapolated";
}

const isBeyond = (settings, card) => {
  const [low, high] = card.kl_lambda_recommended;
  return settings.kl_lambda < low || settings.kl_lambda > high;
};

function note(settings, card, top) {
  const value = settings.kl_lambda;
  if (top < card.kl_lambda_range[1] && value >= top) {
    return `${methodName(settings.method)} goes no further than 1; other methods do.`;
  }
  if (value === 0) return "The base model: the weights have no effect here.";
  if (isBeyond(settings, card)) {
    const [low, high] = card.kl_lambda_recommended;
    return `Outside the recommended ${low} to ${high}: pictures may fall apart.`;
  }
  if (value > 1) return "Further than the adapters were trained.";
  return value === 1 ? "As the adapters were trained." : "A lighter touch than trained.";
}

/** Shade what lies beyond 1, more so beyond what is recommended, and name the marks. */
function drawZones(card) {
  const [low, high] = card.kl_lambda_range;
  const at = (value) => Math.min(1, Math.max(0, (value - low) / (high - low)));
  const beyond = el("span", { class: "zone beyond", id: "lambda-beyond" });
  place(beyond, at(1), 1);
  const far = el("span", { class: "zone far" });
  place(far, at(card.kl_lambda_recommended[1]), 1);
  byId("lambda-zones").replaceChildren(beyond, far);
  const marks = [
    [0, "base"],
    [1, "as trained"],
    [high, `${high}`],
  ].filter(([value]) => value >= low && value <= high);
  byId("lambda-marks").replaceChildren(
    ...marks.map(([value, text], index) => {
      const mark = el("span", { class: index === 0 ? "first" : value === high ? "last" : "" }, text);
      mark.style.setProperty("--at", at(value));
      return mark;
    }),
  );
}

function place(zone, from, to) {
  zone.style.setProperty("--from", from);
  zone.style.setProperty("--to", to);
}
