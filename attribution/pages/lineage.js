"use strict";
// Draws the graph, moves the view, finds records. All text enters the page through textContent.

const graph = JSON.parse(document.getElementById("graph").textContent);
const byId = new Map(graph.nodes.map((node) => [node.id, node]));
const KINDS = {
  contributor: ["Contributor", "M12 12a4 4 0 1 0 0-8 4 4 0 0 0 0 8ZM4.5 20c.8-3.6 3.8-5.5 7.5-5.5s6.7 1.9 7.5 5.5"],
  key: ["Key", "M14.5 9.5a4 4 0 1 0-3.5 4l2 2h2v2h2v2h3v-3l-5.7-5.7"],
  dataset: ["Contribution", "M4 6c0-1.7 3.6-3 8-3s8 1.3 8 3-3.6 3-8 3-8-1.3-8-3Zm0 0v12c0 1.7 3.6 3 8 3s8-1.3 8-3V6M4 12c0 1.7 3.6 3 8 3s8-1.3 8-3"],
  refinement: ["Refined data", "M3 5h18l-7 8.5V20l-4-2v-4.5L3 5Z"],
  base_model: ["Base model", "M12 3l8 4.5v9L12 21l-8-4.5v-9L12 3Zm0 9l8-4.5M12 12L4 7.5M12 12v9"],
  adapter: ["Adapter", "M9 3v5M15 3v5M6 8h12v4a6 6 0 0 1-12 0V8Zm6 10v3"],
  benchmark: ["Benchmark", "M4 20h16M7 16v-5M12 16V5M17 16V9"],
  publication: ["Publication", "M4 12V4h8l8 8-8 8-8-8Zm4-4h.01"],
  completions: ["Completions", "M4 5h16v11h-9l-4 4v-4H4V5Zm4 4h8M8 12h5"],
  influence: ["Influence", "M12 4v16M4 12h16M6.5 6.5l11 11M17.5 6.5l-11 11"],
  prompt: ["Prompt", "M5 5h14v14H5V5Zm3 4l2.5 2.5L8 14m5 0h3"],
};
const MAX_OPEN = 60;
const OTHER_ICON = "M6 3h9l4 4v14H6V3Zm8 0v5h5M9 13h7M9 17h7";
const kindName = (kind) => KINDS[kind]?.[0] ?? kind.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
const kindColour = (kind) => `var(--${["key", "prompt", "retrieval"].includes(kind) || !KINDS[kind] ? "other" : kind})`;

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "rect", "path", "circle", "text", "title", "defs", "marker"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "kind") element.style.setProperty("--kind", kindColour(value));
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const pen = document.createElement("canvas").getContext("2d");
function fit(text, width, font) {
  pen.font = font;
  if (pen.measureText(text).width <= width) return text;
  let length = text.length;
  while (length > 1 && pen.measureText(`${text.slice(0, length)}…`).width > width) length -= 1;
  return `${text.slice(0, length)}…`;
}

const svg = make("svg", { class: "graph", role: "img", "aria-label": "Lineage from contributors on the left to answers on the right" });
const world = make("g");
svg.append(world);
const canvas = document.getElementById("canvas");
canvas.prepend(svg);

// What is folded away: `before:ID` hides what leads only to ID, `after:ID` what comes only of it.
const folded = new Set();
let plan = null;
let selected = null;
const cards = new Map();
let lines = [];

function spread(start, next, side) {
  const seen = new Set(start);
  const queue = [...start];
  while (queue.length) {
    const at = queue.pop();
    if (folded.has(`${side}:${at}`)) continue;
    for (const other of next.get(at) ?? []) if (!seen.has(other)) { seen.add(other); queue.push(other); }
  }
  return seen;
}

const nextOf = (from, to) => {
  const next = new Map();
  for (const edge of graph.edges) next.set(edge[from], [...(next.get(edge[from]) ?? []), edge[to]]);
  return next;
};
const childrenOf = nextOf("from", "to");
const parentsOf = nextOf("to", "from");

function visibleGraph() {
  const ends = graph.nodes.map((node) => node.id);
  const up = spread([graph.focus, ...ends.filter((id) => !childrenOf.has(id))], parentsOf, "before");
  const down = spread([graph.focus, ...ends.filter((id) => !parentsOf.has(id))], childrenOf, "after");
  const seen = (id) => id === graph.focus || (up.has(id) && down.has(id));
  return { nodes: graph.nodes.filter((node) => seen(node.id)), edges: graph.edges.filter((edge) => seen(edge.from) && seen(edge.to)) };
}

function drawEdge({ edge, route }) {
  const points = [];
  for (const slot of route) {
    const y = slot.y + slot.height / 2;
    if (slot !== route[0]) points.push([slot.x, y]);
    if (slot !== route.at(-1)) points.push([slot.x + SIZE.width, y]);
  }
  let path = `M${points[0]}`;
  for (let i = 1; i < points.length; i += 1) {
    const [x0, y0] = points[i - 1];
    const [x1, y1] = points[i];
    const middle = (x0 + x1) / 2;
    path += i % 2 === 1 ? `C${middle},${y0} ${middle},${y1} ${x1},${y1}` : `L${x1},${y1}`;
  }
  const line = make("path", { class: "edge", d: path });
  line.style.stroke = kindColour(byId.get(edge.from).kind);
  lines.push({ edge, line });
  world.append(line);
}

function drawNode(slot) {
  const { node, x, y } = slot;
  const { width, height } = SIZE;
  const family = getComputedStyle(document.body).fontFamily;
  const icon = make("path", { class: "icon", d: KINDS[node.kind]?.[1] ?? OTHER_ICON, transform: `translate(17,${height / 2 - 11}) scale(.92)` });
  const card = make("g", { class: "node", kind: node.kind, transform: `translate(${x},${y})`, tabindex: "0", role: "button", "aria-label": `${kindName(node.kind)} ${node.label}` },
    make("rect", { class: "halo", x: -7, y: -7, width: width + 14, height: height + 14, rx: 16 }),
    make("rect", { class: "box", width, height, rx: 10 }),
    make("rect", { class: "bar", x: 0, y: 11, width: 4, height: height - 22, rx: 2 }),
    make("rect", { class: "tile", x: 12, y: height / 2 - 16, width: 32, height: 32, rx: 8 }),
    icon,
    make("text", { class: "label", x: 53, y: height / 2 - 5 }, fit(node.label, width - 61, `600 15px ${family}`)),
    make("text", { class: "sub", x: 53, y: height / 2 + 13 }, fit(subtitle(node), width - 59, `13px ${family}`)),
    ...keptBar(node),
    make("title", {}, node.label));
  if (node.id === graph.focus) card.classList.add("focus");
  if (!proofHolds(node.id)) card.append(make("rect", { class: "broken", width, height, rx: 10 }), make("text", { class: "cross", x: width - 20, y: 20 }, "\u2715"));
  card.addEventListener("mouseenter", () => trace(node.id));
  card.addEventListener("mouseleave", () => trace(null));
  card.addEventListener("click", () => select(node.id));
  card.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); select(node.id); } });
  cards.set(node.id, card);
  world.append(card);
  drawFold(slot, "before", parentsOf, -2);
  drawFold(slot, "after", childrenOf, width + 2);
}

// A handle on a card's side that folds away what lies there alone, and unfolds it.
function drawFold({ node, x, y }, side, next, at) {
  const others = (next.get(node.id) ?? []).filter((id) => byId.has(id));
  if (!others.length) return;
  const key = `${side}:${node.id}`;
  const closed = folded.has(key);
  const words = `${closed ? "Unfold" : "Fold away"} what ${side === "before" ? "this was made from" : "came of this"}`;
  const handle = make("g", { class: closed ? "fold closed" : "fold", kind: node.kind, transform: `translate(${x + at},${y + SIZE.height / 2})`, tabindex: "0", role: "button", "aria-label": words, "aria-expanded": String(!closed) },
    make("circle", { r: 8 }), make("path", { d: closed ? "M-4 0H4M0 -4V4" : "M-4 0H4" }), make("title", {}, words));
  const toggle = (event) => { event.preventDefault(); event.stopPropagation(); setFolded(key, !closed); };
  handle.addEventListener("click", toggle);
  handle.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") toggle(event); });
  world.append(handle);
}

function setFolded(key, closed) {
  if (closed) folded.add(key);
  else folded.delete(key);
  draw();
  fitView();
}

// A contributor's card carries its rows as a bar: what was kept, out of what was given.
function keptBar(node) {
  const { num_in: given, num_kept: kept } = node.facts ?? {};
  if (node.kind !== "contributor" || !given) return [];
  const size = { x: 53, y: SIZE.height - 10, height: 3, rx: 1.5 };
  const full = SIZE.width - 65;
  return [make("rect", { class: "given", ...size, width: full }), make("rect", { class: "kept", ...size, width: full * kept / given })];
}

function drawHeadings() {
  const top = Math.min(...plan.slots.map((slot) => slot.y)) - 22;
  plan.columns.forEach((column, index) => {
    const counts = new Map();
    for (const slot of column) if (slot.node) counts.set(slot.node.kind, (counts.get(slot.node.kind) ?? 0) + 1);
    const words = [...counts].map(([kind, count]) => (count > 1 ? `${count} ${kindName(kind)}s`.replace("Completionss", "Completions") : kindName(kind)));
    const text = words.join(" · ");
    const room = (SIZE.width + SIZE.columnGap) * .86;  // the letters are spaced by a twentieth, and capitals
    world.append(make("text", { class: "heading", x: index * (SIZE.width + SIZE.columnGap), y: top }, fit(text.toUpperCase(), room, "650 12.5px sans-serif"), make("title", {}, text)));
  });
}

function reach(id, next) {
  const seen = new Set([id]);
  const queue = [id];
  while (queue.length) for (const other of next.get(queue.pop()) ?? []) if (!seen.has(other)) { seen.add(other); queue.push(other); }
  return seen;
}

function trace(id) {
  svg.classList.toggle("dim", id !== null);
  const before = id === null ? new Set() : reach(id, parentsOf);
  const after = id === null ? new Set() : reach(id, childrenOf);
  for (const [other, card] of cards) card.classList.toggle("on", before.has(other) || after.has(other));
  for (const { edge, line } of lines) {
    line.classList.toggle("on", (before.has(edge.from) && before.has(edge.to)) || (after.has(edge.from) && after.has(edge.to)));
  }
}

function select(id) {
  selected = id;
  if (!cards.has(id)) { folded.clear(); draw(); }
  for (const [other, card] of cards) card.classList.toggle("selected", other === id);
  showPanel(byId.get(id));
}

// The view is a translation and a scale of the world.
const view = { x: 0, y: 0, scale: 1 };
function applyView() { world.setAttribute("transform", `translate(${view.x},${view.y}) scale(${view.scale})`); }

function fitView() {
  const box = world.getBBox();
  const { width, height } = svg.getBoundingClientRect();
  view.scale = Math.max(.2, Math.min(1.15, (width - 48) / box.width, (height - 92) / box.height));
  view.x = (width - box.width * view.scale) / 2 - box.x * view.scale;
  view.y = (height - 36 - box.height * view.scale) / 2 - box.y * view.scale;
  applyView();
}

function zoomAt(factor, x, y) {
  const scale = Math.max(.15, Math.min(3, view.scale * factor));
  view.x = x - (x - view.x) * (scale / view.scale);
  view.y = y - (y - view.y) * (scale / view.scale);
  view.scale = scale;
  applyView();
}

function centreOn(id) {
  const slot = plan.slots.find((other) => other.id === id);
  const { width, height } = svg.getBoundingClientRect();
  view.x = width / 2 - (slot.x + SIZE.width / 2) * view.scale;
  view.y = height / 2 - (slot.y + SIZE.height / 2) * view.scale;
  applyView();
}

function listenToView() {
  let grip = null;
  svg.addEventListener("pointerdown", (event) => { if (!event.target.closest(".node")) { grip = { x: event.clientX - view.x, y: event.clientY - view.y }; svg.classList.add("panning"); } });
  addEventListener("pointermove", (event) => { if (grip) { view.x = event.clientX - grip.x; view.y = event.clientY - grip.y; applyView(); } });
  addEventListener("pointerup", () => { grip = null; svg.classList.remove("panning"); });
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = svg.getBoundingClientRect();
    zoomAt(Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  const middle = () => { const box = svg.getBoundingClientRect(); return [box.width / 2, box.height / 2]; };
  document.getElementById("in").addEventListener("click", () => zoomAt(1.25, ...middle()));
  document.getElementById("out").addEventListener("click", () => zoomAt(.8, ...middle()));
  document.getElementById("fit").addEventListener("click", fitView);
  addEventListener("resize", fitView);
}

function listenToSearch() {
  const query = document.getElementById("query");
  const found = document.getElementById("found");
  const texts = new Map(graph.nodes.map((node) => [node.id, JSON.stringify(node).toLowerCase()]));
  let hits = [];
  let at = -1;
  query.addEventListener("input", () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = words.length ? graph.nodes.map((node) => node.id).filter((id) => words.every((word) => texts.get(id).includes(word))) : [];
    at = -1;
    svg.classList.toggle("searching", words.length > 0);
    for (const [id, card] of cards) card.classList.toggle("hit", hits.includes(id));
    found.textContent = words.length ? `${hits.length} found` : "";
  });
  query.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !hits.length) return;
    at = (at + 1) % hits.length;
    found.textContent = `${at + 1} of ${hits.length}`;
    select(hits[at]);
    centreOn(hits[at]);
  });
}

function draw() {
  plan = layout(visibleGraph());
  world.replaceChildren();
  cards.clear();
  lines = [];
  plan.routes.forEach(drawEdge);
  plan.slots.forEach(drawNode);
  drawHeadings();
  if (cards.has(selected)) cards.get(selected).classList.add("selected");
}

// A graph too wide to read opens with its oldest part folded away.
function foldAtFirst() {
  if (graph.nodes.length <= MAX_OPEN) return;
  const crowded = graph.nodes.filter((node) => (parentsOf.get(node.id)?.length ?? 0) > MAX_OPEN / 4 && node.id !== graph.focus);
  for (const node of crowded) folded.add(`before:${node.id}`);
}

function start() {
  foldAtFirst();
  draw();
  const kinds = [...new Set(graph.nodes.map((node) => node.kind))].toSorted((a, b) => (STAGE[a] ?? 0) - (STAGE[b] ?? 0));
  document.getElementById("legend").append(...kinds.map((kind) => make("span", { kind }, make("i"), kindName(kind))));
  const people = graph.nodes.filter((node) => node.kind === "contributor").length;
  const last = Math.max(...graph.nodes.map((node) => node.time_us));
  document.getElementById("summary").textContent = `${graph.nodes.length} records · ${people} contributor${people === 1 ? "" : "s"} · last ${when(last)}`;
  if (NARROW) document.body.classList.add("closed");
  else select(graph.focus);
  listenToView();
  listenToSearch();
  fitView();
  listenToProof();
}

start();
