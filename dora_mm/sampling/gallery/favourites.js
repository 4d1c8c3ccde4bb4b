// What is taken along from the page: favourites, which the browser keeps, jobs of them, and the command of an image.

const STORED = `dora-mm favourites ${location.pathname}`;
const nameOf = (image) => `${textOf(image.values[RUN])}/${image.path}`;
const favourites = new Set(stored());

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED) ?? "[]");
  } catch { // browsers that keep nothing for pages on a disk
    return [];
  }
}

function toggleFavourite(image) {
  const name = nameOf(image);
  if (!favourites.delete(name)) favourites.add(name);
  try {
    localStorage.setItem(STORED, JSON.stringify([...favourites]));
  } catch { /* they last as long as the page */ }
  find("favourite").setAttribute("aria-pressed", String(favourites.has(name)));
  cards.get(image)?.querySelector(".star").classList.toggle("off", !favourites.has(name));
  showFavourites();
}

function showFavourites() {
  const count = images.filter((image) => favourites.has(nameOf(image))).length;
  const jobs = favouriteJobs().length, lost = "The others are of steps whose adapter was not kept, or have no prompt";
  Object.assign(find("export"), jobs < count ? { textContent: `Save ${jobs} of them as a job`, title: lost } : { textContent: "Save them as a job", title: "" });
  find("favourites").textContent = `Favourites (${count})`;
  find("favourites").hidden = find("export").hidden = count === 0;
}

const OF_A_JOB = [
  "prompt", "negative_prompt", "seed", "steps", "guidance", "guidance_rescale", "width", "height", "scheduler", "adapter",
  "strength",
];

const settingOf = (image, name) =>
  image.values[columns.findIndex((column) => column.kind === "setting" && column.name === name)] ?? null;

function jobRow(image) {
  const value = (name) => (name === "adapter" ? adapterOf(image) : settingOf(image, name));
  const found = OF_A_JOB.map((name) => [name, value(name)]).filter(([, given]) => given !== null);
  return JSON.stringify(Object.fromEntries(found));
}

// Of the favourites those that can be generated again.
const favouriteJobs = () =>
  images.filter((image) => favourites.has(nameOf(image)) && promptOf(image) && adapterOf(image) !== undefined);

function exportFavourites() {
  const text = favouriteJobs().map((image) => `${jobRow(image)}\n`).join("");
  const link = make("a", { href: URL.createObjectURL(new Blob([text])), download: "favourites.jsonl" });
  link.click();
}

function factOf(column, value, short) {
  if (value === null) return column.name === "adapter" ? "no adapter" : null;
  return typeof value === "number" ? `${heading(column)} ${textOf(value)}` : short;
}

// The command that generates the image again, with what it can be changed by; several adapters only as they are. There is
// none for a step of a training whose adapter was not kept.
function commandOf(image) {
  const adapter = adapterOf(image), prompt = settingOf(image, "prompt");
  if (prompt === null || adapter === undefined) return "";
  if (adapter !== null && /[+]|:[^/]*$/.test(adapter)) {
    return `dora-mm sample --replay ${quoted(`${textOf(image.values[RUN])}/${image.path}`)}`;
  }
  const names = ["negative_prompt", "steps", "guidance", "guidance_rescale", "width", "height", "scheduler"];
  const settings = [["prompts", [prompt]], ["seeds", [settingOf(image, "seed") ?? 0]]];
  settings.push(...names.map((name) => [name, settingOf(image, name)]), ["model.path", settingOf(image, "model")]);
  settings.push(["adapter.path", adapter]);
  const strength = settingOf(image, "strength"); // none where the adapter replaces weights
  if (adapter !== null && strength !== null) settings.push(["strengths", [strength]]);
  const words = settings.filter(([, value]) => value !== null).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  return `dora-mm sample --set ${words.map(quoted).join(" ")}`;
}

const quoted = (word) => (/^[\w.,:=/@%+-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

