"use strict";
// The page proves itself: every record shown is checked against the log's signed checkpoint, and what is shown against the record.
// The steps are those of `trailmark verify` (attribution/log/verify.py).

const PAYLOAD_TYPE = "application/vnd.in-toto+json";
const MAY_BE_CONTRIBUTORS = new Set(["contributor", "dataset", "prompt", "retrieval", "workflow_patch"]);
const PUBLIC_SUBJECTS = new Set(["adapter", "base_model"]);
const NAMED_BY_NAME = new Set(["contributor", "dataset", "refinement", "base_model", "adapter", "benchmark", "prompt"]);

class ProofError extends Error {}
function require(holds, reason) { if (!holds) throw new ProofError(reason); }

// RFC 8785 for what records hold: integers, text, booleans, null, lists, objects.
function canonical(value) {
  if (Array.isArray(value)) return `[${value.map(canonical).join(",")}]`;
  if (value && typeof value === "object") return `{${Object.keys(value).sort().map((key) => `${JSON.stringify(key)}:${canonical(value[key])}`).join(",")}}`;
  require(typeof value !== "number" || Number.isSafeInteger(value), "a number is not an integer");
  return JSON.stringify(value);
}

const hashNode = (left, right) => sha256(concat(Uint8Array.of(1), left, right));
const keyIdOf = (publicHex) => hexOf(sha256(utf8(canonical({ keytype: "ed25519", scheme: "ed25519", keyval: { public: publicHex } }))));

// RFC 9162, section 2.1.3.2.
function rootOf(hash, index, size, path) {
  require(index < size, "the index lies outside the tree");
  let [at, last, root] = [index, size - 1, hash];
  for (const sibling of path) {
    require(last > 0, "the inclusion path is too long");
    if (at % 2 === 1 || at === last) {
      root = hashNode(sibling, root);
      while (at % 2 === 0 && at > 0) { at /= 2; last = Math.floor(last / 2); }
    } else root = hashNode(root, sibling);
    at = Math.floor(at / 2);
    last = Math.floor(last / 2);
  }
  require(last === 0, "the inclusion path is too short");
  return root;
}

// A verifier key: NAME+HASH+BASE64(0x01 || public key), c2sp.org/signed-note.
function parseVerifierKey(text) {
  const [name, hash, ...rest] = text.trim().split("+");
  const data = bytesOfBase64(rest.join("+"));
  require(data.length === 33 && data[0] === 1, "the log's key is not an Ed25519 verifier key");
  const short = sha256(concat(utf8(`${name}\n`), data)).slice(0, 4);
  require(hexOf(short) === hash, "the log's key does not match its own hash");
  return { name, short, key: data.slice(1) };
}

async function openCheckpoint(note, verifier) {
  const end = note.lastIndexOf("\n\n");
  require(end > 0, "the checkpoint has no signature");
  const text = note.slice(0, end + 1);
  const [origin, size, root, empty] = text.split("\n");
  require(origin === verifier.name && empty === "" && text.split("\n").length === 4, `the checkpoint is not of the log ${verifier.name}`);
  let signed = false;
  for (const line of note.slice(end + 2).split("\n").filter(Boolean)) {
    const [, name, encoded] = line.split(" ");
    const signature = bytesOfBase64(encoded);
    if (name !== verifier.name || !equalBytes(signature.slice(0, 4), verifier.short)) continue;
    require(await signatureHolds(verifier.key, signature.slice(4), utf8(text)), "the log did not sign this checkpoint");
    signed = true;
  }
  require(signed && String(Number(size)) === size, "no signature of the log's key stands under the checkpoint");
  return { origin, size: Number(size), root: bytesOfBase64(root) };
}

function statementOf(envelope) {
  require(envelope.payloadType === PAYLOAD_TYPE, "the envelope holds no in-toto statement");
  const statement = JSON.parse(new TextDecoder().decode(bytesOfBase64(envelope.payload)));
  return { ...statement, kind: statement.predicateType.match(/record\/([a-z_]+)\/v1$/)[1] };
}

function subjectsOf(statement) {
  const outputs = statement.subject.map((item) => ({ kind: item.annotations.kind, digest: `sha256:${item.digest.sha256}` }));
  const inputs = statement.predicate.inputs.map(({ kind, digest }) => ({ kind, digest }));
  return [...new Map([...outputs, ...inputs].filter((item) => PUBLIC_SUBJECTS.has(item.kind)).map((item) => [canonical(item), item])).values()];
}

async function checkSignatures(envelope, statement, keys, introduced) {
  const payload = bytesOfBase64(envelope.payload);
  const message = concat(utf8(`DSSEv1 ${PAYLOAD_TYPE.length} ${PAYLOAD_TYPE} ${payload.length} `), payload);
  const body = statement.predicate.body;
  const known = { ...keys, ...(MAY_BE_CONTRIBUTORS.has(statement.kind) ? introduced : {}) };
  if (statement.kind === "contributor") {
    require(keyIdOf(body.public_key) === body.key_id, "the contributor's key id is not that of its key");
    known[body.key_id] = body.public_key;
  }
  require(envelope.signatures.length > 0, "nobody signed the record");
  for (const { keyid, sig } of envelope.signatures) {
    require(known[keyid], `signed by the unknown key ${keyid.slice(0, 12)}`);
    require(await signatureHolds(bytesOfHex(known[keyid]), bytesOfBase64(sig), message), "the signature is wrong, or the record was altered");
  }
  if (statement.kind === "contributor") introduced[body.key_id] = body.public_key;
}

// What the page shows of a record must be what the record says.
function checkShown(node, statement, names) {
  const { num_in: given, num_kept: kept, ...own } = node.facts;
  const facts = node.kind === "contributor" ? own : node.facts;
  const body = statement.predicate.body;
  require(node.kind === statement.kind && node.time_us === statement.predicate.time_us, "kind or time shown is not the record's");
  require(canonical(facts) === canonical(body), "what is shown is not what the record says");
  if (NAMED_BY_NAME.has(node.kind)) require(node.label === body.name, "the name shown is not the record's");
  if (node.kind === "publication") require(node.label === `${body.name}@${body.version}`, "the name shown is not the record's");
  if (node.kind === "contributor") {
    require((names[body.key_id] ?? body.name) === body.name, "the contributor's name shown is not the record's");
    checkRows(node, given, kept);
  }
}

function checkRows(node, given, kept) {
  const refinements = graph.nodes.filter((other) => other.kind === "refinement");
  if (given === undefined || refinements.some((other) => other.id.startsWith("more-"))) return;
  const sum = (field) => refinements.flatMap((other) => other.facts.per_contributor ?? []).filter((row) => row.key_id === node.facts.key_id).reduce((total, row) => total + row[field], 0);
  require(sum("num_in") === given && sum("num_kept") === kept, "the rows shown are not what the refinements say");
}

function checkEdges(id, leaf) {
  const shown = graph.edges.filter((edge) => edge.to === id).map((edge) => edge.from).filter((from) => !from.startsWith("more-"));
  require(shown.every((from) => leaf.parents.includes(from)), "an arrow leads here that the log does not have");
  require(leaf.parents.every((parent) => !byId.has(parent) || shown.includes(parent)), "an arrow that the log has is missing");
}

async function proveRecord(id, proof, session) {
  const done = [];
  const step = async (name, check) => {
    try {
      await check();
      done.push({ name, ok: true });
    } catch (error) {
      done.push({ name, ok: false, reason: error instanceof ProofError ? error.message : `unreadable: ${error.message}` });
      throw done;
    }
  };
  const { leaf, envelope } = proof;
  let statement = null;
  try {
    const hash = sha256(concat(Uint8Array.of(0), utf8(canonical(leaf))));
    await step("Leaf hash", () => require(hexOf(hash) === id, "the leaf was altered: its hash is not the record's name"));
    await step("Inclusion in the log", () => {
      require(session.checkpoint, "there is no signed checkpoint to lead to");
      const root = rootOf(hash, proof.index, session.checkpoint.size, proof.path.map(bytesOfBase64));
      require(equalBytes(root, session.checkpoint.root), "the path does not lead to the signed root");
    });
    if (byId.has(id)) await step("Arrows", () => checkEdges(id, leaf));
    if (!envelope) return [...done, { name: "Record erased: its place is proven, its content is gone", ok: true }];
    await step("Commitment", () => require(hexOf(sha256(concat(bytesOfHex(proof.salt), utf8(canonical(envelope))))) === leaf.commitment, "record or salt is not the one that the leaf commits to"));
    await step("Header", () => {
      statement = statementOf(envelope);
      const { predicate } = statement;
      require(statement.kind === leaf.kind && predicate.time_us === leaf.time_us, "kind or time differs from the leaf's");
      require(canonical(subjectsOf(statement)) === canonical(leaf.subjects), "its artefacts differ from the leaf's");
    });
    await step("Signature", () => checkSignatures(envelope, statement, session.keys, session.introduced));
    if (byId.has(id)) await step("What this page shows", () => checkShown(byId.get(id), statement, graph.names ?? {}));
  } catch (failed) {
    if (failed !== done) throw failed;
  }
  return done;
}

async function proveGraph(trust) {
  const { records, checkpoint: note } = graph.proofs;
  const session = { checkpoint: null, keys: {}, introduced: {} };
  const result = { records: new Map(), problem: "", origin: "", size: 0, failed: [], unproven: [] };
  try {
    const verifier = parseVerifierKey(trust.log);
    for (const [id, key] of Object.entries(trust.keys)) require(keyIdOf(key) === id, `trusted key ${id.slice(0, 12)} does not match its id`);
    session.keys = trust.keys;
    session.checkpoint = await openCheckpoint(note, verifier);
    Object.assign(result, { origin: session.checkpoint.origin, size: session.checkpoint.size });
  } catch (error) {
    result.problem = error instanceof ProofError ? error.message : `the checkpoint or a key cannot be read (${error.message})`;
  }
  const inOrder = Object.entries(records).sort(([, a], [, b]) => a.index - b.index);
  for (const [id, proof] of inOrder) result.records.set(id, await proveRecord(id, proof, session));
  result.failed = [...result.records].filter(([, steps]) => steps.some((step) => !step.ok)).map(([id]) => id);
  result.unproven = graph.nodes.map((node) => node.id).filter((id) => !records[id]);
  result.ok = !result.problem && !result.failed.length;
  return result;
}
