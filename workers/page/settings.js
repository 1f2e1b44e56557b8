/** What an image is made from: {prompt, weights, kl_lambda, method, seed, steps, guidance}. No DOM here. */

import { equalWeights, project, quantise } from "./weights.js";

const MAX_PREVIEWS = 10;
const MAX_SEED = 2 ** 53 - 1;

/** One adapter is drawn at each step: a sum of more than 1 has no such reading. */
const NEVER_EXTRAPOLATES = new Set(["ls"]);

export const EXAMPLES = [
  "A red colored car.",
  "A blue cup and a green cell phone.",
  "A yellow colored fish.",
  "A purple colored umbrella.",
  "A white boat and a red house.",
];

export function defaultSettings(card) {
  const names = card.basis.map((adapter) => adapter.name);
  return {
    prompt: EXAMPLES[0],
    weights: card.defaults.weights ?? equalWeights(names),
    kl_lambda: card.defaults.kl_lambda,
    method: card.defaults.method,
    seed: 7,
    steps: card.defaults.num_inference_steps,
    guidance: card.defaults.guidance_scale,
  };
}

/** The largest lambda that a method takes. */
export function topLambda(card, method) {
  const top = card.kl_lambda_range[1];
  return NEVER_EXTRAPOLATES.has(method) ? Math.min(1, top) : top;
}

export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000;
}

/** The body of a request for one image. */
export function requestBody(settings) {
  return {
    prompt: settings.prompt,
    weights: settings.weights,
    kl_lambda: settings.kl_lambda,
    method: settings.method,
    num_inference_steps: settings.steps,
    guidance_scale: settings.guidance,
    seed: settings.seed,
  };
}

export const previewsFor = (settings) => Math.min(MAX_PREVIEWS, Math.max(0, settings.steps - 1));

/** The same text for the same image. */
export const keyOf = (settings) => toFragment(settings);

export function toFragment(settings) {
  const weights = Object.entries(settings.weights).map(([name, weight]) => `${name}:${weight}`);
  return new URLSearchParams({
    prompt: settings.prompt,
    weights: weights.join(","),
    lambda: settings.kl_lambda,
    method: settings.method,
    seed: settings.seed,
    steps: settings.steps,
    guidance: settings.guidance,
  }).toString();
}

/** Settings from a fragment; whatever is missing or makes no sense for this bundle is as in `fallback`. */
export function fromFragment(fragment, card, fallback) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""));
  const number = (name, low, high, otherwise) => {
    const text = given.get(name);
    const value = Number(text);
    return text?.trim() && Number.isFinite(value) ? Math.min(high, Math.max(low, value)) : otherwise;
  };
  const method = card.methods.includes(given.get("method")) ? given.get("method") : fallback.method;
  return {
    prompt: given.get("prompt")?.trim() || fallback.prompt,
    weights: readWeights(given.get("weights"), fallback.weights),
    kl_lambda: number("lambda", card.kl_lambda_range[0], topLambda(card, method), fallback.kl_lambda),
    method,
    seed: Math.round(number("seed", 0, MAX_SEED, fallback.seed)),
    steps: Math.round(number("steps", 1, card.limits.max_steps, fallback.steps)),
    guidance: number("guidance", 0, 50, fallback.guidance),
  };
}

function readWeights(text, fallback) {
  const target = Object.fromEntries(Object.keys(fallback).map((name) => [name, 0]));
  let known = false;
  for (const part of (text ?? "").split(",")) {
    const cut = part.lastIndexOf(":");
    const [name, value] = [part.slice(0, cut), Number(part.slice(cut + 1))];
    if (!(name in target) || !Number.isFinite(value)) continue;
    target[name] = Math.max(0, value);
    known = true;
  }
  return known ? quantise(project(target)) : fallback;
}
