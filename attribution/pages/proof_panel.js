"use strict";
// What the proof found, in words: the badge, the red bar over a page that fails, the steps of each record.

let proved = null;
const proofHolds = (id) => !proved || !proved.failed.includes(id);
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

function stepList(steps) {
  return make("ul", { class: "steps" }, ...steps.map((step) => make("li", step.ok ? {} : { class: "bad" }, step.ok ? step.name : `${step.name}: ${step.reason}`)));
}

function proofParts(id) {
  if (!proved) return [make("p", { class: "note" }, "Being checked.")];
  const steps = proved.records.get(id);
  if (!steps) return [make("p", { class: "note" }, "Its proof is not part of this page: "), make("code", { class: "block" }, `trailmark log proof ${id.slice(0, 16)} --out record.json`)];
  const checkpoint = proved.problem ? { name: "Checkpoint", ok: false, reason: proved.problem } : { name: `Checkpoint of ${plural(proved.size, "entry").replace("entrys", "entries")}, signed by ${proved.origin}`, ok: true };
  return [stepList([checkpoint, ...steps])];
}

function firstFailure() {
  if (proved.problem) return proved.problem;
  const [id] = proved.failed;
  const step = proved.records.get(id).find((other) => !other.ok);
  return `${byId.has(id) ? `${kindName(byId.get(id).kind)} ${byId.get(id).label}` : `record ${short(id)}`}: ${step.reason}`;
}

function showProof() {
  const badge = document.getElementById("proof");
  const alarm = document.getElementById("alarm");
  badge.className = `proof ${proved.ok ? "good" : "bad"}`;
  badge.textContent = proved.ok ? `\u2713 Verified: ${plural(proved.records.size, "record")}${proved.unproven.length ? `, ${number(proved.unproven.length)} without proof here` : ""}` : "\u2715 Verification failed";
  alarm.hidden = proved.ok;
  alarm.textContent = proved.ok ? "" : `Do not rely on this page: ${proved.problem ? "nothing on it is proven" : `${number(proved.failed.length)} of ${plural(proved.records.size, "record")} ${proved.failed.length === 1 ? "fails" : "fail"}`}. ${firstFailure().replace(/^./, (letter) => letter.toUpperCase())}.`;
  document.body.dataset.proof = proved.ok ? "good" : "bad";
}

// The key comes with the page, so the reader may hold the page to a key from elsewhere.
function trustParts() {
  const input = make("textarea", { "aria-label": "A key you trust", placeholder: "Verifier key, or the content of trust.json" });
  const button = make("button", { class: "act", type: "button" }, "Check against this key");
  button.addEventListener("click", () => { prove(input.value.trim() || null).then(showProofPanel); });
  return [
    make("p", { class: "note" }, "The key below came with the page. To be sure, compare it with the one you have, or paste yours (trust.json of the log's operator)."),
    make("code", { class: "block" }, graph.proofs.trust.log), input, button,
  ];
}

function showProofPanel() {
  const panel = document.getElementById("panel");
  document.body.classList.remove("closed");
  selected = null;
  for (const card of cards.values()) card.classList.remove("selected");
  const close = make("button", { class: "close", type: "button", "aria-label": "Close the panel" }, "Close");
  close.addEventListener("click", () => document.body.classList.add("closed"));
  const failures = proved.failed.map((id) => ({ id, steps: proved.records.get(id).filter((step) => !step.ok) }));
  const checks = [
    proved.problem ? { name: "Checkpoint", ok: false, reason: proved.problem } : { name: `Checkpoint over ${number(proved.size)} entries, signed by ${proved.origin}`, ok: true },
    ...failures.map(({ id, steps }) => ({ name: byId.get(id)?.label ?? short(id), ok: false, reason: steps[0].reason })),
  ];
  const whole = proved.records.size - proved.failed.length;
  if (whole && !proved.problem) checks.push({ name: `${plural(whole, "record")}: in the log, unaltered, signed, and shown as they are`, ok: true });
  const parts = [close, make("h2", {}, proved.ok ? "This page is proven" : "This page is not proven"), ...section("Checks", stepList(checks)),
    make("p", { class: "note" }, `Signatures by ${checker?.name ?? "no key"}; hashes by this page. Nothing was loaded.`), ...section("Whose log", ...trustParts())];
  if (proved.unproven.length) parts.push(...section("Without proof here", make("p", { class: "note" }, `${plural(proved.unproven.length, "card")}: too many for one page, or cards that only count others.`)));
  panel.replaceChildren(...parts);
  panel.scrollTop = 0;
}

function trustOf(text) {
  if (!text) return graph.proofs.trust;
  if (!text.startsWith("{")) return { ...graph.proofs.trust, log: text };
  const { log, keys } = JSON.parse(text);
  return { log, keys };
}

async function prove(text) {
  let trust = { log: "", keys: {} };
  try { trust = trustOf(text); } catch { /* an unreadable key proves nothing, and the checks below say so */ }
  proved = await proveGraph(trust);
  draw();
  showProof();
  if (selected) select(selected);
}

function listenToProof() {
  const badge = document.getElementById("proof");
  badge.className = "proof wait";
  badge.textContent = "Verifying\u2026";
  badge.addEventListener("click", () => { if (proved) showProofPanel(); });
  prove(null).catch((error) => {
    badge.className = "proof bad";
    badge.textContent = `Not verified: ${error.message}`;
  });
}
