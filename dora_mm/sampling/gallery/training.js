// What a page has of trainings: images of a prompt by step, under a slider; curves with the checkpoints on them;
// settings, training images and what to type next.

const STEP = columns.findIndex((column) => column.kind === "setting" && column.name === "step");
const SVG = document.querySelector("svg").namespaceURI;
const stepOf = (image) => (STEP < 0 ? null : image.values[STEP]);
const trainingOf = (image) => trainings.find(({ run }) => run === image.values[RUN]);

// The adapter file that an image can be generated again with; null: the bare model; undefined: it was not kept.
function adapterOf(image) {
  const adapter = settingOf(image, "adapter"), training = trainingOf(image), step = stepOf(image);
  if (step === null || !training) return adapter;
  const kept = training.kept[step];
  return adapter === training.run || kept === undefined ? kept : kept === training.run ? adapter : undefined; // averages
}

// --- images by step ---------------------------------------------------------------------------------------------

const steppers = []; // of the view: { stops, show, at, card }

// Images that differ in nothing but the step, in its order, behind that of the bare model.
function bySteps(shown) {
  const sameBut = (image) => JSON.stringify(image.values.filter((_, index) => index !== STEP));
  const stepped = shown.filter((image) => stepOf(image) !== null && image.file);
  const groups = [...Map.groupBy(stepped, sameBut).values()];
  return groups.map((group) => {
    const ordered = group.sort((one, other) => stepOf(one) - stepOf(other)), bare = images[ordered[0].before];
    return bare ? [bare, ...ordered] : ordered;
  });
}

function stepsView(shown) {
  const groups = bySteps(shown);
  const varies = (index) => groups.some((stops) => differIn(stops.at(-1), groups[0].at(-1), index));
  steppers.splice(0, Infinity, ...groups.map((stops) => makeStepper(stops, varies)));
  const items = steppers.map(({ node }) => node);
  const steps = [...new Set(groups.flat().map((image) => stepOf(image) ?? -1))].sort((one, other) => one - other);
  const all = make("input", { type: "range", id: "all-steps", min: 0, max: steps.length - 1, value: steps.length - 1 });
  const said = make("output", { textContent: nameOfStep(steps.at(-1)) });
  all.setAttribute("aria-label", "Step of all prompts");
  all.addEventListener("input", () => {
    said.textContent = nameOfStep(steps[all.value]);
    for (const stepper of steppers) stepper.show(stepper.stops.findLastIndex((stop) => (stepOf(stop) ?? -1) <= steps[all.value]));
  });
  const bar = make("label", { className: "all-steps" }, make("span", { textContent: "all prompts" }), all, said);
  main.replaceChildren(...(steps.length > 1 ? [bar] : []), make("ol", { className: "grid steps" }, ...items));
  return [...new Set(groups.flat())];
}

const nameOfStep = (step) => (step === null || step < 0 ? "bare model" : `step ${step}`);

function makeStepper(stops, varies) {
  const element = imageOf(stops.at(-1));
  const tile = make("span", { className: "tile" }, element);
  const last = stops.at(-1), caption = make("span", { className: "caption", dir: "auto", textContent: promptOf(last) });
  const facts = factsOf(last).filter(({ index }) => varies(index) && index !== STEP);
  const others = make("span", { className: "facts" }, ...facts.map(({ kind, text }) => make("bdi", { className: kind, textContent: text })));
  const card = make("button", { className: "card", type: "button" }, tile, caption, others);
  const slider = make("input", { type: "range", min: 0, max: stops.length - 1, value: stops.length - 1 });
  slider.setAttribute("aria-label", `Step: ${promptOf(last)}`);
  const said = make("output", {});
  const stepper = { stops, card, at: 0, node: make("li", {}, card, make("label", { className: "step" }, slider, said)) };
  stepper.show = (position) => {
    stepper.at = Math.max(0, position);
    slider.value = stepper.at;
    const image = stops[stepper.at], name = nameOfStep(stepOf(image));
    element.src = image.thumbnail;
    said.textContent = name;
    slider.setAttribute("aria-valuetext", name);
    for (const chart of charts) chart.mark(stepOf(image) ?? 0);
  };
  slider.addEventListener("input", () => stepper.show(Number(slider.value)));
  card.addEventListener("click", () => openViewer(stops[stepper.at]));
  stepper.show(stops.length - 1);
  return stepper;
}

// --- curves -------------------------------------------------------------------------------------------------------

const charts = []; // { draw, mark }

function drawn(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const MARGIN = { left: 52, right: 22, top: 10, bottom: 34 }, CHART_HEIGHT = 250;

function chartOf({ name, curves }, training) {
  const box = make("div", { className: "plot" }), read = make("output", { className: "reading" });
  const legend = make("ul", { className: "legend" }, ...curves.map(({ name: text }, number) =>
    make("li", { className: classOf(curves, number) }, make("i", {}), text)));
  if (training.checkpoints.length) legend.append(make("li", { className: "checkpoint" }, make("i", {}), "checkpoint"));
  const chart = { marked: training.done, scale: null };
  chart.draw = () => {
    const width = Math.max(260, box.clientWidth);
    chart.scale = scaleOf(curves, training, width);
    box.replaceChildren(plotOf(name, curves, training, chart.scale, width));
    chart.mark(chart.marked);
  };
  chart.mark = (step) => {
    chart.marked = step;
    if (chart.scale) box.querySelector(".marked").setAttribute("transform", `translate(${chart.scale.x(step)} 0)`);
    read.textContent = readingOf(curves, step);
  };
  const stepUnder = (event) => chart.scale.stepAt(event.clientX - box.getBoundingClientRect().left);
  box.addEventListener("pointermove", (event) => chart.mark(stepUnder(event)));
  box.addEventListener("click", (event) => {
    const distances = ({ stops }) => stops.map((stop) => Math.abs((stepOf(stop) ?? 0) - stepUnder(event)));
    for (const stepper of steppers) stepper.show(distances(stepper).indexOf(Math.min(...distances(stepper))));
  });
  new ResizeObserver(chart.draw).observe(box);
  charts.push(chart);
  return make("figure", { className: "chart" }, make("figcaption", {}, make("b", { textContent: name }), legend), box, read);
}

const classOf = (curves, number) => {
  const { kind } = curves[number];
  return kind === "validation" ? `series-${curves.slice(0, number).filter((other) => other.kind === kind).length % 4}` : kind;
};

function scaleOf(curves, training, width) {
  const values = curves.flatMap(({ kind, points }) => {
    const found = points.map(([, value]) => value).sort((one, other) => one - other);
    return kind === "raw" ? found.slice(Math.floor(found.length * 0.02), Math.ceil(found.length * 0.98)) : found; // single peaks
  });
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * 0.08;
  const last = Math.max(training.steps ?? 0, training.done, 1);
  const [from, to] = [low - room, high + room], wide = width - MARGIN.left - MARGIN.right;
  const x = (step) => MARGIN.left + (step / last) * wide;
  const y = (value) => MARGIN.top + ((to - Math.min(to, Math.max(from, value))) / (to - from)) * (CHART_HEIGHT - MARGIN.top - MARGIN.bottom);
  const stepAt = (at) => Math.round(Math.min(1, Math.max(0, (at - MARGIN.left) / wide)) * last);
  return { x, y, from, to, last, stepAt, xTicks: ticks(0, last, width / 90), yTicks: ticks(from, to, 5) };
}

function ticks(from, to, count) {
  const rough = (to - from) / Math.max(2, count), power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const first = Math.ceil(from / size);
  return Array.from({ length: Math.floor(to / size) - first + 1 }, (_, number) => Number(((first + number) * size).toPrecision(12)));
}

function plotOf(name, curves, training, { x, y, from, last, xTicks, yTicks }, width) {
  const bottom = CHART_HEIGHT - MARGIN.bottom, right = width - MARGIN.right;
  const label = (text, at, height, anchor) => {
    const node = drawn("text", { x: at, y: height, "text-anchor": anchor });
    node.textContent = text;
    return node;
  };
  const grid = yTicks.map((value) => drawn("g", {}, drawn("line", { class: "grid-line", x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }),
    label(textOf(value), MARGIN.left - 8, y(value) + 4, "end")));
  const steps = xTicks.map((step) => label(step, x(step), bottom + 20, "middle"));
  const kept = training.checkpoints.map((step) => drawn("g", { class: "checkpoint" },
    drawn("line", { x1: x(step), x2: x(step), y1: MARGIN.top, y2: bottom }), drawn("path", { d: `M${x(step)} ${bottom - 7}l5 7h-10z` })));
  const best = training.best === null || training.best === undefined ? [] :
    [drawn("g", { class: "best" }, label("best", x(training.best), MARGIN.top + 10, x(training.best) > right - 30 ? "end" : "middle"))];
  const lines = curves.map(({ points }, number) => drawn("g", { class: `curve ${classOf(curves, number)}` },
    drawn("polyline", { points: points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }),
    ...(curves[number].kind === "validation" && points.length <= 40 ? points.map(([step, value]) => drawn("circle", { cx: x(step), cy: y(value), r: 2.5 })) : [])));
  const marked = drawn("line", { class: "marked", x1: 0, x2: 0, y1: MARGIN.top, y2: bottom });
  const plot = drawn("svg", { viewBox: `0 0 ${width} ${CHART_HEIGHT}`, width, height: CHART_HEIGHT, role: "img" },
    ...grid, ...steps, ...kept, ...best, ...lines, marked);
  plot.setAttribute("aria-label", `${name} over ${last} steps: ${readingOf(curves, last)}`);
  return plot;
}

// The values at a step, each the last one up to it.
function readingOf(curves, step) {
  const found = curves.map(({ name, points }) => [name, points.findLast(([at]) => at <= step)]);
  const texts = found.filter(([, point]) => point).map(([name, [, value]]) => `${name} ${Number(value.toPrecision(4))}`);
  return [`step ${step}`, ...texts].join(" · ");
}

// --- the panel of a training --------------------------------------------------------------------------------------

function panelOf(training) {
  const { done, steps, finished } = training;
  const state = finished ? `finished after ${done} steps` : `at step ${done}${steps ? ` of ${steps}` : ""} when this page was written`;
  const summary = make("summary", {}, make("h2", { textContent: trainings.length > 1 ? training.run : "Training" }), make("span", { textContent: state }));
  const parts = [chartsOf(training), settingsPanel(training), nextOf(training)];
  const panel = make("details", { className: "training", open: trainings.length === 1 }, summary, make("div", { className: "panels" }, ...parts));
  for (const part of [lossesOf(training), answersOf(training)]) if (part) panel.append(part);
  return panel;
}

function chartsOf(training) {
  const found = training.charts.map((chart) => chartOf(chart, training));
  const images = learnedFrom(training); // below the curves, which are lower than the settings
  if (!found.length) found.push(make("p", { className: "hint", textContent: "No step was logged yet." }));
  return make("div", {}, ...found, ...(images ? [images] : []));
}

const listOf = (values) => make("dl", {}, ...Object.entries(values).flatMap(([name, value]) =>
  [make("dt", { textContent: name }), make("dd", { dir: "auto", textContent: textOf(value) })]));

function settingsPanel({ settings, summary, config }) {
  const whole = make("details", { className: "whole" }, make("summary", { textContent: "The whole config" }), make("pre", { textContent: config }));
  return make("section", { className: "settings" }, make("h3", { textContent: "Settings" }), listOf(settings),
    ...(Object.keys(summary).length ? [make("h3", { textContent: "Result" }), listOf(summary)] : []), whole);
}

function nextOf({ next }) {
  const items = Object.entries(next).map(([what, command]) => {
    const button = make("button", { type: "button", textContent: "Copy" });
    button.addEventListener("click", () => copyInto(button, command));
    const words = command.split(" ").map((word) => (word.length > 30 ? word : make("span", { textContent: word }))); // not cut at hyphens
    return make("li", {}, make("span", { textContent: what }), button, make("code", {}, ...words.flatMap((word) => [word, " "])));
  });
  return make("section", { className: "next" }, make("h3", { textContent: "What to type next" }), make("ol", {}, ...items));
}

function learnedFrom({ images: found, note }) {
  if (!found.length && !note) return null;
  const items = found.map((image) => make("li", {}, ...(image.references.length ? [referencesOf(image)] : []),
    make("img", { src: image.file, alt: image.name, title: image.name, loading: "lazy" })));
  const head = make("h3", {}, "Training images ", make("small", { textContent: note ?? "" }));
  return make("section", { className: "learned" }, head, make("ol", {}, ...items));
}

// The images or rows with the highest losses, those first whose loss stays apart.
function lossesOf({ losses: { steps, rows, count } }) {
  if (!rows.length) return null;
  const marked = rows.filter(({ mark }) => mark).length, last = steps.at(-1);
  const apart = marked ? `${marked} of ${count} ${marked > 1 ? "stay" : "stays"} apart` : `none of ${count} stays apart`;
  const shown = rows.length < count ? `, the highest ${rows.length} are shown` : "";
  const head = make("h3", {}, `Loss of each at step ${last} `, make("small", { textContent: `${apart}${shown}` }));
  return make("section", { className: "losses" }, head, make("ol", {}, ...rows.map((row) => lossOf(row, steps))));
}

function lossOf({ text, answer, group, name, file, losses, level, mark }, steps) {
  const given = losses.map((loss, number) => [steps[number], loss]).filter(([, loss]) => loss !== null);
  const values = given.map(([step, loss]) => `step ${step}: ${Number(loss.toPrecision(3))}`).join(", ");
  const value = make("b", { className: "loss", textContent: Number(given.at(-1)[1].toPrecision(3)), title: values });
  const from = given.length > 1 ? [make("small", { textContent: `from ${Number(given[0][1].toPrecision(3))}` })] : [];
  const words = [
    make("p", {}, value, " ", ...from),
    ...(mark ? [make("p", { className: "mark", textContent: mark })] : []),
    make("p", { className: "text", dir: "auto", textContent: text }),
    ...(answer ? [make("p", { className: "hint", dir: "auto", textContent: `right: ${answer}` })] : []),
    make("p", { className: "hint", dir: "auto", textContent: [name, group, `${level >= 0 ? "+" : "−"}${Math.abs(level).toFixed(1)} deviations`].filter(Boolean).join(" · ") }),
  ];
  const pictured = file ? [make("img", { src: file, alt: name, title: name, loading: "lazy" })] : [];
  return make("li", { className: mark ? "apart" : "" }, ...pictured, make("div", {}, ...words));
}

function answersOf({ answers }) {
  if (!answers.length) return null;
  const items = answers.map(({ question, references, answers: given }) => {
    const right = make("p", { className: "hint", dir: "auto", textContent: `right: ${references.map(textOf).join(", ")}` });
    const rows = Object.entries(given).map(([step, answer]) => [nameOfStep(Number(step)), answer]);
    return make("li", {}, make("b", { dir: "auto", textContent: question ?? "" }), right, listOf(Object.fromEntries(rows)));
  });
  return make("section", { className: "answers" }, make("h3", { textContent: "Answers by step" }), make("ol", {}, ...items));
}
