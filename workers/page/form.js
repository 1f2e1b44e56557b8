/** The plain fields: prompt, method, seed, steps and guidance, and the errors that name them. */

import { byId, el } from "./dom.js";
import { methodAbout, methodName } from "./methods.js";
import { EXAMPLES, newSeed } from "./settings.js";

/** Fills the fields and moves `store`; returns a function that shows settings. */
export function createForm(card, store) {
  byId("prompt").maxLength = card.limits.max_prompt_chars;
  byId("steps").max = card.limits.max_steps;
  byId("method").replaceChildren(
    ...card.methods.map((method) => el("option", { value: method }, methodName(method))),
  );
  followPrompt(store);
  byId("method").addEventListener("change", (event) => store.update({ method: event.target.value }));
  byId("new-seed").addEventListener("click", () => store.update({ seed: newSeed() }));
  followNumber("seed", store, (seed) => ({ seed: Math.round(seed) }));
  followNumber("steps", store, (steps) => ({ steps: Math.round(steps) }));
  followNumber("guidance", store, (guidance) => ({ guidance }));
  const shown = {};
  return (settings) => {
    // What is being typed stays while something else moves.
    for (const name of ["prompt", "method", "seed", "steps", "guidance"]) {
      if (shown[name] !== settings[name]) byId(name).value = shown[name] = settings[name];
    }
    fitPrompt();
    byId("method-about").textContent = methodAbout(settings.method);
  };
}

function followPrompt(store) {
  const field = byId("prompt");
  const submit = () => {
    const prompt = field.value.trim();
    if (prompt) store.update({ prompt }, { force: true });
    else showFieldError("prompt", "Write what to draw first.");
  };
  field.addEventListener("change", () => {
    const prompt = field.value.trim();
    if (prompt) store.update({ prompt });
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  field.addEventListener("input", fitPrompt);
  addEventListener("resize", fitPrompt);
  byId("examples").replaceChildren(
    ...EXAMPLES.map((prompt) => {
      const chip = el("button", { type: "button", class: "chip" }, prompt);
      chip.addEventListener("click", () => store.update({ prompt }));
      return chip;
    }),
  );
}

function fitPrompt() {
  const field = byId("prompt");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

/** A number goes into force when it was typed in full and lies within the field's bounds. */
function followNumber(id, store, patch) {
  const field = byId(id);
  field.addEventListener("change", () => {
    if (field.value !== "" && field.checkValidity()) store.update(patch(field.valueAsNumber));
    else field.value = store.settings[id];
  });
}

const FIELDS = {
  prompt: "prompt",
  weights: "sliders",
  kl_lambda: "lambda",
  method: "method",
  seed: "seed",
  num_inference_steps: "steps",
  guidance_scale: "guidance",
};

/** Put a sentence beside the control that `param` names; false when no control of ours bears that name. */
export function showFieldError(param, message) {
  const name = (param ?? "").split(".")[0];
  if (!(name in FIELDS)) return false;
  const note = byId(`error-${name}`);
  note.textContent = withoutPrefix(message, param);
  note.hidden = false;
  byId(FIELDS[name]).setAttribute("aria-invalid", "true");
  const details = note.closest("details");
  if (details) details.open = true;
  return true;
}

/** The server begins with the field's name, which the reader sees anyway. */
function withoutPrefix(message, param) {
  const text = message.startsWith(`${param}: `) ? message.slice(param.length + 2) : message;
  return text.charAt(0).toUpperCase() + text.slice(1);
}

export function clearFieldErrors() {
  for (const [name, id] of Object.entries(FIELDS)) {
    byId(`error-${name}`).hidden = true;
    byId(id).removeAttribute("aria-invalid");
  }
}
