/** What people call the methods; the words of the evaluation report. */

const METHODS = {
  base: ["Base model", "The model before any tuning."],
  adapter: ["Adapter alone", "One tuned model; no mixing."],
  mpa: ["Blend (MPA)", "Mixes the adapters' predictions at every step. Most faithful; costs one model per adapter."],
  ls: ["Sampled blend (LS)", "Draws one adapter per step, in proportion to the weights. The cost of a single model."],
  soup: ["Weight average (soup)", "Averages the adapters' weights once. The cost of a single model."],
  staged: ["Staged blend", "Blends predictions in the first steps and weights after. The cost of a single model."],
  cached: ["Cached blend", "Averages the weights and adds what that lacked of the blend a few steps ago."],
};

/** Drawn once for every method: no blending happens there. */
export const ANCHORS = new Set(["base", "adapter"]);

export const methodName = (method) => METHODS[method]?.[0] ?? method;
export const methodAbout = (method) => METHODS[method]?.[1] ?? "";
