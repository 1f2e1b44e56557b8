/** The preference over three adapters as a point in a triangle, by drag, click and arrow keys. */

import { svg } from "./dom.js";
import { describe, equalWeights, oneHot, project } from "./weights.js";

const WIDTH = 340;
const HEIGHT = 318;
const CORNERS = [
  { x: 170, y: 32 },
  { x: 20, y: 290 },
  { x: 320, y: 290 },
];
const REACH = 285;
const KEY_STEP = 15;
const FINE_STEP = 3;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Draws into `root` and moves `store`; returns a function that shows settings. */
export function createTriangle(root, names, store) {
  const handle = svg("g", { class: "handle" }, svg("circle", { class: "halo", r: 20 }), svg("circle", { r: 10 }));
  const picture = svg(
    "svg",
    {
      class: "triangle",
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      role: "slider",
      tabindex: 0,
      "aria-label": "Preference between the rewards",
      "aria-roledescription": "triangle picker",
      "aria-describedby": "triangle-help",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
    },
    ...shading(),
    ...gridLines(),
    ...labels(names),
    handle,
  );
  root.replaceChildren(picture);
  followPointer(picture, names, store);
  followKeys(picture, names, store);
  return ({ weights }) => {
    const at = toPoint(names.map((name) => weights[name]));
    handle.setAttribute("transform", `translate(${at.x} ${at.y})`);
    picture.setAttribute("aria-valuenow", Math.round(weights[names[0]] * 100));
    picture.setAttribute("aria-valuetext", describe(weights));
  };
}

function toPoint(shares) {
  const mix = (axis) => shares.reduce((sum, share, index) => sum + share * CORNERS[index][axis], 0);
  return { x: mix("x"), y: mix("y") };
}

/** Barycentric coordinates of a point; negative outside the triangle. */
function toWeights(point, names) {
  const [a, b, c] = CORNERS;
  const area = (b.y - c.y) * (a.x - c.x) + (c.x - b.x) * (a.y - c.y);
  const first = ((b.y - c.y) * (point.x - c.x) + (c.x - b.x) * (point.y - c.y)) / area;
  const second = ((c.y - a.y) * (point.x - c.x) + (a.x - c.x) * (point.y - c.y)) / area;
  return { [names[0]]: first, [names[1]]: second, [names[2]]: 1 - first - second };
}

function followPointer(picture, names, store) {
  let drags = 0;
  const aim = (event) => {
    const box = picture.getBoundingClientRect();
    const point = {
      x: ((event.clientX - box.left) / box.width) * WIDTH,
      y: ((event.clientY - box.top) / box.height) * HEIGHT,
    };
    store.aim(toWeights(point, names), { gesture: `drag ${drags}`, units: 100 });
  };
  picture.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    drags += 1;
    picture.setPointerCapture(event.pointerId);
    picture.classList.add("dragging");
    aim(event);
  });
  picture.addEventListener("pointermove", (event) => {
    if (picture.hasPointerCapture(event.pointerId)) aim(event);
  });
  for (const end of ["pointerup", "pointercancel"]) {
    picture.addEventListener(end, () => picture.classList.remove("dragging"));
  }
}

function followKeys(picture, names, store) {
  picture.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = ARROWS[event.key];
    const corner = names[Number(event.key) - 1];
    if (arrow) {
      const shares = names.map((name) => store.settings.weights[name]);
      const at = toPoint(shares);
      const step = event.shiftKey ? FINE_STEP : KEY_STEP;
      const target = toWeights({ x: at.x + arrow[0] * step, y: at.y + arrow[1] * step }, names);
      store.aim(project(target), { gesture: "triangle keys" });
    } else if (event.key === "Home") {
      store.update({ weights: equalWeights(names) });
    } else if (corner) {
      store.update({ weights: oneHot(names, corner) });
    } else {
      return;
    }
    event.preventDefault();
  });
}

/** The colour of each corner, fading on the way to the others. */
function shading() {
  const outline = CORNERS.map(({ x, y }) => `${x},${y}`).join(" ");
  const gradients = CORNERS.map((corner, index) => {
    const { x: cx, y: cy } = corner;
    const stops = ["", "soft", "clear"].map((kind, step) =>
      svg("stop", { offset: [0, 0.48, 1][step], class: `stop-${index} ${kind}` }),
    );
    const place = { gradientUnits: "userSpaceOnUse", cx, cy, r: REACH };
    return svg("radialGradient", { id: `corner-${index}`, ...place }, ...stops);
  });
  return [
    svg("defs", {}, ...gradients),
    svg("polygon", { points: outline, class: "ground" }),
    ...CORNERS.map((_, index) => svg("polygon", { points: outline, fill: `url(#corner-${index})` })),
    svg("polygon", { points: outline, class: "outline" }),
  ];
}

/** Thin lines where one weight is 25, 50 and 75 %. */
function gridLines() {
  return [0, 1, 2].flatMap((index) =>
    [0.25, 0.5, 0.75].map((share) => {
      const ends = [1, 2].map((offset) => {
        const shares = [0, 0, 0];
        shares[index] = share;
        shares[(index + offset) % 3] = 1 - share;
        return toPoint(shares);
      });
      return svg("line", { class: "grid", x1: ends[0].x, y1: ends[0].y, x2: ends[1].x, y2: ends[1].y });
    }),
  );
}

function labels(names) {
  const places = [
    { x: CORNERS[0].x, y: 18, "text-anchor": "middle" },
    { x: 2, y: HEIGHT - 6, "text-anchor": "start" },
    { x: WIDTH - 2, y: HEIGHT - 6, "text-anchor": "end" },
  ];
  return names.map((name, index) =>
    svg("text", { ...places[index], class: `corner ink-${index}` }, shorten(name), svg("title", {}, name)),
  );
}

const shorten = (name) => (name.length > 20 ? `${name.slice(0, 19)}…` : name);
