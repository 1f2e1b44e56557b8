/** Images made so far in this tab, by their settings: the same settings give the same image. */

import { keyOf } from "./settings.js";

const MOST = 60;
const kept = new Map();

export function recall(settings) {
  return kept.get(keyOf(settings)) ?? null;
}

export function remember(settings, result) {
  const key = keyOf(settings);
  kept.delete(key);
  kept.set(key, result);
  if (kept.size > MOST) kept.delete(kept.keys().next().value);
}
