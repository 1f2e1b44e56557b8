/** A shape per method, the same as in the evaluation report, so that nothing depends on colour alone. */

import { svg } from "./dom.js";

const POLYGONS = {
  soup: "-5,-5 5,-5 5,5 -5,5",
  ls: "0,-6.2 5.8,4.4 -5.8,4.4",
  cached: "0,6.2 5.8,-4.4 -5.8,-4.4",
  staged: "0,-6.5 6.5,0 0,6.5 -6.5,0",
  adapter: "0,-6.5 6.5,0 0,6.5 -6.5,0",
};

export const inkOf = (method) => (/^(mpa|ls|soup|staged|cached)$/.test(method) ? `method-${method}` : "method-other");

export function marker(method) {
  const points = POLYGONS[method];
  const attributes = { class: `marker ${inkOf(method)}` };
  return points ? svg("polygon", { ...attributes, points }) : svg("circle", { ...attributes, r: 5.2 });
}

/** A marker on its own, for a legend. */
export function legendMarker(method) {
  return svg("svg", { viewBox: "-8 -8 16 16", width: 16, height: 16, "aria-hidden": "true" }, marker(method));
}
