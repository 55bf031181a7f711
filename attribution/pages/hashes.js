"use strict";
// SHA-256 and SHA-512 in plain JavaScript: a page in MLflow's sandboxed frame, or on plain http, has no crypto.subtle.
// Source: FIPS 180-4. The constants are what it says they are: first bits of the roots of the first primes.

const MASK64 = (1n << 64n) - 1n;
const concat = (...parts) => {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { whole.set(part, at); at += part.length; }
  return whole;
};
const utf8 = (text) => new TextEncoder().encode(text);
const hexOf = (bytes) => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const equalBytes = (a, b) => a.length === b.length && a.every((byte, index) => byte === b[index]);

function bytesOfHex(text) {
  if (!/^([0-9a-f]{2})*$/.test(text)) throw new Error("not hex");
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

function bytesOfBase64(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  if (btoa(String.fromCharCode(...bytes)) !== text) throw new Error("base64 is not canonical");
  return bytes;
}

function root(value, degree) {
  let guess = 1n << (BigInt(value.toString(2).length) / degree + 1n);
  for (;;) {
    const next = ((degree - 1n) * guess + value / guess ** (degree - 1n)) / degree;
    if (next >= guess) return guess;
    guess = next;
  }
}

const PRIMES = [];
for (let n = 2; PRIMES.length < 80; n += 1) if (PRIMES.every((prime) => n % prime)) PRIMES.push(n);
const ROUNDS_512 = PRIMES.map((prime) => root(BigInt(prime) << 192n, 3n) & MASK64);
const START_512 = PRIMES.slice(0, 8).map((prime) => root(BigInt(prime) << 128n, 2n) & MASK64);
const ROUNDS_256 = Uint32Array.from(ROUNDS_512.slice(0, 64), (word) => Number(word >> 32n));
const START_256 = Uint32Array.from(START_512, (word) => Number(word >> 32n));

// The message, a one bit, zeros, and its length in bits at the end of the last block.
function padded(bytes, blockBytes) {
  const whole = new Uint8Array(Math.ceil((bytes.length + 1 + blockBytes / 8) / blockBytes) * blockBytes);
  whole.set(bytes);
  whole[bytes.length] = 0x80;
  new DataView(whole.buffer).setBigUint64(whole.length - 8, BigInt(bytes.length) * 8n);
  return whole;
}

function sha256(bytes) {
  const state = Uint32Array.from(START_256);
  const words = new Uint32Array(64);
  const whole = padded(bytes, 64);
  const view = new DataView(whole.buffer);
  const turn = (x, n) => (x >>> n) | (x << (32 - n));
  for (let block = 0; block < whole.length; block += 64) {
    for (let i = 0; i < 16; i += 1) words[i] = view.getUint32(block + 4 * i);
    for (let i = 16; i < 64; i += 1) {
      const [a, b] = [words[i - 15], words[i - 2]];
      words[i] = words[i - 16] + (turn(a, 7) ^ turn(a, 18) ^ (a >>> 3)) + words[i - 7] + (turn(b, 17) ^ turn(b, 19) ^ (b >>> 10));
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 64; i += 1) {
      const first = (h + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & f) ^ (~e & g)) + ROUNDS_256[i] + words[i]) | 0;
      const second = ((turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))) | 0;
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) | 0, c, b, a, (first + second) | 0];
    }
    [a, b, c, d, e, f, g, h].forEach((word, index) => { state[index] += word; });
  }
  const digest = new Uint8Array(32);
  state.forEach((word, index) => new DataView(digest.buffer).setUint32(4 * index, word));
  return digest;
}

function sha512(bytes) {
  const state = [...START_512];
  const words = new Array(80);
  const whole = padded(bytes, 128);
  const view = new DataView(whole.buffer);
  const turn = (x, n) => ((x >> n) | (x << (64n - n))) & MASK64;
  for (let block = 0; block < whole.length; block += 128) {
    for (let i = 0; i < 16; i += 1) words[i] = view.getBigUint64(block + 8 * i);
    for (let i = 16; i < 80; i += 1) {
      const [a, b] = [words[i - 15], words[i - 2]];
      words[i] = (words[i - 16] + (turn(a, 1n) ^ turn(a, 8n) ^ (a >> 7n)) + words[i - 7] + (turn(b, 19n) ^ turn(b, 61n) ^ (b >> 6n))) & MASK64;
    }
    let [a, b, c, d, e, f, g, h] = state;
    for (let i = 0; i < 80; i += 1) {
      const first = h + (turn(e, 14n) ^ turn(e, 18n) ^ turn(e, 41n)) + ((e & f) ^ (~e & MASK64 & g)) + ROUNDS_512[i] + words[i];
      const second = (turn(a, 28n) ^ turn(a, 34n) ^ turn(a, 39n)) + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + first) & MASK64, c, b, a, (first + second) & MASK64];
    }
    [a, b, c, d, e, f, g, h].forEach((word, index) => { state[index] = (state[index] + word) & MASK64; });
  }
  const digest = new Uint8Array(64);
  state.forEach((word, index) => new DataView(digest.buffer).setBigUint64(8 * index, word));
  return digest;
}
