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

const VIEWS = ["steps", "pairs", "grid", "runs"];

function setView(view) {
  state.view = view;
  for (const name of VIEWS) find(`view-${name}`).setAttribute("aria-pressed", String(name === view));
  render();
}

function start() {
  const runs = [...new Map([...distinct[RUN], ...trainings.map(({ run }) => [JSON.stringify(run), run])]).values()];
  const title = runs.length <= 3 ? runs.join(", ") : `${runs.length} runs`;
  find("title").textContent = document.title = title;
  const hasSteps = images.some((image) => image.file && stepOf(image) !== null);
  find("view-steps").hidden = !hasSteps;
  find("view-pairs").hidden = !isBefore.size;
  find("view-runs").hidden = runs.length < 2;
  find("views").hidden = runs.length < 2 && !isBefore.size && !hasSteps;
  find("controls").hidden = find("count").hidden = !images.length; // a training may have generated none
  find("trainings").append(...trainings.map(panelOf));
  main.style.setProperty("--runs", runs.length);
  main.style.setProperty("--ratio", commonRatio());
  find("sort").append(make("option", { value: -1, textContent: "order generated" }));
  columns.forEach((column, index) => {
    if (column.varies) find("sort").append(make("option", { value: index, textContent: heading(column) }));
    addFilter(column, index);
  });
  setView(hasSteps ? "steps" : isBefore.size ? "pairs" : "grid");
  openAddress();
}

// The shape of the cards' tiles: that of most images.
function commonRatio() {
  const counts = new Map();
  for (const { size } of images) if (size) counts.set(size[0] / size[1], (counts.get(size[0] / size[1]) ?? 0) + 1);
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
for (const name of VIEWS) find(`view-${name}`).addEventListener("click", () => setView(name));
find("size").addEventListener("input", (event) => main.style.setProperty("--card", `${event.target.value}rem`));

function clearFilters() {
  state.chosen.clear();
  state.words = [];
  state.onlyFavourites = false;
  find("favourites").setAttribute("aria-pressed", "false");
  find("search").value = "";
  for (const pill of document.querySelectorAll("#filters .pill")) {
    pill.classList.remove("chosen");
    pill.querySelector("select").value = "";
  }
}

find("clear").addEventListener("click", () => {
  clearFilters();
  render();
  find("search").focus();
});

const help = find("help");
find("show-help").addEventListener("click", () => help.showModal());
find("close-help").addEventListener("click", () => help.close());
help.addEventListener("click", (event) => event.target === help && help.close());
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=search], select") || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "?" && !help.open) help.showModal();
  if (event.key === "/" && !viewer.open && !help.open) {
    event.preventDefault();
    find("search").focus();
  }
});
addEventListener("hashchange", openAddress);

start();
