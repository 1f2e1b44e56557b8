/** Puts the page together: card -> controls -> store -> runner -> picture, strip, history and plot. */

import { ApiError, fetchCard, fetchEvaluation, hasToken, keepToken, ROOT } from "./api.js";
import { copy } from "./copying.js";
import { createDial } from "./dial.js";
import { byId } from "./dom.js";
import { clearFieldErrors, createForm, showFieldError } from "./form.js";
import { History } from "./history.js";
import { Pareto } from "./pareto.js";
import { remember } from "./results.js";
import { Runner } from "./runner.js";
import { defaultSettings } from "./settings.js";
import { createSliders } from "./sliders.js";
import { asCurl, asPython } from "./snippets.js";
import { clearMessage, createStage, showMessage } from "./stage.js";
import { Store } from "./store.js";
import { Strip } from "./strip.js";
import { createTriangle } from "./triangle.js";

async function boot() {
  byId("boot-error").hidden = true;
  let card;
  try {
    card = await fetchCard();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    return error.status === 401 ? askForToken(boot) : failToBoot(error);
  }
  start(card);
}

function failToBoot(error) {
  byId("boot-error-text").textContent = error.message;
  byId("boot-error").hidden = false;
}

/** Ask for a bearer token, then go on with `then`. */
function askForToken(then) {
  const form = byId("token-form");
  const again = hasToken();
  byId("error-token").textContent = again ? "That token was not accepted." : "";
  byId("error-token").hidden = !again;
  form.hidden = false;
  byId("token").value = "";
  byId("token").focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    keepToken(byId("token").value.trim());
    form.hidden = true;
    then();
  };
}

function start(card) {
  const names = card.basis.map((adapter) => adapter.name);
  const { name, version } = card.bundle;
  byId("bundle").textContent = version === null ? name : `${name}@${version}`;
  byId("app").hidden = false;
  const store = new Store(card, defaultSettings(card));
  const past = new History((settings, result) => {
    remember(settings, result);
    store.update({ ...settings });
  });
  const strip = names.length > 1 ? new Strip(names, (weights) => store.update({ weights })) : null;
  const runner = new Runner(createStage(hooksFor(past, strip, () => runner.again())));
  const views = [createForm(card, store), createDial(card, store), ...preferenceViews(card, names, store)];
  if (strip) views.push((settings) => strip.show(settings));
  byId("compare").hidden = strip === null;
  store.subscribe((settings, change) => {
    for (const view of views) view(settings);
    if (change.locks) return;
    clearFieldErrors();
    strip?.pause();
    runner.want(settings, { force: change.force, atOnce: change.gesture === null });
  });
  for (const view of views) view(store.settings);
  followActions(card, store, runner);
  runner.want(store.settings, { atOnce: true });
  showEvaluation(card, names, store, views);
}

/** With one adapter there is nothing to prefer; a triangle needs three. */
function preferenceViews(card, names, store) {
  byId("preference").hidden = names.length < 2;
  if (names.length < 2) return [];
  const views = [createSliders(byId("sliders"), card.basis, store)];
  if (names.length === 3) views.push(createTriangle(byId("triangle"), names, store));
  return views;
}

function hooksFor(past, strip, again) {
  return {
    began() {
      clearFieldErrors();
      strip?.pause();
    },
    done(settings, result) {
      past.add(settings, result);
      strip?.showOwn(result);
      strip?.resume();
    },
    cancelled: () => strip?.pause(),
    failed(error) {
      strip?.pause();
      if (error.status === 401) return askForToken(again);
      if (!showFieldError(error.param, error.message)) showMessage(error.message, "Try again");
      else clearMessage();
    },
  };
}

function followActions(card, store, runner) {
  byId("cancel").addEventListener("click", () => runner.cancel());
  byId("retry").addEventListener("click", () => runner.again());
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") runner.cancel();
  });
  const options = () => ({ token: hasToken(), model: card.id });
  byId("copy-link").addEventListener("click", () => copy(location.href, "Link"));
  byId("copy-curl").addEventListener("click", () => {
    copy(asCurl(store.settings, ROOT, options()), "curl command");
  });
  byId("copy-python").addEventListener("click", () => {
    copy(asPython(store.settings, ROOT, options()), "Python script");
  });
}

async function showEvaluation(card, names, store, views) {
  let evaluation;
  try {
    evaluation = await fetchEvaluation();
  } catch (error) {
    byId("pareto-missing").textContent = `The evaluation could not be read: ${error.message}`;
    return;
  }
  if (evaluation === null) return offerEvaluation(card);
  byId("pareto-missing").hidden = true;
  byId("pareto").hidden = false;
  const plot = new Pareto(evaluation, names, (point) => store.update(settingsOf(point, store)));
  byId("evaluated").textContent = describeEvaluation(evaluation);
  const view = (settings) => plot.show(settings);
  views.push(view);
  view(store.settings);
}

function offerEvaluation({ bundle }) {
  byId("pareto-missing").textContent = "There is no evaluation of this bundle yet. This makes one:";
  const name = bundle.version === null ? "NAME@VERSION" : `${bundle.name}@${bundle.version}`;
  byId("evaluate-command").textContent = `diffusion-blend evaluate infra/runs/evaluate_quick.toml --bundle ${name}`;
  byId("evaluate-command").parentElement.hidden = false;
}

function describeEvaluation({ date, prompts, seeds, num_inference_steps: steps, guidance_scale: guidance }) {
  const size = `${count(prompts, "prompt")} × ${count(seeds, "seed")}, ${steps} steps, guidance ${guidance}`;
  return `Measured ${date}: ${size}; thin lines are 95 % intervals. Up and right is better; a click moves the picker.`;
}

const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

/** The base and the adapters alone belong to every method. */
function settingsOf(point, store) {
  if (point.method === "base") return { kl_lambda: 0 };
  const names = Object.keys(store.settings.weights);
  const weights = Object.fromEntries(names.map((name) => [name, point.weights[name] ?? 0]));
  if (point.method === "adapter") return { weights, kl_lambda: point.kl_lambda };
  return { weights, kl_lambda: point.kl_lambda, method: point.method };
}

byId("boot-retry").addEventListener("click", boot);
boot();
