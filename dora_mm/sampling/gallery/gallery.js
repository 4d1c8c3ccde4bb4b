"use strict";
// Everything that a run says (prompts, settings, scores) reaches the page as text: textContent, value, setAttribute of
// alt and aria-label. No HTML is ever built from it.

const { columns, pictures } = JSON.parse(document.getElementById("data").textContent);
pictures.forEach((picture, number) => Object.assign(picture, { number }));

const find = (id) => document.getElementById(id);
const main = find("main"), viewer = find("viewer");
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

const PROMPT = columns.findIndex((column) => column.kind === "setting" && column.name === "prompt");
const RUN = columns.findIndex((column) => column.kind === "run");
const FEW = 3; // a score with at most this many values, such as 0 and 1, can be chosen like a setting

const isBefore = new Set(pictures.map((picture) => picture.before).filter((number) => number !== null));

const state = {
  words: [], chosen: new Map(), sort: -1, descending: false, view: "grid", onlyFavourites: false, shown: [], open: -1,
};

function make(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// --- values as text -----------------------------------------------------------------------------------------------

const heading = (column) => column.name.replaceAll("_", " ");

function textOf(value) {
  if (value === null) return "none";
  if (value === "") return "(empty)";
  if (typeof value === "number") return String(Number(value.toPrecision(6)));
  return typeof value === "string" ? value : JSON.stringify(value);
}

const scoreOf = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));

// The distinct values of a column, in order, by their JSON; with short names: of paths the end, where that is enough.
const distinct = columns.map((_, index) => {
  const found = new Map(pictures.map((picture) => [JSON.stringify(picture.values[index]), picture.values[index]]));
  const ordered = index === RUN ? [...found] : [...found].sort(([, one], [, other]) => compare(one, other));
  const ends = new Set(ordered.map(([, value]) => pathEnd(textOf(value))));
  const name = (value) => (ends.size === ordered.length ? pathEnd(textOf(value)) : textOf(value));
  return new Map(ordered.map(([key, value]) => [key, name(value)]));
});

function pathEnd(text) {
  if (/\s/.test(text)) return text; // no path, but a sentence
  const paths = text.replace(/\/adapter(?=$|[:+])/g, "").split("+"); // "adapter": the folder in a run
  return paths.map((path) => path.split("/").slice(-2).join("/")).join("+");
}

const shortOf = (picture, index) => distinct[index].get(JSON.stringify(picture.values[index]));
const promptOf = (picture) => (PROMPT < 0 || picture.values[PROMPT] === null ? "" : textOf(picture.values[PROMPT]));

function compare(one, other) {
  if (one === null || other === null) return (one === null) - (other === null);
  if (typeof one === "number" && typeof other === "number") return one - other;
  return collator.compare(textOf(one), textOf(other));
}

// --- which pictures are shown, and in which order -----------------------------------------------------------------

function isShown(picture) {
  const prompt = promptOf(picture).toLowerCase();
  if (!state.words.every((word) => prompt.includes(word))) return false;
  if (state.onlyFavourites && !favourites.has(nameOf(picture))) return false;
  return [...state.chosen].every(([index, key]) => JSON.stringify(picture.values[index]) === key);
}

function inOrder(one, other) {
  const [a, b] = [one, other].map((picture) => (state.sort < 0 ? picture.number : picture.values[state.sort]));
  const order = compare(a, b);
  return state.descending && a !== null && b !== null ? -order : order; // pictures without the value stay at the end
}

function render() {
  let shown = pictures.filter(isShown).sort(inOrder);
  if (state.view === "runs") {
    const groups = Map.groupBy(shown, (picture) => picture.group);
    shown = [...groups.values()].flat();
    main.replaceChildren(make("div", { className: "groups" }, ...[...groups.values()].map(groupOf)));
  } else {
    const pairs = state.view === "pairs";
    // Pairs first; a bare picture is seen in its pair, unless a filter has left the pair out.
    if (pairs) {
      const paired = new Set(shown.map((picture) => picture.before));
      shown = shown.filter((picture) => !paired.has(picture.number));
      shown = [...shown.filter((picture) => picture.before !== null), ...shown.filter((picture) => picture.before === null)];
    }
    const items = shown.map((picture) => make("li", {}, cardOf(picture)));
    main.replaceChildren(make("ol", { className: pairs ? "grid pairs" : "grid" }, ...items));
  }
  shown.forEach((picture, position) => showFacts(picture, [shown[position - 1], shown[position + 1]]));
  state.shown = shown;
  if (!shown.length) main.replaceChildren(make("p", { className: "empty", textContent: "No picture matches." }));
  const failed = shown.filter((picture) => !picture.file).length;
  const all = shown.length === pictures.length ? "" : ` of ${pictures.length}`;
  find("count").textContent =
    `${shown.length}${all} picture${pictures.length === 1 ? "" : "s"}${failed ? `, ${failed} not drawn` : ""}`;
  find("clear").hidden = !state.chosen.size && !state.words.length;
  showFavourites();
}

// --- cards --------------------------------------------------------------------------------------------------------

const cards = new Map();

function cardOf(picture) {
  if (!cards.has(picture)) cards.set(picture, makeCard(picture));
  const card = cards.get(picture);
  const tile = card.querySelector(".tile"), before = pictures[picture.before];
  tile.querySelector(".of-before")?.remove();
  tile.classList.toggle("pair", state.view === "pairs" && Boolean(before));
  if (tile.classList.contains("pair")) tile.prepend(imageOf(before, "of-before"));
  card.querySelector(".star").classList.toggle("off", !favourites.has(nameOf(picture)));
  const badge = card.querySelector(".badge");
  const column = columns[state.sort];
  badge.hidden = column?.kind !== "score" || picture.values[state.sort] === null;
  badge.textContent = badge.hidden ? "" : scoreOf(picture.values[state.sort]);
  return card;
}

function makeCard(picture) {
  const card = make("button", { className: "card", type: "button" });
  const tile = make("span", { className: "tile" }, make("span", { className: "badge" }), starOf());
  if (picture.file) {
    tile.prepend(imageOf(picture));
  } else {
    tile.classList.add("missing");
    const status = textOf(picture.values[columns.findIndex((column) => column.kind === "status")]);
    tile.prepend(make("b", { textContent: status }), make("span", { textContent: picture.reason ?? "" }));
  }
  const facts = make("span", { className: "facts" });
  card.append(tile, make("span", { className: "caption", dir: "auto", textContent: promptOf(picture) }), facts);
  card.addEventListener("click", () => openViewer(picture));
  return card;
}

function imageOf(picture, className = "") {
  const [width, height] = picture.size;
  return make("img", { className, src: picture.thumbnail, alt: "", width, height, loading: "lazy", decoding: "async" });
}

function starOf() {
  const star = find("favourite").querySelector("svg").cloneNode(true);
  star.setAttribute("class", "star off");
  return star;
}

// What tells a picture from others, in few words: settings that differ between pictures, unless the prompt says them.
// What differs between neighbours stands first.
function showFacts(picture, neighbours) {
  const prompt = promptOf(picture).toLowerCase();
  const facts = columns.flatMap((column, index) => {
    if (!column.varies || index === PROMPT || column.kind === "score" || column.kind === "status") return [];
    if (column.name === "strength" && settingOf(picture, "adapter") === null) return []; // there is nothing to be weaker
    const text = factOf(column, picture.values[index], shortOf(picture, index));
    if (text === null || prompt.includes(text.toLowerCase())) return [];
    const differs = neighbours.some((other) => other && differIn(picture, other, index));
    return [make("bdi", { className: differs ? `${column.kind} differs` : column.kind, textContent: text })];
  });
  const first = facts.filter((fact) => fact.classList.contains("differs"));
  const others = facts.filter((fact) => !fact.classList.contains("differs"));
  cards.get(picture).querySelector(".facts").replaceChildren(...first, ...others);
}

const differIn = (one, other, index) => JSON.stringify(one.values[index]) !== JSON.stringify(other.values[index]);

function groupOf(members) {
  const cells = [...distinct[RUN]].map(([key, name]) => {
    const found = members.filter((picture) => JSON.stringify(picture.values[RUN]) === key);
    const head = make("h3", { textContent: name });
    return make("li", {}, head, ...(found.length ? found.map(cardOf) : [make("p", { className: "hole", textContent: "–" })]));
  });
  const prompt = make("h2", { dir: "auto", textContent: promptOf(members[0]) });
  return make("section", { className: "group" }, prompt, make("ol", {}, ...cells));
}

// In the grid, arrow keys move the focus: left and right by one card, up and down by one row.
main.addEventListener("keydown", (event) => {
  const nodes = [...main.querySelectorAll(".card")];
  const at = nodes.indexOf(document.activeElement);
  if (at < 0) return;
  const left = (node) => node.getBoundingClientRect().left;
  const sameColumn = (node) => Math.abs(left(node) - left(nodes[at])) < 2;
  const target = {
    ArrowLeft: () => nodes[at - 1],
    ArrowRight: () => nodes[at + 1],
    ArrowUp: () => nodes.slice(0, at).findLast(sameColumn),
    ArrowDown: () => nodes.slice(at + 1).find(sameColumn),
    Home: () => nodes[0],
    End: () => nodes.at(-1),
  }[event.key]?.();
  if (!target) return;
  event.preventDefault();
  target.focus();
});

// --- the large view -----------------------------------------------------------------------------------------------

function openViewer(picture) {
  show(state.shown.indexOf(picture));
  viewer.showModal();
}

function show(position) {
  if (position < 0 || position >= state.shown.length) return;
  state.open = position;
  const picture = state.shown[position];
  find("position").textContent = `${position + 1} of ${state.shown.length}`;
  find("favourite").setAttribute("aria-pressed", String(favourites.has(nameOf(picture))));
  find("previous").disabled = position === 0;
  find("next").disabled = position === state.shown.length - 1;
  showPicture(picture);
  showWords(picture);
}

function showPicture(picture) {
  const stage = find("stage"), before = pictures[picture.before];
  stage.hidden = !picture.file;
  find("failure").hidden = Boolean(picture.file);
  find("failure").textContent = picture.reason ?? "This picture was not drawn.";
  find("compare").hidden = !before;
  if (!picture.file) return;
  stage.style.setProperty("--width", picture.size[0]);
  stage.style.setProperty("--height", picture.size[1]);
  find("after").src = picture.file;
  find("after").alt = promptOf(picture);
  if (!before) return;
  find("before").src = before.file;
  find("before").alt = `Without adapter: ${promptOf(before)}`;
  split();
}

function split() {
  const share = find("split").value;
  find("stage").style.setProperty("--split", share / 100);
  find("split").setAttribute("aria-valuetext", `${share} % before, ${100 - share} % after`);
}

function showWords(picture) {
  find("prompt").textContent = promptOf(picture) || "(no prompt)";
  const varying = [...columns.keys()].sort((one, other) => columns[other].varies - columns[one].varies); // these first
  const rows = (kinds, written) =>
    varying.flatMap((index) => {
      const column = columns[index];
      const value = picture.values[index];
      const asExpected = column.kind === "status" && value === "done";
      if (!kinds.includes(column.kind) || index === PROMPT || value === null || asExpected) return [];
      return [make("dt", { textContent: heading(column) }), make("dd", { dir: "auto", textContent: written(value) })];
    });
  const file = [make("dt", { textContent: "file" }), make("dd", { textContent: picture.path })];
  find("scores").replaceChildren(...rows(["score"], scoreOf));
  find("settings").replaceChildren(...rows(["setting", "run", "status"], textOf), ...file);
  find("open").hidden = !picture.file;
  if (picture.file) find("open").href = picture.file;
  find("copy-command").hidden = !commandOf(picture);
  for (const [id, what] of COPIED) find(id).textContent = `Copy ${what}`;
}

const COPIED = new Map([["copy-prompt", "prompt"], ["copy", "settings"], ["copy-command", "command"]]);

function settingsOf({ values }) {
  const kept = columns.map((column, index) => [column, values[index]]);
  const settings = kept.filter(([column, value]) => column.kind === "setting" && value !== null);
  return JSON.stringify(Object.fromEntries(settings.map(([column, value]) => [column.name, value])));
}

async function copyInto(button, text) {
  await copyText(text, button);
  button.textContent = "Copied";
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // browsers that do not trust pages on a disk
    const area = make("textarea", { value: text });
    viewer.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
}

find("previous").addEventListener("click", () => show(state.open - 1));
find("next").addEventListener("click", () => show(state.open + 1));
find("close").addEventListener("click", () => viewer.close());
for (const [id, textFor] of [["copy-prompt", promptOf], ["copy", settingsOf], ["copy-command", commandOf]]) {
  find(id).addEventListener("click", (event) => copyInto(event.currentTarget, textFor(state.shown[state.open])));
}
find("favourite").addEventListener("click", toggleFavourite);
find("export").addEventListener("click", exportFavourites);
find("favourites").addEventListener("click", () => {
  state.onlyFavourites = !state.onlyFavourites;
  find("favourites").setAttribute("aria-pressed", String(state.onlyFavourites));
  render();
});
find("split").addEventListener("input", split);
find("split").addEventListener("pointerup", () => find("stage").focus()); // arrow keys go through the pictures again
viewer.addEventListener("click", (event) => {
  if (event.target === viewer || event.target.className === "desk") viewer.close();
});
viewer.addEventListener("close", () => {
  const card = cards.get(state.shown[state.open]);
  card.focus();
  card.scrollIntoView({ block: "nearest" });
});
viewer.addEventListener("keydown", (event) => {
  if (event.target === find("split") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "f") toggleFavourite();
  const target = {
    ArrowLeft: state.open - 1,
    ArrowRight: state.open + 1,
    Home: 0,
    End: state.shown.length - 1,
  }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  show(target);
});

// --- the controls -------------------------------------------------------------------------------------------------

function addFilter(column, index) {
  const values = [...distinct[index]];
  const few = column.kind !== "score" || values.length <= FEW;
  if (!column.varies || !few || index === PROMPT) return;
  const select = make("select", {}, make("option", { value: "", textContent: "any" }));
  for (const [key, name] of values) {
    select.append(make("option", { value: key, textContent: name.length > 60 ? `${name.slice(0, 59)}…` : name }));
  }
  const pill = make("label", { className: "pill" }, make("span", { textContent: heading(column) }), select);
  select.addEventListener("change", () => {
    if (select.value) state.chosen.set(index, select.value);
    else state.chosen.delete(index);
    pill.classList.toggle("chosen", Boolean(select.value));
    render();
  });
  find("clear").before(pill);
}

function setDirection(descending) {
  state.descending = descending;
  find("direction").setAttribute("aria-pressed", String(descending));
}

function setView(view) {
  state.view = view;
  for (const name of ["pairs", "grid", "runs"]) find(`view-${name}`).setAttribute("aria-pressed", String(name === view));
  render();
}

function start() {
  const runs = [...distinct[RUN].values()];
  const title = runs.length <= 3 ? runs.join(", ") : `${runs.length} runs`;
  find("title").textContent = document.title = title;
  find("view-pairs").hidden = !isBefore.size;
  find("view-runs").hidden = runs.length < 2;
  find("views").hidden = runs.length < 2 && !isBefore.size;
  main.style.setProperty("--runs", runs.length);
  main.style.setProperty("--ratio", commonRatio());
  find("sort").append(make("option", { value: -1, textContent: "order drawn" }));
  columns.forEach((column, index) => {
    if (column.varies) find("sort").append(make("option", { value: index, textContent: heading(column) }));
    addFilter(column, index);
  });
  setView(isBefore.size ? "pairs" : "grid");
}

// The shape of the cards' tiles: that of most pictures.
function commonRatio() {
  const counts = new Map();
  for (const { size } of pictures) if (size) counts.set(size[0] / size[1], (counts.get(size[0] / size[1]) ?? 0) + 1);
  const [ratio] = [...counts].sort(([, one], [, other]) => other - one)[0] ?? [1];
  return Math.min(2, Math.max(0.5, ratio));
}

find("search").addEventListener("input", (event) => {
  state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  render();
});
find("sort").addEventListener("change", (event) => {
  state.sort = Number(event.target.value);
  setDirection(columns[state.sort]?.kind === "score"); // the best ones first
  render();
});
find("direction").addEventListener("click", () => {
  setDirection(!state.descending);
  render();
});
for (const name of ["pairs", "grid", "runs"]) find(`view-${name}`).addEventListener("click", () => setView(name));
find("clear").addEventListener("click", () => {
  state.chosen.clear();
  state.words = [];
  find("search").value = "";
  for (const pill of document.querySelectorAll("#filters .pill")) {
    pill.classList.remove("chosen");
    pill.querySelector("select").value = "";
  }
  render();
  find("search").focus();
});

start();
