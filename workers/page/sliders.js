/** One slider per adapter, with a lock; the others make room so that the sum stays 1. */

import { el, svg } from "./dom.js";
import { percent, setOne } from "./weights.js";

/** Draws into `root` and moves `store`; returns a function that shows settings. */
export function createSliders(root, basis, store) {
  const rows = basis.map((adapter, index) => createRow(adapter, index, basis.length > 2, store));
  root.replaceChildren(...rows.map((row) => row.element));
  return ({ weights }) => {
    for (const row of rows) row.show(weights[row.name]);
  };
}

function createRow(adapter, index, lockable, store) {
  const { name } = adapter;
  const id = `weight-${index}`;
  const range = el("input", { type: "range", id, class: `series-${index % 6}`, min: 0, max: 100, step: 1 });
  const value = el("output", { for: id, class: "value", "aria-live": "off" });
  const lock = lockable && createLock(name, store);
  const outside = el("small", { class: "soft-warning", hidden: true });
  range.addEventListener("input", () => {
    const weights = setOne(store.settings.weights, name, range.valueAsNumber / 100, store.locked);
    store.update({ weights }, { gesture: id });
    show(store.settings.weights[name]);
  });
  const show = (weight) => {
    const locked = store.locked.has(name);
    range.value = weight * 100;
    range.disabled = locked;
    range.setAttribute("aria-valuetext", percent(weight));
    range.style.setProperty("--filled", weight);
    value.textContent = percent(weight);
    if (lock) showLock(lock, name, locked);
    warnOutside(outside, adapter.weight_range, weight);
  };
  const label = el("label", { for: id }, el("span", { class: `dot dot-${index % 6}` }), name);
  if (adapter.reward && adapter.reward !== name) label.title = `tuned for ${adapter.reward}`;
  const element = el("div", { class: "weight", id: `row-weights-${name}` }, label, range, value);
  if (lock) element.append(lock);
  element.append(outside);
  return { name, element, show };
}

function createLock(name, store) {
  const shape = svg(
    "svg",
    { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" },
    svg("rect", { x: 3, y: 7, width: 10, height: 7, rx: 1.5 }),
    svg("path", { class: "shackle", d: "M5 7V5a3 3 0 0 1 6 0v2" }),
  );
  const lock = el("button", { type: "button", class: "lock" }, shape);
  lock.addEventListener("click", () => store.toggleLock(name));
  return lock;
}

function showLock(lock, name, locked) {
  lock.setAttribute("aria-pressed", locked);
  lock.setAttribute("aria-label", `Lock ${name}`);
  lock.title = locked ? `Let ${name} change again` : `Keep ${name} as it is`;
}

function warnOutside(note, range, weight) {
  const outside = Boolean(range) && (weight < range[0] - 1e-6 || weight > range[1] + 1e-6);
  note.hidden = !outside;
  note.textContent = outside ? `recommended: ${percent(range[0])} to ${percent(range[1])}` : "";
}
