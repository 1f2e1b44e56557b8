/** The latest evaluation: two rewards against each other, with intervals, and what to expect here. */

import { byId, el, svg } from "./dom.js";
import { expectRewards } from "./expected.js";
import { marker, legendMarker } from "./markers.js";
import { ANCHORS, methodName } from "./methods.js";
import { frontOf, linearScale, write } from "./scale.js";
import { mixLabel } from "./weights.js";

const EDGE = { left: 62, right: 14, top: 12, bottom: 44 };
const PLACES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

export class Pareto {
  #settings = null;
  shapes = new Map();
  focused = null;

  constructor(evaluation, names, onPick) {
    Object.assign(this, { evaluation, names, onPick });
    this.axes = evaluation.rewards.slice(0, 2);
    if (this.axes.length < 2) this.axes = [evaluation.rewards[0], evaluation.rewards[0]];
    this.#offerAxes();
    this.#drawLegend();
    new ResizeObserver(() => this.#draw()).observe(byId("plot"));
    byId("plot").addEventListener("keydown", (event) => this.#step(event));
  }

  show(settings) {
    const drawn = this.#settings?.method === settings.method;
    this.#settings = settings;
    if (drawn) this.#showHere();
    else this.#draw();
  }

  #offerAxes() {
    ["axis-x", "axis-y"].forEach((id, index) => {
      const select = byId(id);
      select.replaceChildren(...this.evaluation.rewards.map((name) => el("option", { value: name }, name)));
      select.value = this.axes[index];
      select.addEventListener("change", () => {
        const other = 1 - index;
        if (this.axes[other] === select.value) {
          this.axes[other] = this.axes[index];
          byId(["axis-x", "axis-y"][other]).value = this.axes[other];
        }
        this.axes[index] = select.value;
        this.#draw();
      });
    });
  }

  #drawLegend() {
    const methods = [...new Set(this.evaluation.points.map((point) => point.method))];
    byId("legend").replaceChildren(
      ...methods.map((method) => el("li", {}, legendMarker(method), methodName(method))),
    );
  }

  #draw() {
    const root = byId("plot");
    const width = root.clientWidth;
    if (!this.#settings || width === 0) return;
    const height = Math.round(Math.min(430, Math.max(290, width * 0.72)));
    const [x, y] = this.axes.map((reward, index) => {
      const ends = this.evaluation.points.flatMap(({ rewards }) => [rewards[reward].low, rewards[reward].high]);
      const span = index === 0 ? [EDGE.left, width - EDGE.right] : [height - EDGE.bottom, EDGE.top];
      return linearScale(ends, ...span, index === 0 && width < 420 ? 4 : 6);
    });
    this.scales = [x, y];
    const picture = svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      height,
      role: "group",
      "aria-label": `${this.axes[0]} against ${this.axes[1]}; arrow keys go from point to point`,
    });
    picture.append(...frame(x, y, width, height, this.axes), this.#front(), ...this.#points());
    this.here = svg("g", { class: "here" }, svg("circle", { r: 9 }), svg("circle", { r: 3, class: "core" }));
    picture.append(this.here);
    byId("tip").hidden = true;
    const focused = root.contains(document.activeElement) ? this.focused : null;
    root.replaceChildren(picture);
    this.shapes.get(focused)?.focus();
    this.#showHere();
  }

  /** A thin line through what the current method reaches and nothing of it beats. */
  #front() {
    const mine = this.evaluation.points
      .filter(({ method }) => method === this.#settings.method || ANCHORS.has(method))
      .map(({ rewards }) => ({ x: rewards[this.axes[0]].mean, y: rewards[this.axes[1]].mean }));
    const line = frontOf(mine, "x", "y").map(({ x, y }) => `${this.scales[0].at(x)},${this.scales[1].at(y)}`);
    return svg("polyline", { class: "front", points: line.join(" ") });
  }

  #points() {
    const rank = ({ method }) => (method === this.#settings.method ? 2 : ANCHORS.has(method) ? 1 : 0);
    const ordered = [...this.evaluation.points].sort((a, b) => rank(a) - rank(b));
    this.shapes = new Map(ordered.map((point) => [point, this.#point(point, rank(point))]));
    const first = this.shapes.get(this.focused ?? ordered.at(-1));
    first?.setAttribute("tabindex", 0);
    return this.shapes.values();
  }

  #point(point, rank) {
    const [across, up] = this.axes.map((reward) => point.rewards[reward]);
    const [x, y] = this.scales;
    const at = { x: x.at(across.mean), y: y.at(up.mean) };
    const shape = svg(
      "g",
      {
        class: `point ${["other", "anchor", "own"][rank]}`,
        role: "button",
        tabindex: -1,
        "aria-label": `${labelOf(point)}: ${this.axes.map((reward) => valueOf(point, reward)).join("; ")}`,
      },
      svg("line", { class: "whisker", x1: x.at(across.low), x2: x.at(across.high), y1: at.y, y2: at.y }),
      svg("line", { class: "whisker", x1: at.x, x2: at.x, y1: y.at(up.low), y2: y.at(up.high) }),
      svg("circle", { class: "target", cx: at.x, cy: at.y, r: 12 }),
      svg("g", { transform: `translate(${at.x} ${at.y})` }, marker(point.method)),
    );
    shape.dataset.x = at.x;
    const pick = () => this.onPick(point);
    shape.addEventListener("click", pick);
    shape.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      pick();
    });
    shape.addEventListener("focus", () => (this.focused = point));
    for (const event of ["pointerenter", "focus"]) shape.addEventListener(event, () => this.#tip(point, at));
    for (const event of ["pointerleave", "blur"]) shape.addEventListener(event, () => (byId("tip").hidden = true));
    return shape;
  }

  /** One stop of the tab order; the arrows go on from there, from left to right. */
  #step(event) {
    const points = [...byId("plot").querySelectorAll(".point")].sort((a, b) => a.dataset.x - b.dataset.x);
    const index = points.indexOf(document.activeElement);
    const next = points[index + PLACES[event.key]];
    if (index < 0 || !next) return;
    event.preventDefault();
    points[index].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }

  #tip(point, at) {
    const tip = byId("tip");
    const values = this.evaluation.rewards.map((reward) => el("span", {}, valueOf(point, reward)));
    tip.replaceChildren(el("strong", {}, labelOf(point)), ...values);
    tip.hidden = false;
    const room = byId("plot").clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(room, at.x - tip.offsetWidth / 2))}px`;
    tip.style.top = `${at.y > tip.offsetHeight + 18 ? at.y - tip.offsetHeight - 14 : at.y + 16}px`;
  }

  #showHere() {
    const expected = expectRewards(this.evaluation, this.#settings, this.names);
    this.here.toggleAttribute("hidden", expected === null);
    byId("expected").textContent = this.#expectation(expected);
    if (expected === null) return;
    const [x, y] = this.axes.map((reward, index) => this.scales[index].at(expected.rewards[reward]));
    this.here.setAttribute("transform", `translate(${x} ${y})`);
    this.here.classList.toggle("beyond", expected.beyond);
  }

  #expectation(expected) {
    if (expected === null) return `${methodName(this.#settings.method)} was not evaluated: no expectation here.`;
    const values = this.evaluation.rewards.map((reward) => `${reward} ${write(expected.rewards[reward], 2)}`);
    const beyond = expected.beyond ? " This lambda is beyond what was evaluated." : "";
    return `You (the ring), expected, interpolated: ${values.join(", ")}.${beyond}`;
  }
}

function frame(x, y, width, height, axes) {
  const [left, right, top, bottom] = [EDGE.left, width - EDGE.right, EDGE.top, height - EDGE.bottom];
  return [
    ...x.ticks.map((tick) => svg("line", { class: "rule", x1: x.at(tick), x2: x.at(tick), y1: top, y2: bottom })),
    ...y.ticks.map((tick) => svg("line", { class: "rule", x1: left, x2: right, y1: y.at(tick), y2: y.at(tick) })),
    ...x.ticks.map((tick) =>
      svg("text", { class: "tick", x: x.at(tick), y: bottom + 17, "text-anchor": "middle" }, write(tick, x.digits)),
    ),
    ...y.ticks.map((tick) =>
      svg("text", { class: "tick", x: left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, write(tick, y.digits)),
    ),
    svg("text", { class: "axis", x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, `${axes[0]} →`),
    svg(
      "text",
      { class: "axis", transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
      `${axes[1]} →`,
    ),
  ];
}

function labelOf(point) {
  if (point.method === "base") return methodName("base");
  if (point.method === "adapter") return mixLabel(point.weights);
  const dial = point.kl_lambda === 1 ? "" : `, λ ${point.kl_lambda}`;
  return `${methodName(point.method)}, ${mixLabel(point.weights)}${dial}`;
}

function valueOf(point, reward) {
  const { mean, low, high } = point.rewards[reward];
  return `${reward} ${write(mean, 3)} (${write(low, 3)} to ${write(high, 3)})`;
}
