"use strict";
// Layered layout: a column per stage, one slot per record, long edges bent through reserved slots so that none crosses a card.

// A narrow frame, such as MLflow's artifact view, gets tighter columns: then the whole graph fits at a larger scale.
const NARROW = innerWidth <= 1200;
const SIZE = { width: NARROW ? 186 : 200, height: 64, columnGap: NARROW ? 40 : 62, rowGap: 14, bend: 10 };
const STAGE = {
  contributor: 0, key: 0, dataset: 1, refinement: 2, base_model: 2, prompt: 2, retrieval: 2, workflow_patch: 2,
  adapter: 3, benchmark: 4, approval: 4, publication: 4, adapter_loaded: 5, workflow_run: 5, completions: 6, influence: 7, statement: 8, redaction: 8,
  workflow_effect: 6, settlement: 5,
};

function columnsOf(nodes, parents) {
  const column = new Map();
  const visiting = new Set();
  const visit = (node) => {
    if (column.has(node.id)) return column.get(node.id);
    if (visiting.has(node.id)) return 0;
    visiting.add(node.id);
    const above = parents.get(node.id).map((parent) => visit(parent) + 1);
    const value = Math.max(STAGE[node.kind] ?? 0, ...above);
    column.set(node.id, value);
    return value;
  };
  nodes.forEach(visit);
  const used = [...new Set(column.values())].sort((a, b) => a - b);
  for (const [id, value] of column) column.set(id, used.indexOf(value));
  return column;
}

// An edge that a longer way already tells (base to answer, when base to adapter to answer is there) is not drawn.
function essential(edges) {
  const next = new Map();
  for (const { from, to } of edges) next.set(from, [...(next.get(from) ?? []), to]);
  const leads = (start, goal) => {
    const seen = new Set();
    const queue = (next.get(start) ?? []).filter((id) => id !== goal);
    while (queue.length) {
      const at = queue.pop();
      if (at === goal) return true;
      if (!seen.has(at)) { seen.add(at); queue.push(...(next.get(at) ?? [])); }
    }
    return false;
  };
  return edges.filter(({ from, to }) => !leads(from, to));
}

function slotsOf(nodes, edges, column) {
  const slots = new Map(nodes.map((node) => [node.id, { id: node.id, node, column: column.get(node.id), height: SIZE.height, left: [], right: [] }]));
  const routes = [];
  for (const edge of edges) {
    const route = [slots.get(edge.from)];
    for (let at = column.get(edge.from) + 1; at < column.get(edge.to); at += 1) {
      const bend = { id: `${edge.from}>${edge.to}@${at}`, node: null, column: at, height: SIZE.bend, left: [], right: [] };
      slots.set(bend.id, bend);
      route.push(bend);
    }
    route.push(slots.get(edge.to));
    for (let i = 1; i < route.length; i += 1) {
      route[i - 1].right.push(route[i]);
      route[i].left.push(route[i - 1]);
    }
    routes.push({ edge, route });
  }
  return { slots: [...slots.values()], routes };
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function orderColumns(columns) {
  const rank = (column) => column.forEach((slot, index) => { slot.rank = index / Math.max(1, column.length - 1); });
  columns.forEach(rank);
  for (let sweep = 0; sweep < 12; sweep += 1) {
    const side = sweep % 2 === 0 ? "left" : "right";
    for (const column of sweep % 2 === 0 ? columns : [...columns].reverse()) {
      for (const slot of column) slot.wish = slot[side].length ? mean(slot[side].map((other) => other.rank)) : slot.rank;
      column.sort((a, b) => a.wish - b.wish);
      rank(column);
    }
  }
}

// Least-squares positions that keep the order and the gaps: pool adjacent violators.
function settle(column) {
  const pools = [];
  let offset = 0;
  for (const slot of column) {
    slot.offset = offset;
    offset += slot.height + SIZE.rowGap;
    pools.push({ sum: slot.wish - slot.offset, count: 1, slots: [slot] });
    while (pools.length > 1 && pools.at(-2).sum / pools.at(-2).count > pools.at(-1).sum / pools.at(-1).count) {
      const last = pools.pop();
      const before = pools.at(-1);
      before.sum += last.sum;
      before.count += last.count;
      before.slots.push(...last.slots);
    }
  }
  for (const pool of pools) for (const slot of pool.slots) slot.y = pool.sum / pool.count + slot.offset;
}

function placeColumns(columns) {
  const middle = (slot) => slot.y + slot.height / 2;
  for (const column of columns) {
    let y = 0;
    for (const slot of column) { slot.y = y; y += slot.height + SIZE.rowGap; }
    for (const slot of column) slot.y -= y / 2;
  }
  for (let sweep = 0; sweep < 10; sweep += 1) {
    const sides = sweep % 2 === 0 ? ["left", "right"] : ["right", "left"];
    for (const column of sweep % 2 === 0 ? columns : [...columns].reverse()) {
      for (const slot of column) {
        const others = slot[sides[0]].length ? slot[sides[0]] : slot[sides[1]];
        slot.wish = others.length ? mean(others.map(middle)) - slot.height / 2 : slot.y;
      }
      settle(column);
    }
  }
}

function layout(graph) {
  const known = new Map(graph.nodes.map((node) => [node.id, node]));
  const edges = graph.edges.filter((edge) => known.has(edge.from) && known.has(edge.to) && edge.from !== edge.to);
  const parents = new Map(graph.nodes.map((node) => [node.id, []]));
  for (const edge of edges) parents.get(edge.to).push(known.get(edge.from));
  const column = columnsOf(graph.nodes, parents);
  const { slots, routes } = slotsOf(graph.nodes, essential(edges.filter((edge) => column.get(edge.from) < column.get(edge.to))), column);
  const columns = [];
  for (const slot of slots) (columns[slot.column] ??= []).push(slot);
  orderColumns(columns);
  placeColumns(columns);
  for (const slot of slots) slot.x = slot.column * (SIZE.width + SIZE.columnGap);
  return { columns, routes, slots: slots.filter((slot) => slot.node) };
}
