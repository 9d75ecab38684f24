"use strict";
const start = JSON.parse(document.getElementById("start").textContent);
const at = (id) => document.getElementById(id);
const state = { gallery: start.galleries[0], parts: [], shown: null, follow: true, facts: null, undo: [] };

/* An element with properties and children; text is never read as HTML. */
function make(kind, properties = {}, ...children) {
  const element = document.createElement(kind);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("aria-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

const MARKUP = "http://www.w3.org/2000/svg";
function draw(kind, attributes = {}, text = null) {
  const element = document.createElementNS(MARKUP, kind);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}

/* A request whose error is a sentence. */
async function ask(path, method = "GET", body = null) {
  const headers = body === null ? {} : { "Content-Type": "application/json" };
  const answer = await fetch(path, { method, headers, body: body === null ? null : JSON.stringify(body) });
  const values = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(values.error ? values.error.message : `The service answered ${answer.status}.`);
  return values;
}

const inGallery = (rest = "") => `/v1/galleries/${encodeURIComponent(state.gallery)}${rest}`;
const figure = (value) => value === null || value === undefined ? "–" : Math.abs(value) >= 1000 ? value.toFixed(0) : String(+value.toPrecision(3));
const perThousand = (rate) => { const n = 1000 * rate; return n >= 10 ? n.toFixed(0) : String(+n.toPrecision(2)); };
const counted = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const clock = (seconds) => new Date(1000 * seconds).toLocaleTimeString();
const WORDS = { normal: "OK", anomalous: "DEFECT" };
const kindOf = (part) => part.error ? "error" : part.verdict || "none";
const wordOf = (part) => part.error ? "ERROR" : WORDS[part.verdict] || "NO VERDICT";
const LABELS = { false_alarm: "false alarm", defect: "real defect", unsure: "not sure" };

let toasting = 0;
function say(text, bad = false) {
  const toast = at("toast");
  toast.textContent = text;
  toast.className = bad ? "shown bad" : "shown";
  clearTimeout(toasting);
  toasting = setTimeout(() => { toast.className = ""; }, bad ? 8000 : 4000);
}

/* Runs an action of a button, and says what went wrong. */
async function trying(action, button = null) {
  if (button) button.disabled = true;
  try { await action(); } catch (error) { say(error.message, true); } finally { if (button) button.disabled = false; }
}

function picture(source, text, missing) {
  const image = make("img", { src: source, alt: text, loading: "lazy" });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "missing" }, missing)), { once: true });
  return image;
}
