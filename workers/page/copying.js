/** Text to the clipboard, also where the page came over plain HTTP and the browser offers no clipboard. */

import { byId, el } from "./dom.js";

const TOAST_MS = 2200;
let timer = null;

export async function copy(text, what) {
  const done = (await writeText(text)) || selectAndCopy(text);
  toast(done ? `${what} copied.` : "The browser would not copy it.");
}

async function writeText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}

function selectAndCopy(text) {
  const field = el("textarea", { class: "visually-hidden", "aria-hidden": "true", readonly: true });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

function toast(text) {
  const box = byId("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(() => (box.hidden = true), TOAST_MS);
}
