/* The parts, what a person says of them, thresholds, the normal set; events keep all of it up to date. */
const MARKS = { normal: "M4.5 12.5l5 5 10-11", anomalous: "M6 6l12 12M18 6L6 18", none: "M6 12h12", error: "M12 5v9M12 18.5v.01" };
const CHANGES = { add: "added", remove: "taken out", threshold: "false alarms set", calibrate: "calibrated" };
let looking = 0, rejudging = 0, refreshing = 0, newest = 0, watching = null, page = { first: 0, count: 60 };

function allowed() {
  const scopes = ["read", "inspect", "curate"];
  document.querySelectorAll("[data-scope]").forEach((button) => {
    button.hidden = scopes.indexOf(start.scope) < scopes.indexOf(button.dataset.scope);
  });
}

function show(part) {
  state.shown = part;
  const kind = part ? kindOf(part) : "none";
  at("verdict").className = `banner ${kind}`;
  at("mark").setAttribute("d", MARKS[kind]);
  at("word").textContent = part ? wordOf(part) : "Waiting";
  at("sub").textContent = part ? subOf(part) : "No part has come yet.";
  document.title = part ? `${wordOf(part)} · ${part.name}` : "Inspection · spade-faiss";
  document.querySelectorAll(".part").forEach((row) => {
    if (part && row.dataset.id === part.id) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
  });
  for (const [id, label] of [["false-alarm", "false_alarm"], ["defect", "defect"], ["unsure", "unsure"]]) {
    at(id).classList.toggle("chosen", Boolean(part) && part.label === label);
    at(id).disabled = !part || Boolean(part.error) || (label === "false_alarm" && part.label === label);
  }
  const nearest = part ? part.neighbours.slice(0, 8) : [];
  at("nearest").replaceChildren(...nearest.map((one) => make("li", {},
    picture(inGallery(`/picture?key=${encodeURIComponent(one.key)}&size=240`), one.key, "picture not at hand"),
    one.key, make("small", {}, `squared distance ${figure(one.sq_distance)}`))));
  clearTimeout(looking);
  if (part) looking = setTimeout(() => look(part), 15);
  else { view.part = null; paint(); }
}

function subOf(part) {
  if (part.error) return `${part.name} · ${part.error.message}`;
  const score = part.score === null ? `score ${figure(part.image_score)}` : `score ${part.score.toFixed(2)} (threshold 0.50)`;
  const why = part.p_value === null ? "" : ` · p ${figure(part.p_value)}`;
  const label = part.label ? ` · ${LABELS[part.label]}` : "";
  return `${part.name} · ${score}${why} · ${counted(part.regions.length, "region")} · ${clock(part.at)} · generation ${part.generation} · ${part.ms.toFixed(0)} ms${label}`;
}

function rowOf(part) {
  const row = make("button", { type: "button", class: `part ${kindOf(part)}` },
    part.error ? make("span", { class: "blank" }) : picture(`/v1/inspections/${part.id}/thumbnail`, "", ""),
    make("span", { class: "name" }, part.name), make("span", { class: `pill ${kindOf(part)}` }, wordOf(part)),
    make("span", { class: "when" }, `${clock(part.at)}${part.score === null ? "" : ` · ${part.score.toFixed(2)}`}${part.label ? ` · ${LABELS[part.label]}` : ""}`));
  row.dataset.id = part.id;
  row.addEventListener("click", () => { setFollow(part === state.parts[0]); show(part); });
  return make("li", {}, row);
}

function list() {
  at("parts").replaceChildren(...state.parts.map(rowOf));
  at("older").hidden = state.parts.length < 50;
}

function setFollow(value) {
  state.follow = value;
  at("follow").setAttribute("aria-pressed", value);
  if (value && state.parts.length) show(state.parts[0]);
}

function arrive(part) {
  newest = Math.max(newest, part.number);
  if (part.gallery !== state.gallery || state.parts.some((one) => one.id === part.id)) return;
  const older = state.parts.findIndex((one) => one.number < part.number), place = older < 0 ? state.parts.length : older;
  state.parts.splice(place, 0, part);
  state.parts.length = Math.min(state.parts.length, 300);
  at("parts").insertBefore(rowOf(part), at("parts").children[place] || null);
  while (at("parts").children.length > 300) at("parts").lastChild.remove();
  if (state.follow && !place) show(part);
  soon();
}

function replacePart(id, changes) {
  const part = state.parts.find((one) => one.id === id);
  if (!part) return;
  Object.assign(part, changes);
  const row = document.querySelector(`.part[data-id="${CSS.escape(id)}"]`);
  if (row) row.parentElement.replaceWith(rowOf(part));
  if (state.shown && state.shown.id === id) {
    at("sub").textContent = subOf(part);
    document.querySelector(`.part[data-id="${CSS.escape(id)}"]`)?.setAttribute("aria-current", "true");
    for (const [button, label] of [["false-alarm", "false_alarm"], ["defect", "defect"], ["unsure", "unsure"]]) at(button).classList.toggle("chosen", part.label === label);
    at("false-alarm").disabled = part.label === "false_alarm" || Boolean(part.error);
  }
}

async function facts() {
  const found = state.facts = await ask(inGallery());
  const calibration = found.calibration;
  const judged = !calibration ? "not calibrated" : calibration.stale ? `calibration of generation ${calibration.generation}${found.calibrating ? ", being renewed" : " is stale"}` : `${perThousand(calibration.false_alarms)} false alarms per 1 000`;
  at("facts").textContent = `${found.images} normal images · generation ${found.generation} · ${judged}`;
  at("tick").hidden = !calibration;
  if (calibration) at("tick").style.left = `${100 * Math.min(1, Math.max(0, (calibration.pixel_threshold - found.scale.low) / (found.scale.high - found.scale.low)))}%`;
  at("calibrate").textContent = found.calibrating ? "Calibrating …" : calibration ? "Calibrate again" : "Calibrate";
}

/* What a person says. */
function undoable(what, change) {
  state.undo.push({ what, change });
  at("undo").disabled = false;
  at("undo-what").textContent = what;
}

async function falseAlarm() {
  const part = state.shown;
  if (!part || part.error || part.label === "false_alarm") return;
  say("Adding it to the normal images …");
  const change = await ask(inGallery("/normal"), "POST", { inspection: part.id });
  replacePart(part.id, { label: "false_alarm" });
  if (change.facts.new === false) return say("It was in the normal set already.");
  undoable(`${part.name} is normal`, change);
  say(`It is normal: generation ${change.generation_before} is now ${change.generation_after}.`);
}

async function labelled(label) {
  const part = state.shown;
  if (!part || part.error) return;
  const before = part.label;
  if (before === "false_alarm") throw new Error("It is in the normal set; undo that first.");
  await ask(`/v1/inspections/${part.id}/label`, "PUT", { label });
  replacePart(part.id, { label });
  state.undo.push({ what: `${part.name}: ${LABELS[label]}`, id: part.id, before });
  at("undo").disabled = false;
  at("undo-what").textContent = `${part.name}: ${LABELS[label]}`;
  say(`Kept: ${LABELS[label]}.`);
}

async function undo() {
  const last = state.undo[state.undo.length - 1];
  if (!last) return;
  if (last.change) {
    const change = await ask(`/v1/changes/${last.change.id}/undo`, "POST");
    if (last.change.inspection) replacePart(last.change.inspection, { label: null });
    say(`Taken back: generation ${change.generation_after}.`);
  } else {
    await ask(`/v1/inspections/${last.id}/label`, "PUT", { label: last.before });
    replacePart(last.id, { label: last.before });
    say("Taken back.");
  }
  state.undo.pop();
  const next = state.undo[state.undo.length - 1];
  at("undo-what").textContent = next ? next.what : "nothing more";
  at("undo").disabled = !next;
}

/* Thresholds and statistics. */
let rates = [];
function soon() {
  clearTimeout(refreshing);
  refreshing = setTimeout(() => trying(statistics), 400);
}

async function statistics() {
  const found = await ask(inGallery("/statistics?last=200"));
  const { counts, drift } = found;
  const milliseconds = (value) => value === null ? "–" : value.toFixed(0);
  const rows = [["OK", counts.normal], ["Defect", counts.anomalous], ["Error", counts.errors], ["ms, least", milliseconds(counts.ms_min)], ["ms, mean", milliseconds(counts.ms_mean)], ["ms, most", milliseconds(counts.ms_max)]];
  at("counts").replaceChildren(...rows.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  at("since").textContent = counts.since ? `${counts.parts} parts since ${new Date(1000 * counts.since).toLocaleString()}` : "No part yet.";
  histogram(found.histogram, found.histogram.threshold);
  trend(found.trend);
  at("drift").textContent = drift.p_value === null ? `Not known yet: ${drift.parts} of ${drift.needed} parts` : drift.alarm ? `Alarm: parts have drifted toward ${drift.toward}` : "None seen";
  at("drift").className = drift.alarm ? "drift alarm" : "drift";
  at("drift-text").textContent = drift.p_value === null ? "Scores of parts are compared with those of the normal images." : `Over ${drift.parts} parts: were nothing to drift, scores so unlike those of the normal images would be seen with a chance of ${figure(drift.p_value)}. The alarm is under 0.001.`;
  at("alarm").hidden = !drift.alarm;
  at("alarm").textContent = drift.alarm ? `Parts no longer look as the normal images did (${drift.toward}): look at camera and light, or add what is normal now.` : "";
  const held = document.activeElement === at("rate") || at("apply").dataset.pending === "yes";
  if (!held || found.rates.length !== rates.length) {
    rates = found.rates;
    Object.assign(at("rate"), { max: Math.max(0, rates.length - 1), disabled: !rates.length });
    at("rate").value = rates.findIndex((rate) => rate === found.false_alarms);
    at("apply").dataset.pending = "no";
  }
  if (rates.length) await rejudge(); else { at("rate-now").textContent = "–"; at("rate-text").textContent = "The gallery is not calibrated: there are no verdicts."; }
}

async function rejudge() {
  const rate = rates[at("rate").value];
  if (rate === undefined) return;
  const mine = ++rejudging;
  at("rate-now").textContent = perThousand(rate);
  at("rate").setAttribute("aria-valuetext", `${perThousand(rate)} false alarms per 1 000 parts`);
  const found = await ask(inGallery(`/rejudge?false_alarms=${rate}&last=200`));
  if (mine !== rejudging) return;
  at("rate-text").textContent = `Promised from ${found.images} normal images: a new normal part is called a defect with a chance of ${figure(100 * rate)} % at the most. Image score above ${figure(found.thresholds.image)} and a pixel above ${figure(found.thresholds.pixel)}. In force: ${perThousand(found.in_force)} per 1 000.`;
  at("rate-changes").textContent = `Of the last ${found.parts.length} parts, ${found.anomalous_after} would be defects instead of ${found.anomalous_before}; ${found.changed} verdicts would change.`;
  const flips = found.parts.filter((part) => part.changes).slice(0, 24);
  at("flips").replaceChildren(...flips.map((part) => {
    const button = make("button", { type: "button" }, picture(`/v1/inspections/${part.id}/thumbnail`, "", "no picture"), `${WORDS[part.before] || "–"} → ${WORDS[part.after] || "–"}`);
    button.addEventListener("click", () => { const one = state.parts.find((other) => other.id === part.id); if (one) { setFollow(false); show(one); location.hash = "line"; } });
    return make("li", {}, button);
  }));
  at("apply").disabled = rate === found.in_force;
}

/* The normal set. */
function tile(key, note, removable = true) {
  const button = make("button", { type: "button", "aria-label": `Take ${key} out of the normal set` }, "Take out");
  button.hidden = start.scope !== "curate" || !removable;
  const item = make("li", {}, picture(inGallery(`/picture?key=${encodeURIComponent(key)}&size=320`), key, "picture not at hand"), key, make("span", { class: "soft" }, note), button);
  button.addEventListener("click", () => trying(async () => {
    const change = await ask(inGallery(`/normal/${key.split("/").map(encodeURIComponent).join("/")}`), "DELETE");
    undoable(`${key} taken out`, change);
    item.remove();
    say(`Taken out: generation ${change.generation_before} is now ${change.generation_after}.`);
    await changes();
  }, button));
  return item;
}

async function normal(more = false) {
  page.first = more ? page.first + page.count : 0;
  const found = await ask(inGallery(`/normal?search=${encodeURIComponent(at("search").value)}&first=${page.first}&count=${page.count}`));
  at("normal-facts").textContent = found.found === found.total ? `${found.total} normal images, the newest first` : `${found.found} of ${found.total} normal images`;
  const items = found.images.map((image) => tile(image.key, image.added ? "added here" : ""));
  if (more) at("normal-images").append(...items); else at("normal-images").replaceChildren(...items);
  at("more").hidden = page.first + page.count >= found.found;
}

async function audit() {
  at("normal-facts").textContent = "Each normal image is compared with the others; this takes a while …";
  const found = await ask(inGallery("/audit?top=24"));
  at("normal-facts").textContent = `The ${found.suspects.length} normal images that are least like the others: take out what is a defect.`;
  at("normal-images").replaceChildren(...found.suspects.map((one) => tile(one.key, `${figure(one.outlier_score)} spreads above the median`)));
  at("more").hidden = true;
}

async function changes() {
  const found = await ask(`/v1/changes?gallery=${encodeURIComponent(state.gallery)}&last=50`);
  const undone = new Set(found.changes.filter((one) => one.state === "done").map((one) => one.undoes));
  at("changes").replaceChildren(...found.changes.map((one) => {
    const button = make("button", { type: "button" }, "Take back");
    button.hidden = start.scope !== "curate" || one.state !== "done" || undone.has(one.id) || one.what === "calibrate" || one.facts.new === false;
    button.addEventListener("click", () => trying(async () => { await ask(`/v1/changes/${one.id}/undo`, "POST"); if (one.inspection) replacePart(one.inspection, { label: null }); await Promise.all([changes(), normal()]); }, button));
    const what = one.what === "threshold" ? `false alarms ${perThousand(one.facts.before)} → ${perThousand(one.facts.after)} per 1 000` : CHANGES[one.what] || one.what;
    const generation = one.generation_after === null ? "–" : one.generation_before === null ? String(one.generation_after) : `${one.generation_before} → ${one.generation_after}`;
    return make("tr", {}, make("td", {}, new Date(1000 * one.at).toLocaleString()), make("td", {}, one.who), make("td", {}, one.state === "done" ? what : `${what}: ${one.state}`), make("td", {}, one.key || "–"), make("td", { class: "number" }, generation), make("td", {}, button));
  }));
}

/* Views and events. */
function turn() {
  const name = ["line", "threshold", "normal"].includes(location.hash.slice(1)) ? location.hash.slice(1) : "line";
  for (const one of ["line", "threshold", "normal"]) at(`view-${one}`).hidden = one !== name;
  document.querySelectorAll("[data-view]").forEach((link) => {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  });
  if (name === "threshold") trying(statistics);
  if (name === "normal") trying(async () => { await Promise.all([normal(), changes()]); });
  if (name === "line") fit();
}

async function begin() {
  const shown = state.shown;
  await facts();
  const known = new Set(state.parts), found = (await ask(`/v1/inspections?gallery=${encodeURIComponent(state.gallery)}&last=50`)).inspections;
  newest = found.length ? found[0].number : 0;
  const meanwhile = state.parts.filter((part) => !known.has(part) && part.gallery === state.gallery && part.number > newest);
  state.parts = [...meanwhile, ...found];
  list();
  show((!state.follow && shown && state.parts.find((one) => one.id === shown.id)) || state.parts[0] || null);
  at("exports").replaceChildren(...[["csv", "CSV"], ["jsonl", "JSON lines"], ["coco&judged_only=true", "COCO"], ["masks&judged_only=true", "Masks"]].map(([kind, name]) => make("a", { href: inGallery(`/export?kind=${kind}`), download: "" }, name)));
  await statistics();
}

/* Parts that came after those of `begin` and before the stream. */
async function between() {
  const found = await ask(`/v1/inspections?gallery=${encodeURIComponent(state.gallery)}&last=300&after=${newest}`);
  found.inspections.reverse().forEach(arrive);
}

function connect() {
  const source = new EventSource("/v1/events");
  const on = (kind, act) => source.addEventListener(kind, (event) => { alive(); act(JSON.parse(event.data)); });
  on("hello", () => { trying(watching === "lost" ? begin : between); watching = "on"; });
  on("beat", () => {});
  on("inspection", arrive);
  on("label", ({ id, label }) => replacePart(id, { label }));
  on("change", (change) => { if (change.gallery === state.gallery && !at("view-normal").hidden) trying(changes); });
  on("generation", ({ gallery }) => { if (gallery === state.gallery) { trying(facts); soon(); } });
  on("reset", () => soon());
  on("missed", () => trying(begin));
  source.onerror = () => lost(source);
}

function alive() {
  at("live").className = "live on";
  at("live").lastChild.textContent = "live";
  at("offline").hidden = true;
}

function lost(source) {
  watching = "lost";
  at("live").className = "live off";
  at("live").lastChild.textContent = "offline";
  at("offline").hidden = false;
  if (source.readyState === EventSource.CLOSED) setTimeout(connect, 2000);
}

function step(by) {
  const place = state.parts.findIndex((part) => state.shown && part.id === state.shown.id) + by;
  if (place < 0 || place >= state.parts.length) return;
  setFollow(false);
  show(state.parts[place]);
  document.querySelector(".part[aria-current]")?.scrollIntoView({ block: "nearest" });
}

const KEYS = {
  f: () => at("false-alarm").click(), d: () => at("defect").click(), n: () => at("unsure").click(), z: () => at("undo").click(),
  l: () => setFollow(true), o: toggleOutlines, m: () => { at("opacity").value = at("opacity").value > 0 ? 0 : 80; paint(); },
  "+": () => zoom(1.4), "-": () => zoom(1 / 1.4), "0": fit, ArrowDown: () => step(1), ArrowUp: () => step(-1),
};

function bind() {
  bindPicture();
  at("gallery").addEventListener("change", (event) => { state.gallery = event.target.value; state.follow = true; normals.clear(); trying(begin).then(turn); });
  at("false-alarm").addEventListener("click", (event) => trying(falseAlarm, event.currentTarget).then(() => { at("false-alarm").disabled = !state.shown || state.shown.label === "false_alarm"; }));
  at("defect").addEventListener("click", () => trying(() => labelled("defect")));
  at("unsure").addEventListener("click", () => trying(() => labelled("unsure")));
  at("undo").addEventListener("click", () => trying(undo));
  at("follow").addEventListener("click", () => setFollow(true));
  at("older").addEventListener("click", () => trying(async () => {
    const last = state.parts[state.parts.length - 1];
    const found = await ask(`/v1/inspections?gallery=${encodeURIComponent(state.gallery)}&last=50&before=${last.number}`);
    state.parts.push(...found.inspections);
    at("parts").append(...found.inspections.map(rowOf));
    at("older").hidden = !found.inspections.length;
  }));
  at("rate").addEventListener("input", () => { at("apply").dataset.pending = "yes"; trying(rejudge); });
  at("apply").addEventListener("click", () => trying(async () => {
    const change = await ask(inGallery("/false-alarms"), "PUT", { false_alarms: rates[at("rate").value] });
    undoable("the false-alarm rate", change);
    at("apply").dataset.pending = "no";
    say("Parts are judged by this from now on.");
    await Promise.all([facts(), statistics()]);
  }));
  at("calibrate").addEventListener("click", () => trying(async () => {
    await ask(inGallery("/calibrate"), "POST", { false_alarms: state.facts.calibration ? state.facts.calibration.false_alarms : .01 });
    say("Calibrating in the background.");
    await facts();
  }));
  at("reset").addEventListener("click", () => trying(async () => { await ask(inGallery("/statistics/reset"), "POST"); await statistics(); }));
  at("search-form").addEventListener("submit", (event) => event.preventDefault());
  at("search").addEventListener("input", () => trying(() => normal()));
  at("more").addEventListener("click", () => trying(() => normal(true)));
  at("audit").addEventListener("click", (event) => trying(audit, event.currentTarget));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const act = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (act && !at("view-line").hidden) { event.preventDefault(); act(); }
  });
  window.addEventListener("hashchange", turn);
}

allowed();
bind();
trying(begin).then(() => { turn(); connect(); });
