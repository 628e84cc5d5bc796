// The form: what is asked, in which order, and where its errors are shown.

import { Column } from "./column.js";
import { ApiError, generate, listModels } from "./stream.js";
import { ChatTokens, CompletionTokens } from "./tokens.js";

const byId = (id) => document.getElementById(id);
const columns = ["target", "speculative", "mmtad"].map((method) => new Column(byId("column"), method));
let model = null;
let running = null;

byId("columns").append(...columns.map((column) => column.element));
byId("request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) run();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("key").addEventListener("change", loadModels);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("request").requestSubmit();
});
loadModels();

async function loadModels() {
  clearErrors();
  try {
    const models = await listModels(byId("key").value);
    const draft = models.find((each) => each.role === "draft");
    model = models[0].id;
    byId("models").textContent = draft ? `${model} with ${draft.id}` : `${model}, without a draft`;
    for (const { select } of columns) {
      for (const option of select.querySelectorAll("[data-draft]")) option.disabled = !draft;
      if (select.selectedOptions[0].disabled) select.value = "target";
      select.dispatchEvent(new Event("change"));
    }
  } catch (error) {
    byId("models").textContent = error.message;
    showError(error, null);
  }
}

async function run() {
  if (model === null) await loadModels();
  else clearErrors();
  if (model === null || !numbersAreNumbers()) return;
  running = new AbortController();
  setBusy(true);
  try {
    for (const column of columns) column.clear("Waiting");
    if (byId("order").value === "together") {
      await Promise.all(columns.map(runColumn));
    } else {
      for (const column of columns) await runColumn(column);
    }
  } finally {
    running = null;
    setBusy(false);
  }
}

async function runColumn(column) {
  if (running.signal.aborted) {
    column.state = "Not started";
    return;
  }
  column.state = "Running …";
  const chat = byId("route").value === "chat";
  const tokens = chat ? new ChatTokens() : new CompletionTokens();
  const path = chat ? "v1/chat/completions" : "v1/completions";
  let reason = null;
  try {
    for await (const chunk of generate(path, body(column.method, chat), byId("key").value, running.signal)) {
      const [choice] = chunk.choices;
      if (choice) {
        column.add(tokens.read(choice), chunk.usage.completion_tokens);
        reason = choice.finish_reason ?? reason;
      } else {
        column.finish(chunk.metrics, reason);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      column.state = "Stopped";
    } else {
      column.fail(error.message);
      showError(error, column.select);
    }
  }
}

function body(method, chat) {
  const prompt = byId("prompt").value;
  const maxTokens = number("max-tokens");
  return {
    model,
    ...(chat
      ? { messages: [{ role: "user", content: prompt }], max_completion_tokens: maxTokens, logprobs: true }
      : { prompt, max_tokens: maxTokens, logprobs: 0 }),
    temperature: number("temperature"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    speculative: {
      method,
      num_speculative_tokens: number("depth"),
      beam_width: number("width"),
      acceptance_threshold: number("threshold"),
      metrics: "detailed",
    },
  };
}

/** An empty field leaves the choice to the server. */
function number(id) {
  return byId(id).value === "" ? null : byId(id).valueAsNumber;
}

/** What a browser cannot read as a number has no value: the server would never hear of it. */
function numbersAreNumbers() {
  const unread = Array.from(document.querySelectorAll("input[type=number]")).filter((each) => each.validity.badInput);
  for (const control of unread) mark(control, "Enter a number.");
  unread[0]?.focus();
  return unread.length === 0;
}

/** Puts a refusal beside the control it speaks of, beside what the column itself says. */
function showError(error, method) {
  if (!(error instanceof ApiError)) throw error;
  if (error.param === "speculative.method") method.setAttribute("aria-invalid", "true");
  const control = error.status === 401 ? byId("key") : controlOf(error.param);
  if (control) mark(control, error.message);
}

function mark(control, text) {
  if (control.getAttribute("aria-invalid") === "true") return;
  const message = document.createElement("p");
  message.className = "error";
  message.id = `${control.id}-error`;
  message.setAttribute("role", "alert");
  message.textContent = text;
  control.setAttribute("aria-invalid", "true");
  control.setAttribute("aria-describedby", message.id);
  control.closest(".field").append(message);
}

function controlOf(param) {
  if (param === null) return null;
  const controls = Array.from(document.querySelectorAll("form [data-param]"));
  const named = (name) => param === name || param.startsWith(`${name}.`) || param.startsWith(`${name}[`);
  return controls.find((control) => control.dataset.param.split(" ").some(named)) ?? null;
}

function clearErrors() {
  document.querySelectorAll(".field .error").forEach((message) => message.remove());
  document.querySelectorAll("[aria-invalid]").forEach((control) => {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  });
}

function setBusy(busy) {
  const [dead, alive] = busy ? [byId("run"), byId("stop")] : [byId("stop"), byId("run")];
  const focused = document.activeElement === dead;
  dead.disabled = true;
  alive.disabled = false;
  if (focused) alive.focus({ preventScroll: true }); // else a keyboard would start again at the top
}
