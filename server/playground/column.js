// One column of the page: a method, its text as it comes, its figures.

const APPLIED = {
  num_speculative_tokens: "depth",
  beam_width: "width",
  candidates_per_level: "candidates",
  acceptance_threshold: "threshold",
  acceptance_reference: "compared with",
  acceptance: "verified by",
};
const ORIGINS = { draft: "proposed by the draft", target: "the target’s own" };

export class Column {
  #parts = {};
  #figures = {};
  #count = 0;
  #logProbs = 0;
  #first = null;

  constructor(template, method) {
    this.element = template.content.firstElementChild.cloneNode(true);
    for (const name of ["method", "state", "error", "output", "applied"]) {
      this.#parts[name] = this.element.querySelector(`.${name}`);
    }
    for (const figure of this.element.querySelectorAll("[data-figure]")) {
      this.#figures[figure.dataset.figure] = figure;
    }
    this.#parts.method.value = method;
    this.#parts.method.addEventListener("change", () => this.#name());
    this.#name();
  }

  get method() {
    return this.#parts.method.value;
  }

  get select() {
    return this.#parts.method;
  }

  #name() {
    this.#parts.output.setAttribute("aria-label", `Text of ${this.method}`);
    this.element.setAttribute("aria-label", this.method);
  }

  clear(state) {
    this.#count = this.#logProbs = 0;
    this.#first = null;
    this.#parts.output.replaceChildren();
    this.#parts.applied.textContent = "";
    this.#parts.error.hidden = true;
    for (const figure of Object.values(this.#figures)) figure.textContent = "–";
    this.state = state;
  }

  set state(text) {
    this.#parts.state.textContent = text;
  }

  fail(message) {
    this.#parts.error.textContent = message;
    this.#parts.error.hidden = false;
    this.state = "Failed";
  }

  /** Shows new tokens; `count` is the number of all so far, which the server's usage tells. */
  add(tokens, count) {
    const output = this.#parts.output;
    const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
    for (const token of tokens) {
      if (token.logProb !== null) this.#logProbs += token.logProb;
      if (!token.text) continue;
      if (token.origin === null && output.lastChild) output.lastChild.append(token.text);
      else output.append(this.#span(token));
    }
    if (atEnd) output.scrollTop = output.scrollHeight;
    this.#measure(count);
  }

  #span(token) {
    const span = document.createElement("span");
    span.textContent = token.text;
    span.className = token.origin;
    span.title = `${ORIGINS[token.origin]}, log-prob ${token.logProb.toFixed(2)}`;
    return span;
  }

  /** While the text comes, the page's own clock; `finish` puts the server's in its place. */
  #measure(count) {
    const now = performance.now();
    this.#first ??= { now, count };
    this.#count = count;
    const seconds = (now - this.#first.now) / 1000;
    if (seconds > 0) this.#figures.speed.textContent = format((count - this.#first.count) / seconds, 1);
    if (this.method !== "draft") this.#figures.quality.textContent = format(this.#logProbs / count, 2);
  }

  finish(metrics, reason) {
    const { speculative_decoding: steps, energy } = metrics;
    const figures = this.#figures;
    figures.speed.textContent = format(metrics.tokens_per_second, 1);
    figures.length.textContent = steps ? format(steps.mean_acceptance_length, 2) : "no draft";
    figures.quality.textContent = format(metrics.target_logprob_mean, 2);
    figures.energy.textContent = significant(energy?.joules_per_output_token);
    this.#parts.applied.textContent = describe(metrics.speculative);
    this.state = `${this.#count} tokens, ${reason === "length" ? "at the limit" : "complete"}`;
  }
}

function describe(applied) {
  return Object.entries(applied)
    .filter(([name, value]) => name in APPLIED && value !== null)
    .map(([name, value]) => `${APPLIED[name]} ${value}`)
    .join(" · ");
}

/** Joules span decades: fixed digits would show small ones as 0. */
function significant(value) {
  return value === null || value === undefined ? "not measured" : String(Number(value.toPrecision(3)));
}

function format(value, digits) {
  return value === null || value === undefined ? "not measured" : value.toFixed(digits).replace("-", "−");
}
