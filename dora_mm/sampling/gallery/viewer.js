// --- the large view -----------------------------------------------------------------------------------------------

function openViewer(picture) {
  if (!state.shown.includes(picture)) { // filtered out, or seen in a pair
    clearFilters();
    setView("grid");
  }
  show(state.shown.indexOf(picture));
  if (!viewer.open) viewer.showModal();
}

function show(position) {
  if (position < 0 || position >= state.shown.length) return;
  state.open = position;
  const picture = state.shown[position];
  find("position").textContent = `${position + 1} of ${state.shown.length}`;
  find("favourite").setAttribute("aria-pressed", String(favourites.has(nameOf(picture))));
  find("previous").disabled = position === 0;
  find("next").disabled = position === state.shown.length - 1;
  stepperOf(picture)?.show(stepperOf(picture).stops.indexOf(picture));
  showPicture(picture);
  showWords(picture);
  setAddress(`#${addressOf.get(picture)}`);
}

// --- links: the part behind # names a picture ------------------------------------------------------------------------

const addressOf = new Map(), byAddress = new Map();
for (const picture of pictures) {
  const address = picture.file && !byAddress.has(picture.file) ? picture.file : `picture-${picture.number + 1}`;
  addressOf.set(picture, address);
  byAddress.set(address, picture);
}

function setAddress(text) {
  if (location.hash !== text) history.replaceState(null, "", text || location.href.split("#")[0]);
}

function openAddress() {
  const picture = byAddress.get(location.hash.slice(1));
  if (picture) openViewer(picture);
}

// --- one picture beside another --------------------------------------------------------------------------------------

// What is left of the slider: the picture that a person has pinned, or the one without adapter.
const leftOf = (picture) => (state.pinned && state.pinned !== picture && state.pinned.file ? state.pinned : pictures[picture.before]);

function pin(chosen) {
  const picture = chosen === state.pinned ? null : chosen;
  state.pinned = picture;
  find("pinned").hidden = !picture;
  find("pinned-name").textContent = picture ? `Compared with: ${[promptOf(picture), ...factsOf(picture).map(({ text }) => text)].join(", ")}` : "";
  if (viewer.open) show(state.open);
}

function nameSides(left, right) {
  const sides = left === pictures[right.before] ? ["before", "after"] : [left, right].map((picture) =>
    factsOf(picture).filter(({ index }) => differIn(left, right, index)).map(({ text }) => text).join(", ").slice(0, 60));
  document.querySelector("#compare .before").textContent = sides[0] || "left";
  document.querySelector("#compare .after").textContent = sides[1] || "right";
}

function showPicture(picture) {
  const stage = find("stage"), before = picture.file ? leftOf(picture) : undefined;
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
  find("before").alt = before === pictures[picture.before] ? `Without adapter: ${promptOf(before)}` : promptOf(before);
  nameSides(before, picture);
  split();
}

function split() {
  const share = find("split").value;
  find("stage").style.setProperty("--split", share / 100);
  const [left, right] = ["before", "after"].map((side) => document.querySelector(`#compare .${side}`).textContent);
  find("split").setAttribute("aria-valuetext", `${share} % ${left}, ${100 - share} % ${right}`);
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
  find("pin").textContent = state.pinned === picture ? "Stop comparing" : "Compare others with this";
  find("copy-command").hidden = !commandOf(picture);
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
find("split").addEventListener("pointerup", () => find("stage").focus()); // arrow keys go through the pictures again
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

