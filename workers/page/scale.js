/** Axes of a plot: from values to pixels, with round ticks. No DOM here. */

const MARGIN = 0.06;

/** A linear scale that covers all values with a little room: {at(value), ticks, digits}. */
export function linearScale(values, from, to, wanted = 5) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const room = (most - least || 1) * MARGIN;
  const [low, high] = [least - room, most + room];
  const step = roundStep((high - low) / wanted);
  const ticks = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return {
    at: (value) => from + ((value - low) / (high - low)) * (to - from),
    ticks,
    digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)),
  };
}

function roundStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999);
}

/** A number as people read it, with a real minus sign. */
export function write(value, digits) {
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
}

/** Points that no other beats in both rewards, from left to right. */
export function frontOf(points, x, y) {
  const better = (one, other) => one[x] >= other[x] && one[y] >= other[y] && (one[x] > other[x] || one[y] > other[y]);
  return points.filter((point) => !points.some((other) => better(other, point))).sort((a, b) => a[x] - b[x]);
}
