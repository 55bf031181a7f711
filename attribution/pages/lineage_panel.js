"use strict";
// The side panel: every fact of one record, in words and bars.

const MICRO = 1e6;
const number = (value) => value.toLocaleString("en-GB", { maximumFractionDigits: 4 });
const percent = (micro) => `${(micro / MICRO * 100).toFixed(1)}%`;
const when = (us) => `${new Date(us / 1000).toISOString().replace("T", " ").slice(0, 19)} UTC`;
const short = (digest) => digest.replace(/^sha256:/, "").slice(0, 12);
const words = (key) => key.replace(/_(micro|us)$/, "").replace(/^num_/, "").replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
const nameOf = (keyId) => (graph.names ?? {})[keyId] ?? byId.get(keyId)?.label ?? short(keyId);

// One line under a card's label.
function subtitle(node) {
  const facts = node.facts ?? {};
  const has = (...keys) => keys.every((key) => facts[key] !== undefined && facts[key] !== null);
  if (facts.erased) return "record erased, proof stays";
  if (node.kind === "contributor") return has("num_in") ? `${number(facts.num_kept)} of ${number(facts.num_in)} rows kept` : short(facts.key_id ?? node.id);
  if (node.kind === "dataset" && has("num_rows")) return `${number(facts.num_rows)} rows · ${facts.licence}`;
  if (node.kind === "refinement" && has("num_in", "num_kept")) return `${number(facts.num_kept)} of ${number(facts.num_in)} rows kept`;
  if (node.kind === "base_model" && has("num_parameters")) return `${(facts.num_parameters / MICRO).toFixed(facts.num_parameters < 1e7 ? 2 : 0)} M weights · ${facts.licence}`;
  if (node.kind === "adapter" && has("rank", "num_steps")) return `rank ${facts.rank} · ${number(facts.num_steps)} steps`;
  if (node.kind === "benchmark" && facts.metrics?.length) return benchmarkLine(facts.metrics);
  if (node.kind === "publication" && has("version")) return `version ${facts.version}`;
  if (node.kind === "completions" && has("count")) return `${number(facts.count)} answer${facts.count === 1 ? "" : "s"} · ${facts.replica}`;
  if (node.kind === "influence" && facts.top?.length) return facts.top[0].share_micro <= 0 ? "nobody stands out" : `${nameOf(facts.top[0].key_id)} ${percent(facts.top[0].share_micro)}`;
  if (node.kind === "settlement" && has("num_players")) return `${number(facts.num_players)} players · ${number(facts.num_coalitions)} coalitions`;
  return short(node.id);
}

function benchmarkLine(metrics) {
  const shown = metrics.find((metric) => metric.metric !== "loss") ?? metrics[0];
  const value = (micro) => (shown.metric === "loss" ? (micro / MICRO).toFixed(2) : `${Math.round(micro / MICRO * 100)}%`);
  return `${value(shown.base_micro)} → ${value(shown.adapter_micro)} ${words(shown.metric).toLowerCase()}`;
}

const section = (title, ...children) => [make("h3", {}, title), ...children];
const code = (text) => make("code", {}, text);

function rowBars(rows) {
  const largest = Math.max(1, ...rows.map((row) => row.num_in));
  const bar = (row) => {
    const kept = make("i", { class: "kept" });
    const dropped = make("i", { class: "dropped" });
    kept.style.width = `${row.num_kept / largest * 100}%`;
    dropped.style.width = `${(row.num_in - row.num_kept) / largest * 100}%`;
    return make("div", {}, make("div", { class: "who" }, make("b", {}, nameOf(row.key_id)), make("span", {}, `${number(row.num_kept)} of ${number(row.num_in)}`)),
      make("div", { class: "track" }, kept, dropped));
  };
  const swatch = (colour, text) => { const box = make("i"); box.style.background = `var(--${colour})`; return make("span", {}, box, text); };
  const sorted = rows.toSorted((a, b) => b.num_kept - a.num_kept || b.num_in - a.num_in);
  return [make("div", { class: "rows" }, ...sorted.map(bar)), make("div", { class: "key" }, swatch("kept", "kept"), swatch("dropped", "dropped"))];
}

function shareBars(shares) {
  const bar = (share) => {
    const fill = make("i");
    const whisker = make("u");
    fill.style.width = percent(Math.max(0, share.share_micro));
    whisker.style.left = percent(Math.max(0, share.low_micro));
    whisker.style.right = percent(Math.max(0, MICRO - share.high_micro));
    return make("div", { kind: "influence" }, make("div", { class: "who" }, make("b", {}, nameOf(share.key_id)),
      make("span", {}, `${percent(share.share_micro)} (${percent(share.low_micro)} to ${percent(share.high_micro)})`)), make("div", { class: "interval" }, fill, whisker));
  };
  return make("div", { class: "rows" }, ...shares.map(bar));
}

function metricTable(metrics) {
  const value = (micro) => (micro / MICRO).toFixed(3);
  const row = (m) => make("tr", {}, make("td", {}, words(m.metric)), make("td", {}, value(m.base_micro)), make("td", {}, value(m.adapter_micro)),
    make("td", {}, `${value(m.delta_micro)} (${value(m.low_micro)} to ${value(m.high_micro)})`));
  const head = make("tr", {}, ...["Metric", "Base", "Adapter", "Change (interval)"].map((title) => make("th", {}, title)));
  return make("table", {}, head, ...metrics.map(row));
}

function playerTable(players) {
  const value = (micro) => (micro / MICRO).toFixed(4);
  const row = (p) => make("tr", {}, make("td", {}, p.name || nameOf(p.id)), make("td", {}, `${value(p.value_micro)} (${value(p.low_micro)} to ${value(p.high_micro)})`), make("td", {}, p.verdict));
  const head = make("tr", {}, ...["Part", "Value (interval)", "Verdict"].map((title) => make("th", {}, title)));
  return make("table", {}, head, ...players.map(row));
}

function droppedTable(dropped) {
  const row = (drop) => make("tr", {}, make("td", {}, `${words(drop.rule)}: ${drop.reason}`), make("td", {}, number(drop.count)));
  return make("table", {}, make("tr", {}, make("th", {}, "Dropped because"), make("th", {}, "Rows")), ...dropped.map(row));
}

function value(key, fact) {
  if (typeof fact === "boolean") return fact ? "yes" : "no";
  if (typeof fact === "number") {
    if (key.endsWith("_us")) return when(fact);
    return number(key.endsWith("_micro") ? fact / MICRO : fact);
  }
  if (typeof fact === "string") return /^(sha256:)?[0-9a-f]{32,}$/.test(fact) ? code(fact) : fact;
  if (Array.isArray(fact) && fact.every((item) => typeof item !== "object")) return fact.join(", ");
  return code(JSON.stringify(fact));
}

const SHOWN_APART = new Set(["per_contributor", "metrics", "dropped", "top", "players", "num_in", "num_kept", "contributors", "label"]);

function factList(facts) {
  const list = make("dl");
  for (const [key, fact] of Object.entries(facts)) {
    if (SHOWN_APART.has(key) || fact === null || fact === "" || (Array.isArray(fact) && !fact.length)) continue;
    list.append(make("dt", {}, words(key)), make("dd", {}, value(key, fact)));
  }
  return list;
}

function neighbours(id, from, to) {
  const ids = [...new Set(graph.edges.filter((edge) => edge[from] === id).map((edge) => edge[to]))].filter((other) => byId.has(other));
  return ids.map((other) => {
    const node = byId.get(other);
    const button = make("button", { kind: node.kind, type: "button" }, make("i"), make("b", {}, node.label), make("small", {}, kindName(node.kind)));
    button.addEventListener("click", () => { select(other); centreOn(other); });
    return button;
  });
}

function contributorList(people) {
  const list = make("dl");
  for (const person of people) {
    const party = typeof person === "string" ? { key_id: person } : person;
    list.append(make("dt", {}, party.name ?? nameOf(party.key_id)), make("dd", {}, party.role ? `${party.role} ` : "", code(short(party.key_id ?? ""))));
  }
  return list;
}

// Rows of the refinements among a record's ancestors, summed per contributor.
function rowsBehind(id) {
  const sums = new Map();
  for (const ancestor of reach(id, parentsOf)) {
    for (const row of byId.get(ancestor).facts?.per_contributor ?? []) {
      const sum = sums.get(row.key_id) ?? { key_id: row.key_id, num_in: 0, num_kept: 0 };
      sums.set(row.key_id, { ...sum, num_in: sum.num_in + row.num_in, num_kept: sum.num_kept + row.num_kept });
    }
  }
  return [...sums.values()];
}

function details(node) {
  const facts = node.facts ?? {};
  const parts = [];
  if (facts.per_contributor?.length) parts.push(...section("Rows by contributor", ...rowBars(facts.per_contributor)));
  if (node.kind === "contributor" && facts.num_in !== undefined) parts.push(...section("Rows", ...rowBars([{ key_id: facts.key_id, num_in: facts.num_in, num_kept: facts.num_kept }])));
  if (facts.dropped?.length) parts.push(...section("Why rows were dropped", droppedTable(facts.dropped)));
  if (facts.metrics?.length) parts.push(...section("Base against adapter", metricTable(facts.metrics)));
  if (facts.players?.length) parts.push(...section("What each part was worth", playerTable(facts.players), make("p", { class: "note" }, "Measured by training without it; comparable only within this settlement.")));
  if (facts.top?.length) parts.push(...section("Contributor shares", shareBars(facts.top), make("p", { class: "note" }, "The interval is the stability of the ranking, not a causal claim.")));
  if (!facts.per_contributor?.length && node.kind !== "contributor" && node.kind !== "dataset") {
    const behind = rowsBehind(node.id);
    if (behind.length) parts.push(...section("Rows behind it", ...rowBars(behind)));
  }
  return parts;
}

// The signed record itself: what ran, on what, and who signed.
function recordParts(id) {
  const proof = graph.proofs.records[id];
  const parts = section("Record in the log", make("code", { class: "block" }, id));
  if (proof?.envelope) {
    try {
      const { subject, predicate } = statementOf(proof.envelope);
      const digests = (items) => items.map((item) => `${item.kind} ${item.name} ${short(item.digest)}`);
      const signers = proof.envelope.signatures.map(({ keyid }) => (graph.proofs.trust.keys[keyid] ? "operator of this log" : nameOf(keyid)));
      const outputs = subject.map((item) => ({ kind: item.annotations.kind, name: item.name, digest: item.digest.sha256 }));
      const { code, environment, config, seed, attempt } = predicate;
      const facts = { log_entry: proof.index, signed_by: signers, inputs: digests(predicate.inputs), outputs: digests(outputs), code: `${code.commit.slice(0, 12) || "unknown commit"}${code.dirty ? ", with local changes" : ""}, version ${code.version}`, environment: short(environment), config: config ? short(config) : null, seed, attempt };
      parts.splice(1, 0, factList(facts));
    } catch (error) {
      parts.push(make("p", { class: "note" }, `The record cannot be read: ${error.message}`));
    }
  }
  return [...parts, make("p", { class: "note" }, "Show it from the log: "), make("code", { class: "block" }, `trailmark lineage show ${id.slice(0, 16)}`)];
}

function showPanel(node) {
  const panel = document.getElementById("panel");
  document.body.classList.remove("closed");
  const close = make("button", { class: "close", type: "button", "aria-label": "Close the panel" }, "Close");
  close.addEventListener("click", () => document.body.classList.add("closed"));
  const from = neighbours(node.id, "to", "from");
  const to = neighbours(node.id, "from", "to");
  const parts = [close, make("span", { class: "chip", kind: node.kind }, kindName(node.kind)), make("h2", {}, node.label), make("p", { class: "when" }, when(node.time_us)), ...details(node)];
  if (node.contributors?.length) parts.push(...section("Signed for by", contributorList(node.contributors)));
  parts.push(...section("Facts", factList(node.facts ?? {})));
  if (from.length) parts.push(...section("Comes from", make("div", { class: "links" }, ...from)));
  if (to.length) parts.push(...section("Leads to", make("div", { class: "links" }, ...to)));
  parts.push(...section("Proof", ...proofParts(node.id)), ...recordParts(node.id));
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}
