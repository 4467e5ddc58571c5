/** The page: choose a document, ask, and see what was read for the answer, and for each of its words. */

import { Answer } from "./answer.js";
import { get, key } from "./api.js";
import { ask } from "./asking.js";
import { Documents } from "./documents.js";
import { $, make, say, showFailure } from "./dom.js";
import { comparison, figures } from "./figures.js";
import { ReadingMap, heats } from "./map.js";
import { Strip } from "./strip.js";
import { excerpt, percent, shared } from "./words.js";

const MOST_READS = 5;
const LEAST_USUAL = 0.02;
/** Of the mean share: passages whose usual share is less count as if it were that. */

const page = { model: "", report: null, word: null, running: null };

const map = new ReadingMap($("document"), { onChoose: choosePassage, onPoint: describePassage, onScroll: () => strip.look() });
const strip = new Strip($("strip"), map, { onChoose: choosePassage, onGo: (share) => map.go(share) });
const answer = new Answer($("answer"), { onLook: lookAt, onChoose: chooseWord });
const dense = new Answer($("dense-answer"));
const documents = new Documents({ onChoose: open, onFailure: fail });

/** Show an error in words; one about the key asks for it. */
function fail(error) {
  if (error.name === "AbortError") return;
  if (error.status === 401) return askForKey();
  showFailure($("failure"), error);
}

function askForKey() {
  if (key.get()) showFailure($("failure"), new Error("The server does not know this key."));
  key.forget();
  $("key-form").hidden = false;
  $("key").focus();
}

async function open(context) {
  page.running?.abort();
  forget();
  map.clear();
  $("map-title").textContent = context.title ?? context.id;
  document.title = `${context.title ?? context.id} – ask a document`;
  try {
    const found = await get(`v1/contexts/${encodeURIComponent(context.id)}/passages`);
    if (documents.chosen?.id !== context.id) return;
    $("strip").hidden = false;
    await map.show(found);
    if (page.report) look(page.word);
    else strip.draw();
  } catch (error) {
    fail(error);
  }
}

/** Take the last answer and all that it showed away. */
function forget() {
  page.report = page.word = null;
  answer.clear();
  dense.clear();
  for (const id of ["result", "dense", "reads", "legend", "shading"]) $(id).hidden = true;
  $("figures").replaceChildren();
  showFailure($("failure"), null);
  map.choose(null);
  describePassage(null);
  shadeBy([]);
  strip.mark([], () => "");
}

async function onAsk(event) {
  event.preventDefault();
  if (!documents.chosen) return fail(new Error("Choose a document first, or add one."));
  page.running?.abort();
  const running = (page.running = new AbortController());
  forget();
  $("result").hidden = $("stop").hidden = false;
  try {
    await answerBoth(running.signal);
  } catch (error) {
    if (!answer.text) $("result").hidden = true;
    if (page.running === running) fail(error);
  } finally {
    answer.running = dense.running = false;
    if (page.running === running) {
      page.running = null;
      $("stop").hidden = true;
      state("");
    }
  }
}

async function answerBoth(signal) {
  const wanted = {
    model: page.model,
    context: documents.chosen.id,
    question: $("question").value,
    longest: Number($("longest").value),
    signal,
  };
  const budget = Number($("budget").value) / 100;
  const compare = $("compare").checked;
  const report = await written(answer, { ...wanted, budget, reading: true }, "Answering");
  tell(report);
  if (!compare) return;
  $("dense").hidden = false;
  const other = await written(dense, { ...wanted, budget: 1 }, "Answering densely");
  compared(budget, report, other);
}

/** Let one answer be written; its report. */
async function written(place, wanted, doing) {
  state(`${doing} …`);
  say(doing);
  place.running = true;
  try {
    return await ask(wanted, (piece) => place.add(piece));
  } finally {
    place.running = false;
  }
}

/** Show what the answer cost and what it read. */
function tell(report) {
  page.report = report;
  $("figures").replaceChildren(figures(report));
  if (report.tokens) answer.tell(report.tokens);
  if (report.passages) {
    $("legend").hidden = $("shading").hidden = false;
    mark();
  }
  look(null);
  goToMost(shares());
  if (report.fallback) fail(new Error(`This answer was read densely: ${report.fallback}`));
  say(report.budget_spent == null ? answer.text : `${answer.text} — ${percent(report.budget_spent)} of the keys read.`);
}

function compared(budget, report, other) {
  const [ours, theirs] = [answer.texts, dense.texts];
  const [inOurs, inTheirs] = shared(ours, theirs);
  answer.differ(inOurs);
  dense.differ(inTheirs);
  const same = inTheirs.filter(Boolean).length;
  $("figures").replaceChildren(comparison(budget, report, other, same, theirs.length));
  say(`Dense answer: ${dense.text} — ${same} of ${theirs.length} words alike.`);
}

/**
 * What is shaded: all attention, or how far it stands out from what a neutral question draws, as
 * (share - usual) / sqrt(usual). Heads look at what is near, so the end of a document draws attention always.
 */
function shaded(reads) {
  if (document.querySelector("[name=shading]:checked").value === "share") return reads;
  const least = LEAST_USUAL / Math.max(1, map.passages.length);
  return reads.map(([index, share]) => {
    const { share: whole, excess } = page.report.passages[index];
    const usual = whole - excess;
    return [index, Math.max(0, share - usual) / Math.sqrt(Math.max(least, usual))];
  });
}

function shares() {
  return (page.report?.passages ?? []).map(({ index, share }) => [index, share]);
}

function mark() {
  strip.mark(shaded(shares()), (index) => `${map.describe(index, page.report)}. ${map.excerpt(index)}`);
}

/** Show what was read for a word, or for the whole answer. */
function look(word) {
  const read = word ? [...word.reads] : shares();
  const seen = shaded(read);
  shadeBy(seen);
  $("reads").hidden = read.length === 0;
  $("reads-title").textContent = word ? `Read for “${excerpt(word.text, 40)}”` : "Read for this answer";
  const whole = new Map(read);
  const most = heats(seen).sort((a, b) => b[1] - a[1]).slice(0, MOST_READS);
  $("reads-list").replaceChildren(...most.map(([index, heat]) => readRow(index, heat, whole.get(index))));
}

function shadeBy(read) {
  map.shade(read);
  strip.shade(read);
}

function readRow(index, heat, share) {
  const row = make("li");
  const button = make("button", "read-row");
  button.type = "button";
  const bar = make("span", "heat");
  bar.style.setProperty("--heat", heat.toFixed(3));
  button.append(bar, make("span", "excerpt", map.excerpt(index)), make("span", "share", percent(share)));
  button.addEventListener("click", () => choosePassage(index));
  row.append(button);
  return row;
}

function lookAt(word) {
  look(word?.reads ? word : page.word);
}

/** Keep a word's reading, and go to what it read most; choosing it again lets go of it. */
function chooseWord(word) {
  page.word = page.word?.element === word.element ? null : word;
  answer.choose(page.word);
  look(page.word);
  goToMost(page.word?.reads ?? []);
}

/** Go to the passage that was read most. */
function goToMost(reads) {
  const [most] = shaded([...reads]).sort((a, b) => b[1] - a[1]);
  if (most) showPassage(most[0]);
}

function showPassage(index) {
  map.choose(index);
  strip.choose(index);
  describePassage(index);
}

function choosePassage(index) {
  showPassage(index);
  say(`${map.describe(index, page.report)}. ${map.excerpt(index)}`);
}

function describePassage(index) {
  const shown = index ?? (map.chosen ? Number(map.chosen.dataset.index) : null);
  $("passage").textContent = shown === null ? "\u00a0" : map.describe(shown, page.report);
}

function state(text) {
  $("state").textContent = text;
}

function showBudget() {
  const said = `${$("budget").value} %`;
  $("budget-said").textContent = said;
  $("budget").setAttribute("aria-valuetext", `${$("budget").value} percent`);
}

async function start() {
  try {
    const { model, budget } = await get("ready");
    page.model = model;
    $("model").textContent = model;
    $("budget").value = Math.round(100 * budget) || 1;
    showBudget();
    await documents.load();
  } catch (error) {
    fail(error);
  }
}

$("ask").addEventListener("submit", onAsk);
$("stop").addEventListener("click", () => page.running?.abort());
$("budget").addEventListener("input", showBudget);
$("shading").addEventListener("change", () => {
  mark();
  look(page.word);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("key").value.trim());
  $("key").value = "";
  $("key-form").hidden = true;
  showFailure($("failure"), null);
  start();
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && page.word) chooseWord(page.word);
});
start();
