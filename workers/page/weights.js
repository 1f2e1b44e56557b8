/** Preferences over the basis: objects {name: weight} with weights >= 0 that sum to 1. No DOM here. */

const UNITS = 1000;

export function equalWeights(names) {
  return quantise(Object.fromEntries(names.map((name) => [name, 1 / names.length])));
}

export function oneHot(names, chosen) {
  return Object.fromEntries(names.map((name) => [name, name === chosen ? 1 : 0]));
}

/** The nearest weights in thousandths (or in hundredths with units = 100) that still sum to 1. */
export function quantise(weights, units = UNITS) {
  const parts = Object.entries(weights).map(([name, weight]) => {
    const whole = Math.floor(weight * units + 1e-6);
    return { name, whole, rest: weight * units - whole };
  });
  let missing = units - parts.reduce((sum, part) => sum + part.whole, 0);
  for (const part of [...parts].sort((a, b) => b.rest - a.rest)) {
    if (missing <= 0) break;
    part.whole += 1;
    missing -= 1;
  }
  return Object.fromEntries(parts.map((part) => [part.name, part.whole / units]));
}

/** The nearest allowed weights to any numbers; those in `locked` stay as they are in `current`. */
export function project(target, current = target, locked = new Set()) {
  const result = { ...current };
  const free = Object.keys(target).filter((name) => !locked.has(name));
  const total = 1 - sumOf(current, locked);
  let active = free;
  for (;;) {
    const shift = (total - sumOf(target, active)) / active.length;
    const below = active.filter((name) => target[name] + shift < 0);
    if (below.length === 0 || active.length === 0) {
      for (const name of free) result[name] = active.includes(name) ? Math.max(0, target[name] + shift) : 0;
      return result;
    }
    active = active.filter((name) => !below.includes(name));
  }
}

/** Give one weight a value; the others that are not locked share the rest in their present proportion. */
export function setOne(weights, name, value, locked = new Set()) {
  const others = Object.keys(weights).filter((other) => other !== name && !locked.has(other));
  if (others.length === 0 || locked.has(name)) return weights;
  const available = Math.max(0, 1 - sumOf(weights, locked));
  const mine = Math.min(available, Math.max(0, value));
  const before = sumOf(weights, others);
  const result = { ...weights, [name]: mine };
  for (const other of others) {
    const share = before > 0 ? weights[other] / before : 1 / others.length;
    result[other] = (available - mine) * share;
  }
  return quantise(result);
}

function sumOf(weights, names) {
  let sum = 0;
  for (const name of names) sum += weights[name];
  return sum;
}

export function sameWeights(one, other) {
  return Object.keys(one).every((name) => Math.abs(one[name] - (other[name] ?? 0)) < 0.002);
}

export function percent(weight) {
  return `${Number((weight * 100).toFixed(1))} %`;
}

/** Every weight in words: "brightness 50 %, colourfulness 50 %, compressibility 0 %". */
export function describe(weights) {
  return Object.entries(weights)
    .map(([name, weight]) => `${name} ${percent(weight)}`)
    .join(", ");
}

/** The mix in few words: "brightness alone", "all 3 equally", "brightness 70 % + colourfulness 30 %". */
export function mixLabel(weights) {
  const used = Object.entries(weights).filter(([, weight]) => weight > 0);
  if (used.length === 0) return "no adapter";
  if (used.length === 1) return `${used[0][0]} alone`;
  const values = used.map(([, weight]) => weight);
  if (used.length > 2 && Math.max(...values) - Math.min(...values) < 0.002) return `all ${used.length} equally`;
  return used.map(([name, weight]) => `${name} ${percent(weight)}`).join(" + ");
}
