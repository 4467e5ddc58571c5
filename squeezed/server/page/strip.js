/** The whole document as a narrow strip: where it was read, and which part is in view. */

import { make, rove } from "./dom.js";
import { heats } from "./map.js";

const MOST_MARKS = 12;

export class Strip {
  /** `onChoose(index)` is called with the passage of a mark, `onGo(share)` with a place of the strip. */
  constructor(root, map, { onChoose, onGo }) {
    this.root = root;
    this.map = map;
    this.shares = [];
    this.canvas = root.querySelector("canvas");
    this.window = root.querySelector(".view");
    this.marks = root.querySelector(".marks");
    rove(this.marks, "[role=option]", (mark) => onChoose(Number(mark.dataset.index)));
    this.canvas.addEventListener("click", (event) => onGo(event.offsetY / this.canvas.clientHeight));
    new ResizeObserver(() => this.draw()).observe(root);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Show shares, a list of `[index, share]`. */
  shade(shares) {
    this.shares = [...shares];
    this.draw();
  }

  /** Put marks at the passages that were read most. */
  mark(shares, nameOf) {
    const most = [...shares].sort((a, b) => b[1] - a[1]).slice(0, MOST_MARKS);
    most.sort((a, b) => a[0] - b[0]);
    this.marks.replaceChildren(...most.map(([index], i) => this.#mark(index, i === 0, nameOf(index))));
    const has = most.length > 0;
    this.marks[has ? "setAttribute" : "removeAttribute"]("role", "listbox");
    this.marks[has ? "setAttribute" : "removeAttribute"]("aria-label", "Places that were read most");
  }

  #mark(index, first, name) {
    const mark = make("div", "mark");
    mark.setAttribute("role", "option");
    mark.setAttribute("aria-selected", "false");
    mark.setAttribute("aria-label", name);
    mark.title = name;
    mark.tabIndex = first ? 0 : -1;
    mark.dataset.index = index;
    mark.style.top = `${(100 * this.#middle(index)).toFixed(2)}%`;
    return mark;
  }

  choose(index) {
    for (const mark of this.marks.children)
      mark.setAttribute("aria-selected", String(Number(mark.dataset.index) === index));
  }

  /** Show which part is in view. */
  look() {
    const [from, to] = this.map.view;
    this.window.style.top = `${100 * from}%`;
    this.window.style.height = `${100 * Math.max(0.004, to - from)}%`;
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.root;
    const scale = devicePixelRatio || 1;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    const pen = this.canvas.getContext("2d");
    pen.fillStyle = getComputedStyle(this.root).getPropertyValue("--accent");
    for (const [index, heat] of heats(this.shares)) {
      const [from, to] = this.#ends(index);
      pen.globalAlpha = 0.1 + 0.9 * heat;
      const thick = Math.max(2, (to - from) * height) * scale;
      pen.fillRect(0, from * height * scale, width * scale, thick);
    }
    this.look();
  }

  #ends(index) {
    const { start, end } = this.map.passages[index];
    return [start / this.map.text.length, end / this.map.text.length];
  }

  #middle(index) {
    const [from, to] = this.#ends(index);
    return (from + to) / 2;
  }
}
