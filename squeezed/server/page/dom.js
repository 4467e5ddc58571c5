/** Elements of the page. What others wrote is only ever put into them as text. */

export const $ = (id) => document.getElementById(id);

/** A new element, with a class and a text if they are given. */
export function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** Tell those who listen to the page rather than look at it. */
export function say(text) {
  $("said").textContent = text;
}

/** Show what failed, in words, or nothing any more. */
export function showFailure(place, error) {
  place.textContent = error ? error.message : "";
}

/** How to move: at once, for those who asked for less motion. */
export function motion() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches ? "instant" : "smooth";
}

/**
 * Let many elements be one stop of the Tab key, with the arrow keys among them.
 * `choose` is called with the element for Enter, Space and a click.
 */
export function rove(root, selector, choose) {
  const all = () => [...root.querySelectorAll(selector)];
  const focus = (element) => {
    for (const other of all()) other.tabIndex = other === element ? 0 : -1;
    element.focus();
  };
  root.addEventListener("keydown", (event) => {
    const here = event.target.closest(selector);
    if (!here) return;
    const found = all();
    const to = step(event.key, found.indexOf(here), found.length);
    if (to !== null) focus(found[to]);
    else if (event.key === "Enter" || event.key === " ") choose(here);
    else return;
    event.preventDefault();
  });
  root.addEventListener("click", (event) => {
    const here = event.target.closest(selector);
    if (!here) return;
    focus(here);
    choose(here);
  });
}

function step(key, at, count) {
  const to = {
    ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: count - 1,
  }[key];
  return to === undefined ? null : Math.max(0, Math.min(count - 1, to));
}
