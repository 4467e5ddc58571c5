/** An answer, word by word; once its report is there, each word knows what was read for it. */

import { make, rove } from "./dom.js";
import { places } from "./words.js";

export class Answer {
  /**
   * `onLook(word)` is called with the word that is pointed at or focused, or null;
   * `onChoose(word)` with one that is clicked. A word has `text` and `reads`: a Map from passages to shares.
   */
  constructor(root, { onLook = () => {}, onChoose = () => {} } = {}) {
    this.root = root;
    this.reads = new WeakMap();
    const word = (event) => event.target.closest?.("[role=option]");
    const look = (event) => onLook(this.wordOf(word(event)));
    for (const kind of ["pointerover", "focusin"]) root.addEventListener(kind, look);
    for (const kind of ["pointerleave", "focusout"]) root.addEventListener(kind, () => onLook(null));
    rove(root, "[role=option]", (element) => onChoose(this.wordOf(element)));
    this.clear();
  }

  clear() {
    this.text = "";
    this.last = null;
    this.words = [];
    this.root.replaceChildren();
    for (const name of ["role", "aria-label", "aria-describedby"]) this.root.removeAttribute(name);
  }

  set running(is) {
    this.root.classList.toggle("running", is);
  }

  /** Add what came of the text. */
  add(piece) {
    for (const part of piece.match(/\s+|\S+/g) ?? []) {
      if (/\s/.test(part)) {
        this.root.append(part);
        this.last = null;
      } else if (this.last) {
        this.last.element.textContent += part;
      } else {
        this.last = { element: make("span", "word"), start: this.text.length };
        this.last.element.textContent = part;
        this.root.append(this.last.element);
        this.words.push(this.last);
      }
      this.text += part;
    }
  }

  get texts() {
    return this.words.map((word) => word.element.textContent);
  }

  /** Let every word know what its tokens read: the mean of their shares. */
  tell(tokens) {
    const at = places(this.text);
    const spans = tokens.map((token) => ({ ...token, start: at(token.start), end: at(token.end) }));
    let from = 0;
    for (const { element, start } of this.words) {
      const end = start + element.textContent.length;
      while (from < spans.length && spans[from].end <= start) from++;
      const own = [];
      for (let i = from; i < spans.length && spans[i].start < end; i++) own.push(spans[i]);
      this.reads.set(element, meanOf(own.map((token) => token.passages)));
      element.setAttribute("role", "option");
      element.setAttribute("aria-selected", "false");
      element.tabIndex = -1;
    }
    if (!this.words.length) return;
    this.words[0].element.tabIndex = 0;
    this.root.setAttribute("role", "listbox");
    this.root.setAttribute("aria-label", "Words of the answer; arrow keys go from one to the next");
  }

  /** Mark the word that stays chosen, or none. */
  choose(word) {
    for (const { element } of this.words)
      if (element.role === "option") element.setAttribute("aria-selected", String(element === word?.element));
  }

  /** Mark the words that the other answer does not have. */
  differ(same) {
    this.words.forEach(({ element }, i) => element.classList.toggle("differs", !same[i]));
  }

  wordOf(element) {
    if (!element) return null;
    return { element, text: element.textContent, reads: this.reads.get(element) };
  }
}

function meanOf(lists) {
  const mean = new Map();
  for (const list of lists)
    for (const [passage, share] of list) mean.set(passage, (mean.get(passage) ?? 0) + share / lists.length);
  return mean;
}
