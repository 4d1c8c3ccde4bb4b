// --- the large view -----------------------------------------------------------------------------------------------

function openViewer(image) {
  if (!state.shown.includes(image)) { // filtered out, or seen in a pair
    clearFilters();
    setView("grid");
  }
  show(state.shown.indexOf(image));
  if (!viewer.open) viewer.showModal();
}

function show(position) {
  if (position < 0 || position >= state.shown.length) return;
  state.open = position;
  const image = state.shown[position];
  find("position").textContent = `${position + 1} of ${state.shown.length}`;
  find("favourite").setAttribute("aria-pressed", String(favourites.has(nameOf(image))));
  find("previous").disabled = position === 0;
  find("next").disabled = position === state.shown.length - 1;
  stepperOf(image)?.show(stepperOf(image).stops.indexOf(image));
  showImage(image);
  showWords(image);
  setAddress(`#${addressOf.get(image)}`);
}

// --- links: the part behind # names an image ------------------------------------------------------------------------

const addressOf = new Map(), byAddress = new Map();
for (const image of images) {
  const address = image.file && !byAddress.has(image.file) ? image.file : `image-${image.number + 1}`;
  addressOf.set(image, address);
  byAddress.set(address, image);
}

function setAddress(text) {
  if (location.hash !== text) history.replaceState(null, "", text || location.href.split("#")[0]);
}

function openAddress() {
  const image = byAddress.get(location.hash.slice(1));
  if (image) openViewer(image);
}

// --- one image beside another --------------------------------------------------------------------------------------

// What is left of the slider: the image that a person has pinned, or the one without adapter.
const leftOf = (image) => (state.pinned && state.pinned !== image && state.pinned.file ? state.pinned : images[image.before]);

function pin(chosen) {
  const image = chosen === state.pinned ? null : chosen;
  state.pinned = image;
  find("pinned").hidden = !image;
  find("pinned-name").textContent = image ? `Compared with: ${[promptOf(image), ...factsOf(image).map(({ text }) => text)].join(", ")}` : "";
  if (viewer.open) show(state.open);
}

function nameSides(left, right) {
  const sides = left === images[right.before] ? ["before", "after"] : [left, right].map((image) =>
    factsOf(image).filter(({ index }) => differIn(left, right, index)).map(({ text }) => text).join(", ").slice(0, 60));
  document.querySelector("#compare .before").textContent = sides[0] || "left";
  document.querySelector("#compare .after").textContent = sides[1] || "right";
}

function showImage(image) {
  const stage = find("stage"), before = image.file ? leftOf(image) : undefined;
  stage.hidden = !image.file;
  find("failure").hidden = Boolean(image.file);
  find("failure").textContent = image.reason ?? "This image was not generated.";
  find("compare").hidden = !before;
  if (!image.file) return;
  stage.style.setProperty("--width", image.size[0]);
  stage.style.setProperty("--height", image.size[1]);
  find("after").src = image.file;
  find("after").alt = promptOf(image);
  if (!before) return;
  find("before").src = before.file;
  find("before").alt = before === images[image.before] ? `Without adapter: ${promptOf(before)}` : promptOf(before);
  nameSides(before, image);
  split();
}

function split() {
  const share = find("split").value;
  find("stage").style.setProperty("--split", share / 100);
  const [left, right] = ["before", "after"].map((side) => document.querySelector(`#compare .${side}`).textContent);
  find("split").setAttribute("aria-valuetext", `${share} % ${left}, ${100 - share} % ${right}`);
}

function showWords(image) {
  find("prompt").textContent = promptOf(image) || "(no prompt)";
  const varying = [...columns.keys()].sort((one, other) => columns[other].varies - columns[one].varies); // these first
  const rows = (kinds, written) =>
    varying.flatMap((index) => {
      const column = columns[index];
      const value = image.values[index];
      const asExpected = column.kind === "status" && value === "done";
      if (!kinds.includes(column.kind) || index === PROMPT || value === null || asExpected) return [];
      return [make("dt", { textContent: heading(column) }), make("dd", { dir: "auto", textContent: written(value) })];
    });
  const file = [make("dt", { textContent: "file" }), make("dd", { textContent: image.path })];
  find("references").replaceChildren(...(image.references.length ? [referencesOf(image)] : []));
  find("scores").replaceChildren(...rows(["score"], scoreOf));
  find("settings").replaceChildren(...rows(["setting", "run", "status"], textOf), ...file);
  find("open").hidden = !image.file;
  if (image.file) find("open").href = image.file;
  find("pin").textContent = state.pinned === image ? "Stop comparing" : "Compare others with this";
  find("copy-command").hidden = !commandOf(image);
  for (const [id, what] of COPIED) find(id).textContent = `Copy ${what}`;
}

const COPIED = new Map([["copy-prompt", "prompt"], ["copy", "settings"], ["copy-command", "command"], ["copy-link", "link"]]);

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
    button.parentNode.append(area); // within a dialog that is open
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
}

find("previous").addEventListener("click", () => show(state.open - 1));
find("next").addEventListener("click", () => show(state.open + 1));
find("close").addEventListener("click", () => viewer.close());
const linkOf = () => location.href;
for (const [id, textFor] of [["copy-prompt", promptOf], ["copy", settingsOf], ["copy-command", commandOf], ["copy-link", linkOf]]) {
  find(id).addEventListener("click", (event) => copyInto(event.currentTarget, textFor(state.shown[state.open])));
}
find("favourite").addEventListener("click", () => toggleFavourite(state.shown[state.open]));
find("pin").addEventListener("click", () => pin(state.shown[state.open]));
find("unpin").addEventListener("click", () => pin(null));
find("export").addEventListener("click", exportFavourites);
find("favourites").addEventListener("click", () => {
  state.onlyFavourites = !state.onlyFavourites;
  find("favourites").setAttribute("aria-pressed", String(state.onlyFavourites));
  render();
});
find("split").addEventListener("input", split);
find("split").addEventListener("pointerup", () => find("stage").focus()); // arrow keys go through the images again
viewer.addEventListener("click", (event) => {
  if (event.target === viewer || event.target.className === "desk") viewer.close();
});
viewer.addEventListener("close", () => {
  setAddress("");
  const card = cardFor(state.shown[state.open]);
  card.focus();
  card.scrollIntoView({ block: "nearest" });
});
viewer.addEventListener("keydown", (event) => {
  if (event.target === find("split") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "f") toggleFavourite(state.shown[state.open]);
  if (event.key === "c") pin(state.shown[state.open]);
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

