/** Numbers as words, places in texts, and what two answers share. */

const WHOLE = new Intl.NumberFormat("en");

export const count = (value) => WHOLE.format(value);

/** Bytes in decimal units, three digits. */
export function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; value >= 999.5 && unit < units.length - 1; unit++) value /= 1000;
  return `${short(value)} ${units[unit]}`;
}

export function percent(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.1) return "under 0.1 %";
  return `${value >= 9.95 || value === 0 ? Math.round(value) : value.toFixed(1)} %`;
}

export function seconds(value) {
  return value < 1 ? `${short(1000 * value)} ms` : `${short(value)} s`;
}

function short(value) {
  return value >= 99.5 || Number.isInteger(value) ? WHOLE.format(Math.round(value)) : value.toPrecision(value < 10 ? 2 : 3);
}

/** A text on one line, with an end. */
export function excerpt(text, longest = 180) {
  const plain = text.slice(0, 3 * longest).replace(/\s+/g, " ").trim();
  return plain.length > longest ? `${plain.slice(0, longest - 1)}…` : plain;
}

/** The server counts characters, a string its halves of them: a function from one to the other. */
export function places(text) {
  if (!/[\ud800-\udbff]/.test(text)) return (place) => place;
  const found = [0];
  for (const character of text) found.push(found.at(-1) + character.length);
  return (place) => found[Math.min(place, found.length - 1)];
}

/** For two lists of words, whether each stands in their longest common subsequence. */
export function shared(one, two) {
  const width = two.length + 1;
  const table = new Uint32Array((one.length + 1) * width);
  for (let i = one.length - 1; i >= 0; i--)
    for (let j = two.length - 1; j >= 0; j--)
      table[i * width + j] =
        one[i] === two[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  const found = [new Array(one.length).fill(false), new Array(two.length).fill(false)];
  for (let i = 0, j = 0; i < one.length && j < two.length; ) {
    if (one[i] === two[j]) found[0][i++] = found[1][j++] = true;
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else j++;
  }
  return found;
}
