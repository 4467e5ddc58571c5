/** The document as a reading map: every passage shaded by the attention that it got. */

import { make, motion } from "./dom.js";
import { count, excerpt, percent, places } from "./words.js";

const BLOCK = 1500;
/** Characters after which a block ends, at the next end of a line; the browser lays out only blocks in view. */
const LONGEST = 3 * BLOCK;
const AT_ONCE = 40;
/** Blocks that are made before the browser may draw. */
const CONTRAST = 0.8;
/** Power of a share in its shade; below 1 it lifts the faint ones. */
const FAINTEST = 0.04;

export class ReadingMap {
  /** `onChoose(index)` is called with a passage that is clicked, `onScroll()` when other parts are in view. */
  constructor(root, { onChoose, onPoint, onScroll }) {
    this.root = root;
    this.#reset();
    root.addEventListener("click", (event) => {
      const index = this.indexOf(event.target);
      if (index !== null && !getSelection()?.toString()) onChoose(index);
    });
    root.addEventListener("pointerover", (event) => onPoint(this.indexOf(event.target)));
    root.addEventListener("pointerleave", () => onPoint(null));
    root.addEventListener("scroll", onScroll, { passive: true });
    root.addEventListener("keydown", (event) => this.#key(event, onChoose));
  }

  clear() {
    this.#reset();
    this.root.replaceChildren();
  }

  #reset() {
    this.building = null;
    this.passages = [];
    this.spans = [];
    this.blocks = [];
    this.shaded = [];
    this.chosen = null;
    this.text = "";
  }

  /** Put a document in, in slices, so that a long one does not hold up the page. */
  async show({ text, data }) {
    this.clear();
    const building = (this.building = Symbol("document"));
    const at = places(text);
    this.text = text;
    this.passages = data.map(({ start, end }) => ({ start: at(start), end: at(end) }));
    this.root.scrollTop = 0;
    for (const [i, [from, to]] of cuts(text, this.passages).entries()) {
      if (i && i % AT_ONCE === 0) await new Promise((resume) => setTimeout(resume));
      if (this.building !== building) return;
      this.root.append(this.#block(from, to));
    }
  }

  #block(from, to) {
    const element = make("div", "block");
    for (let i = from; i < to; i++) {
      const [, before, core, after] = this.passageText(i).match(/^(\s*)([^]*?)(\s*)$/);
      const span = make("span", "passage-text", core);
      span.dataset.index = i;
      this.spans[i] = span;
      element.append(before, span, after);
    }
    const [start, end] = [this.passages[from].start, this.passages[to - 1].end];
    element.style.setProperty("--lines", Math.ceil((end - start) / 70));
    this.blocks.push({ element, start, end });
    return element;
  }

  passageText(index) {
    const { start, end } = this.passages[index];
    return this.text.slice(start, end);
  }

  excerpt(index) {
    return excerpt(this.passageText(index));
  }

  /** Shade passages by their shares, an iterable of `[index, share]`. */
  shade(shares) {
    for (const span of this.shaded) {
      span.style.removeProperty("--heat");
      span.classList.remove("read");
    }
    this.shaded = [];
    for (const [index, heat] of heats(shares)) {
      const span = this.spans[index];
      if (!span) continue;
      span.style.setProperty("--heat", heat.toFixed(3));
      span.classList.add("read");
      this.shaded.push(span);
    }
  }

  /** Choose a passage, and bring it into view if asked. */
  choose(index, move = true) {
    this.chosen?.classList.remove("chosen");
    this.chosen = index === null ? null : this.spans[index];
    this.chosen?.classList.add("chosen");
    if (!move || !this.chosen) return;
    const far = Math.abs(this.#top(this.chosen) - this.root.scrollTop) > 4 * this.root.clientHeight;
    this.chosen.scrollIntoView({ block: "center", behavior: far ? "instant" : motion() });
    if (far) requestAnimationFrame(() => this.chosen?.scrollIntoView({ block: "center", behavior: "instant" }));
  }

  /** Which part of the document is in view, as two shares of its characters. */
  get view() {
    const { scrollTop, clientHeight } = this.root;
    return [this.#shareAt(scrollTop), this.#shareAt(scrollTop + clientHeight)];
  }

  /** Bring a place, a share of the characters, into view. */
  go(share) {
    const place = share * this.text.length;
    const index = this.passages.findIndex(({ end }) => end > place);
    const span = this.spans[index < 0 ? this.spans.length - 1 : index];
    span?.scrollIntoView({ block: "center", behavior: "instant" });
  }

  #shareAt(height) {
    const block = this.blocks.findLast(({ element }) => element.offsetTop <= height) ?? this.blocks[0];
    if (!block) return 0;
    const inside = (height - block.element.offsetTop) / Math.max(1, block.element.offsetHeight);
    const place = block.start + Math.max(0, Math.min(1, inside)) * (block.end - block.start);
    return place / Math.max(1, this.text.length);
  }

  #top(span) {
    return span.closest(".block").offsetTop + span.offsetTop;
  }

  /** N and P go to the next and the previous passage that was read. */
  #key(event, onChoose) {
    const step = { n: 1, p: -1 }[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    const read = this.shaded.map((span) => Number(span.dataset.index)).sort((a, b) => a - b);
    const here = this.chosen ? Number(this.chosen.dataset.index) : -1;
    const next = step > 0 ? read.find((i) => i > here) : read.findLast((i) => i < here);
    if (next !== undefined) onChoose(next);
  }

  indexOf(element) {
    const found = element.closest?.("[data-index]");
    return found ? Number(found.dataset.index) : null;
  }

  /** A line about a passage. */
  describe(index, report) {
    const told = report?.passages?.[index];
    const name = `Passage ${count(index + 1)} of ${count(this.passages.length)}`;
    if (!told) return name;
    return `${name}: ${percent(told.share)} of the attention, ${percent(told.read)} of it read exactly`;
  }
}

/** Shares as shades of 0 to 1, the most read one being 1; those too faint to see are left out. */
export function heats(shares) {
  const all = [...shares];
  const most = all.reduce((most, [, share]) => Math.max(most, share), 0);
  return all.map(([index, share]) => [index, (share / (most || 1)) ** CONTRAST]).filter(([, heat]) => heat > FAINTEST);
}

/** First and last passage of every block. */
function cuts(text, passages) {
  const found = [];
  let from = 0;
  passages.forEach(({ end }, i) => {
    const long = end - passages[from].start;
    if ((long >= BLOCK && text[end - 1] === "\n") || long >= LONGEST || i === passages.length - 1) {
      found.push([from, i + 1]);
      from = i + 1;
    }
  });
  return found;
}
