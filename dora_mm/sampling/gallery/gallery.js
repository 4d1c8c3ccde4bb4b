"use strict";
// Everything that a run says (prompts, settings, scores) reaches the page as text: textContent, value, setAttribute of
// alt and aria-label. No HTML is ever built from it.

const { columns, images, trainings } = JSON.parse(document.getElementById("data").textContent);
images.forEach((image, number) => Object.assign(image, { number }));

const find = (id) => document.getElementById(id);
const main = find("main"), viewer = find("viewer");
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

const PROMPT = columns.findIndex((column) => column.kind === "setting" && column.name === "prompt");
const RUN = columns.findIndex((column) => column.kind === "run");
const FEW = 3; // a score with at most this many values, such as 0 and 1, can be chosen like a setting

const isBefore = new Set(images.map((image) => image.before).filter((number) => number !== null));

const state = {
  words: [], chosen: new Map(), sort: -1, descending: false, view: "grid", onlyFavourites: false, shown: [], open: -1, pinned: null,
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
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  return typeof value === "string" ? value : JSON.stringify(value);
}

const scoreOf = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));

// The distinct values of a column, in order, by their JSON; with short names: of paths the end, where that is enough.
const distinct = columns.map((_, index) => {
  const found = new Map(images.map((image) => [JSON.stringify(image.values[index]), image.values[index]]));
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

const shortOf = (image, index) => distinct[index].get(JSON.stringify(image.values[index]));
const promptOf = (image) => (PROMPT < 0 || image.values[PROMPT] === null ? "" : textOf(image.values[PROMPT]));

function compare(one, other) {
  if (one === null || other === null) return (one === null) - (other === null);
  if (typeof one === "number" && typeof other === "number") return one - other;
  return collator.compare(textOf(one), textOf(other));
}

// --- which images are shown, and in which order -----------------------------------------------------------------

// All that a card says: prompt, facts, and why there is no image.
const texts = new Map();

function textsOf(image) {
  if (!texts.has(image)) {
    const status = image.file ? [] : [statusOf(image), image.reason ?? ""];
    texts.set(image, [promptOf(image), ...factsOf(image).map(({ text }) => text), ...status].join(" ").toLowerCase());
  }
  return texts.get(image);
}

const statusOf = (image) => textOf(image.values[columns.findIndex((column) => column.kind === "status")]);

function isShown(image) {
  if (!state.words.every((word) => textsOf(image).includes(word))) return false;
  if (state.onlyFavourites && !favourites.has(nameOf(image))) return false;
  return [...state.chosen].every(([index, key]) => JSON.stringify(image.values[index]) === key);
}

function inOrder(one, other) {
  const [a, b] = [one, other].map((image) => (state.sort < 0 ? image.number : image.values[state.sort]));
  const order = compare(a, b);
  return state.descending && a !== null && b !== null ? -order : order; // images without the value stay at the end
}

function render() {
  let shown = images.filter(isShown).sort(inOrder);
  if (state.view === "steps") {
    shown = stepsView(shown);
  } else if (state.view === "runs") {
    const groups = Map.groupBy(shown, (image) => image.group);
    shown = [...groups.values()].flat();
    main.replaceChildren(make("div", { className: "groups" }, ...[...groups.values()].map(groupOf)));
  } else {
    const pairs = state.view === "pairs";
    // Pairs first; a bare image is seen in its pair, unless a filter has left the pair out.
    if (pairs) {
      const paired = new Set(shown.map((image) => image.before));
      shown = shown.filter((image) => !paired.has(image.number));
      shown = [...shown.filter((image) => image.before !== null), ...shown.filter((image) => image.before === null)];
    }
    const items = shown.map((image) => make("li", {}, cardOf(image)));
    main.replaceChildren(make("ol", { className: pairs ? "grid pairs" : "grid" }, ...items));
  }
  if (state.view !== "steps") {
    shown.forEach((image, position) => showFacts(image, [shown[position - 1], shown[position + 1]]));
  }
  state.shown = shown;
  if (!shown.length && images.length) main.replaceChildren(make("p", { className: "empty", textContent: "No image matches." }));
  const failed = shown.filter((image) => !image.file).length;
  const all = shown.length === images.length ? "" : ` of ${images.length}`;
  find("count").textContent =
    `${shown.length}${all} image${images.length === 1 ? "" : "s"}${failed ? `, ${failed} not generated` : ""}`;
  find("clear").hidden = !state.chosen.size && !state.words.length;
  showFavourites();
}

// --- cards --------------------------------------------------------------------------------------------------------

const cards = new Map();

function cardOf(image) {
  if (!cards.has(image)) cards.set(image, makeCard(image));
  const card = cards.get(image);
  const tile = card.querySelector(".tile"), before = images[image.before];
  for (const node of tile.querySelectorAll(".of-before, .tag")) node.remove();
  tile.classList.toggle("pair", state.view === "pairs" && Boolean(before));
  if (tile.classList.contains("pair")) {
    tile.prepend(imageOf(before, "of-before"));
    tile.append(...["before", "after"].map((side) => make("span", { className: `tag ${side}`, textContent: side })));
  }
  card.querySelector(".star").classList.toggle("off", !favourites.has(nameOf(image)));
  const badge = card.querySelector(".badge");
  const column = columns[state.sort];
  badge.hidden = column?.kind !== "score" || image.values[state.sort] === null;
  badge.textContent = badge.hidden ? "" : scoreOf(image.values[state.sort]);
  return card;
}

function makeCard(image) {
  const card = make("button", { className: "card", type: "button" });
  const tile = make("span", { className: "tile" }, make("span", { className: "badge" }), starOf());
  if (image.file) {
    tile.prepend(imageOf(image));
  } else {
    tile.classList.add("missing");
    tile.prepend(make("b", { textContent: statusOf(image) }), make("span", { textContent: image.reason ?? "" }));
  }
  const facts = make("span", { className: "facts" });
  if (image.references.length) card.append(referencesOf(image));
  card.append(tile, make("span", { className: "caption", dir: "auto", textContent: promptOf(image) }), facts);
  card.addEventListener("click", () => openViewer(image));
  return card;
}

function imageOf(image, className = "") {
  const [width, height] = image.size;
  return make("img", { className, src: image.thumbnail, alt: "", width, height, loading: "lazy", decoding: "async" });
}

// What an image was made of, beside it.
const referencesOf = ({ references }) => make("span", { className: "references" }, ...references.map((src, number) =>
  make("img", { src, alt: `reference ${number + 1}`, title: `reference ${number + 1}`, loading: "lazy", decoding: "async" })));

function starOf() {
  const star = find("favourite").querySelector("svg").cloneNode(true);
  star.setAttribute("class", "star off");
  return star;
}

// What tells an image from others, in few words: settings that differ between images, unless the prompt says them.
function factsOf(image) {
  const prompt = promptOf(image).toLowerCase();
  return columns.flatMap((column, index) => {
    if (!column.varies || index === PROMPT || column.name === "images" || column.kind === "score" || column.kind === "status") return [];
    if (column.name === "strength" && settingOf(image, "adapter") === null) return []; // there is nothing to be weaker
    const text = factOf(column, image.values[index], shortOf(image, index));
    return text === null || prompt.includes(text.toLowerCase()) ? [] : [{ index, kind: column.kind, text }];
  });
}

// What differs between neighbours stands first.
function showFacts(image, neighbours) {
  const facts = factsOf(image).map(({ index, kind, text }) => {
    const differs = neighbours.some((other) => other && differIn(image, other, index));
    return make("bdi", { className: differs ? `${kind} differs` : kind, textContent: text });
  });
  const first = facts.filter((fact) => fact.classList.contains("differs"));
  const others = facts.filter((fact) => !fact.classList.contains("differs"));
  cards.get(image).querySelector(".facts").replaceChildren(...first, ...others);
}

const differIn = (one, other, index) => JSON.stringify(one.values[index]) !== JSON.stringify(other.values[index]);

function groupOf(members) {
  const cells = [...distinct[RUN]].map(([key, name]) => {
    const found = members.filter((image) => JSON.stringify(image.values[RUN]) === key);
    const head = make("h3", { textContent: name });
    return make("li", {}, head, ...(found.length ? found.map(cardOf) : [make("p", { className: "hole", textContent: "–" })]));
  });
  const prompt = make("h2", { dir: "auto", textContent: promptOf(members[0]) });
  return make("section", { className: "group" }, prompt, make("ol", {}, ...cells));
}

// The card of an image in the view, and the image of a card.
const cardFor = (image) => stepperOf(image)?.card ?? cards.get(image);
const stepperOf = (image) => (state.view === "steps" ? steppers.find(({ stops }) => stops.includes(image)) : undefined);

function imageOfCard(card) {
  const stepper = steppers.find((each) => each.card === card);
  return stepper ? stepper.stops[stepper.at] : [...cards].find(([, node]) => node === card)?.[0];
}

// In the grid, arrow keys move the focus: left and right by one card, up and down by one row.
main.addEventListener("keydown", (event) => {
  const nodes = [...main.querySelectorAll(".card")];
  const at = nodes.indexOf(document.activeElement);
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "f") toggleFavourite(imageOfCard(nodes[at]));
  if (event.key === "c") pin(imageOfCard(nodes[at]));
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
