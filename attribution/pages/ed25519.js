"use strict";
// Whether an Ed25519 signature holds: by the browser where it can, else by these lines. Source: RFC 8032, section 5.1.7.

const FIELD = 2n ** 255n - 19n;
const ORDER = 2n ** 252n + 27742317777372353535851937790883648493n;
const inField = (value) => ((value % FIELD) + FIELD) % FIELD;

function power(base, exponent) {
  let result = 1n;
  for (let square = inField(base); exponent > 0n; exponent >>= 1n, square = square * square % FIELD) {
    if (exponent & 1n) result = result * square % FIELD;
  }
  return result;
}

const CURVE_D = inField(-121665n * power(121666n, FIELD - 2n));
const littleEndian = (bytes) => bytes.reduceRight((sum, byte) => (sum << 8n) | BigInt(byte), 0n);
const IDENTITY = [0n, 1n, 1n, 0n];

// Extended coordinates (X, Y, Z, XY/Z); this addition holds for any two points, equal ones too.
function add([x1, y1, z1, t1], [x2, y2, z2, t2]) {
  const a = (y1 - x1) * (y2 - x2);
  const b = (y1 + x1) * (y2 + x2);
  const c = 2n * CURVE_D * (t1 * t2 % FIELD);
  const d = 2n * z1 * z2;
  const [e, f, g, h] = [inField(b - a), inField(d - c), inField(d + c), inField(b + a)];
  return [e * f % FIELD, g * h % FIELD, f * g % FIELD, e * h % FIELD];
}

function pointOf(bytes) {
  const number = littleEndian(bytes);
  const y = number & (2n ** 255n - 1n);
  if (y >= FIELD) return null;
  const [u, v] = [inField(y * y - 1n), inField(CURVE_D * y * y + 1n)];
  let x = inField(u * power(v, 3n) * power(u * power(v, 7n), (FIELD - 5n) / 8n));
  if (inField(v * x * x - u) !== 0n) x = x * power(2n, (FIELD - 1n) / 4n) % FIELD;
  if (inField(v * x * x - u) !== 0n || (x === 0n && number >> 255n)) return null;
  if ((x & 1n) !== number >> 255n) x = inField(-x);
  return [x, y, 1n, x * y % FIELD];
}

function bytesOfPoint([x, y, z]) {
  const inverse = power(z, FIELD - 2n);
  let number = (y * inverse % FIELD) | ((x * inverse % FIELD & 1n) << 255n);
  return Uint8Array.from({ length: 32 }, () => { const byte = Number(number & 255n); number >>= 8n; return byte; });
}

const BASE = pointOf(bytesOfHex("58" + "66".repeat(31)));

function holdsHere(key, signature, message) {
  const point = pointOf(key);
  const s = littleEndian(signature.slice(32));
  if (!point || signature.length !== 64 || s >= ORDER) return false;
  const k = littleEndian(sha512(concat(signature.slice(0, 32), key, message))) % ORDER;
  const minus = [inField(-point[0]), point[1], 1n, inField(-point[3])];
  const table = [null, BASE, minus, add(BASE, minus)];
  let sum = IDENTITY;  // s times the base minus k times the key, both numbers' bits at once
  for (let bit = 252n; bit >= 0n; bit -= 1n) {
    sum = add(sum, sum);
    const entry = table[Number((s >> bit) & 1n) + 2 * Number((k >> bit) & 1n)];
    if (entry) sum = add(sum, entry);
  }
  return equalBytes(bytesOfPoint(sum), signature.slice(0, 32));
}

let checker = null;
async function signatureChecker() {
  try {
    const key = bytesOfHex("58" + "66".repeat(31));
    await crypto.subtle.importKey("raw", key, "Ed25519", false, ["verify"]);
    return { name: "this browser's WebCrypto", holds: holdsInBrowser };
  } catch {
    return { name: "this page's own code (the browser offers none here)", holds: async (...parts) => holdsHere(...parts) };
  }
}

async function holdsInBrowser(key, signature, message) {
  const imported = await crypto.subtle.importKey("raw", key, "Ed25519", false, ["verify"]);
  return crypto.subtle.verify("Ed25519", imported, signature, message);
}

async function signatureHolds(key, signature, message) {
  checker ??= await signatureChecker();
  return checker.holds(key, signature, message);
}
