/** Documents: which there are, which is chosen, and those on their way. */

import { Failure, events, get, send } from "./api.js";
import { $, make, say, showFailure } from "./dom.js";
import { bytes, count } from "./words.js";

const AGAIN_MS = 2000;
/** Until a lost connection to a job is sought again; jobs survive a restart of the server. */

const PHASES = {
  parse: "taking the text out",
  prefill: "the model reads it",
  cluster: "sorting what it remembers",
  calibrate: "trying out what to read",
  save: "saving",
};

export class Documents {
  /** `onChoose(context)` is called when another document is chosen, `onFailure(error)` when something fails. */
  constructor({ onChoose, onFailure }) {
    this.contexts = new Map();
    this.watched = new Set();
    this.onChoose = onChoose;
    this.onFailure = onFailure;
    $("context").addEventListener("change", () => this.choose($("context").value));
    $("add").addEventListener("click", () => this.#open());
    $("cancel").addEventListener("click", () => $("new").close());
    $("new-form").addEventListener("submit", (event) => this.#create(event));
    addEventListener("hashchange", () => this.choose(decoded(location.hash)));
  }

  get chosen() {
    return this.contexts.get($("context").value) ?? null;
  }

  /** Ask the server for its documents and jobs, and choose one: that of the address, or the last one used. */
  async load() {
    await this.#list();
    for (const job of (await get("v1/jobs")).data) if (!job.finished) this.#watch(job);
    const latest = [...this.contexts.values()].sort((a, b) => b.used - a.used)[0];
    const wanted = decoded(location.hash);
    this.choose(this.contexts.has(wanted) ? wanted : latest?.id);
  }

  choose(name) {
    if (!this.contexts.has(name) || name === this.shown) return;
    this.shown = name;
    $("context").value = name;
    history.replaceState(null, "", `#${encodeURIComponent(name)}`);
    this.onChoose(this.contexts.get(name));
  }

  async #list() {
    const { data, refused } = await get("v1/contexts");
    this.contexts = new Map(data.map((context) => [context.id, context]));
    const options = data.map((context) => {
      const option = make("option", "", described(context));
      option.value = context.id;
      return option;
    });
    const none = make("option", "", "none yet");
    none.value = "";
    $("context").replaceChildren(...(options.length ? options : [none]));
    $("context").disabled = options.length === 0;
    if (this.contexts.has(this.shown)) $("context").value = this.shown;
    this.#refused(refused);
  }

  #refused(refused) {
    const [summary, list] = $("refused").children;
    $("refused").hidden = refused.length === 0;
    summary.textContent = refused.length === 1 ? "One document cannot be used" : `${refused.length} documents cannot be used`;
    list.replaceChildren(...refused.map(({ id, why }) => make("li", "", `${id}: ${why}`)));
  }

  #open() {
    showFailure($("new-failure"), null);
    $("new").showModal();
    $("file").focus();
  }

  async #create(event) {
    event.preventDefault();
    showFailure($("new-failure"), null);
    $("create").disabled = true;
    try {
      const answer = await send("v1/contexts", { method: "POST", body: wanted() });
      $("new-form").reset();
      $("new").close();
      this.#watch(await answer.json(), true);
    } catch (error) {
      showFailure($("new-failure"), error);
    } finally {
      $("create").disabled = false;
    }
  }

  /** Follow a job until it ends; choose its document if it was added here. */
  async #watch(job, choose = false) {
    if (this.watched.has(job.id)) return;
    this.watched.add(job.id);
    const row = new JobRow(job, (error) => this.onFailure(error));
    say(`Adding ${job.context}`);
    try {
      const ended = await followed(job, (now) => row.show(now));
      if (ended.state === "failed") throw new Failure(`${job.context} could not be added: ${ended.error}.`);
      await this.#list();
      say(ended.state === "done" ? `${job.context} was added` : `${job.context} was cancelled`);
      if (ended.state === "done" && (choose || !this.shown)) this.choose(job.context);
    } catch (error) {
      this.onFailure(error);
    } finally {
      row.element.remove();
    }
  }
}

/** One line with a bar for a document on its way. */
class JobRow {
  constructor(job, onFailure) {
    this.element = make("li");
    this.text = make("p");
    this.bar = document.createElement("progress");
    this.bar.setAttribute("aria-label", `Adding ${job.context}`);
    const cancel = make("button", "quiet", "Cancel");
    cancel.type = "button";
    cancel.setAttribute("aria-label", `Cancel adding ${job.context}`);
    cancel.addEventListener("click", () => send(`v1/jobs/${job.id}`, { method: "DELETE" }).catch(onFailure));
    this.element.append(this.text, cancel, this.bar);
    $("jobs").append(this.element);
    this.show(job);
  }

  show({ context, phase, done, total, state }) {
    const what = state === "waiting" ? "waits for its turn" : (PHASES[phase] ?? "begins");
    const tokens = phase === "prefill" && total > 1 ? `, ${count(done)} of ${count(total)} tokens` : "";
    this.text.textContent = `${context}: ${what}${tokens}`;
    if (state === "running" && total > 1) {
      this.bar.max = total;
      this.bar.value = done;
    } else this.bar.removeAttribute("value");
  }
}

async function followed(job, show) {
  for (;;) {
    try {
      for await (const { name, data } of events(await send(`v1/jobs/${job.id}/events`))) {
        const now = JSON.parse(data);
        show(now);
        if (name !== "progress") return now;
      }
    } catch (error) {
      if (!(error instanceof Failure) || error.status !== 0) throw error;
    }
    await new Promise((resume) => setTimeout(resume, AGAIN_MS));
  }
}

/** The request that the dialog asks for. */
function wanted() {
  const [file, text, name] = [$("file").files[0], $("text").value, $("name").value.trim()];
  if (file && text.trim()) throw new Failure("Give a file or a text, not both.");
  if (!file && !text.trim()) throw new Failure("Choose a file, or paste a text.");
  if (!file) return { name: name || named(text), text };
  const form = new FormData();
  form.append("file", file);
  if (name) form.append("name", name);
  return form;
}

/** A name from a text's first words. */
function named(text) {
  const words = text.normalize("NFKD").match(/[A-Za-z0-9]+/g)?.slice(0, 4) ?? [];
  return words.join("-").toLowerCase().slice(0, 60) || "document";
}

function described({ id, title, tokens, bytes: size }) {
  return `${title ?? id} — ${count(tokens)} tokens, ${bytes(size)}`;
}

function decoded(hash) {
  try {
    return decodeURIComponent(hash.slice(1));
  } catch {
    return "";
  }
}
