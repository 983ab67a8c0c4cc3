// The page of `lrc-edge serve`: a GGUF answers here, by wllama (llama.cpp in WebAssembly). It asks only our server.
import { describe } from "./gguf.mjs";
import { load, program } from "./llama.mjs";

const MAX_CONTEXT = 4096; // tokens: a longer KV cache is more than phones have room for
const $ = (id) => document.getElementById(id);
const MB = 1e6;

let about, model, file, n_ctx;
let wasm; // the runtime's program, as a URL that works when the server is gone
let errors; // llama.cpp's, line by line
let alive = false; // whether the model can answer; it dies of an error in llama.cpp
let messages = []; // the conversation so far, for the chat template
let writing = null; // the AbortController of the answer that is being written

// What goes on, above the composer: nothing, a share that is done, or a failure.
function say(text, { failed = false, progress = null } = {}) {
  $("message").textContent = text;
  $("status").classList.toggle("idle", !text);
  $("status").classList.toggle("failed", failed);
  $("progress").hidden = progress === null;
  $("progress").value = progress ?? 0;
}

// Loading

async function download(url, bytes, told) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: the server says ${response.status}; run lrc-edge serve again`);
  const parts = [], reader = response.body.getReader();
  for (let n = 0; ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    told((n += value.length) / bytes);
  }
  return new Blob(parts);
}

async function start() {
  about = await (await fetch("about.json")).json();
  const size = `${(about.bytes / MB).toFixed(1)}\u00a0MB`;
  $("facts").textContent = `${about.file} · ${size}`;
  file = await download("model.gguf", about.bytes, (share) => say(`Reading ${size}`, { progress: share }));
  say("Starting llama.cpp", { progress: 1 });
  wasm = await program();
  const { name, n_ctx_train } = await describe(file).catch(() => ({})); // llama.cpp says what is wrong with it
  $("name").textContent = name || about.file;
  document.title = `${name || about.file} · lrc-edge`;
  n_ctx = Math.min(MAX_CONTEXT, n_ctx_train ?? MAX_CONTEXT);
  await begin();
  const threads = model.getNumThreads();
  $("facts").textContent += ` · ${threads}\u00a0thread${threads > 1 ? "s" : ""}`;
  $("threads").hidden = crossOriginIsolated;
  $("mode").hidden = !model.getChatTemplate();
  showMode();
  ready();
}

// Starts llama.cpp, for the first time or after it died.
async function begin() {
  await model?.exit();
  const n_threads = Math.max(1, Math.min(4, Math.floor(navigator.hardwareConcurrency / 2)));
  let said;
  try {
    ({ model, said, errors } = await load(file, wasm, { n_ctx, n_threads, jinja: true }));
  } catch (error) {
    throw new Error(`${about.file} cannot be loaded: ${error.message}. Reload this page, or export the file again.`);
  }
  const mebibytes = said.map((line) => Number(line.match(/buffer size = +([\d.]+) MiB/)?.[1] ?? 0));
  const bytes = 2 ** 20 * mebibytes.reduce((sum, value) => sum + value);
  $("memory").textContent = (bytes / MB).toFixed(bytes < 100 * MB ? 1 : 0);
  $("memory").title = "llama.cpp's buffers: weights, KV cache, working memory";
  alive = true;
  count(0);
}

// Conversation

const answers = () => Boolean(model.getChatTemplate()) && !$("plain").checked;

function showMode() {
  $("lead").textContent = answers() ? "Ask something." : "Write a beginning; the model goes on.";
  $("prompt").placeholder = answers() ? "Ask something" : "Once upon a time";
}

function ready() {
  say("");
  $("prompt").disabled = $("send").disabled = false;
  $("prompt").focus();
}

function count(tokens) {
  $("used").textContent = tokens;
  $("context").textContent = `of ${n_ctx}`;
  $("meter").style.width = `${100 * Math.min(1, tokens / n_ctx)}%`;
  $("meter").classList.toggle("full", tokens >= n_ctx);
}

function newTurn(text) {
  $("intro").hidden = true;
  $("again").hidden = false;
  const turn = document.createElement("div");
  turn.className = `turn writing${answers() ? "" : " continued"}`;
  const [asked, answer, note] = ["asked", "answer", "note"].map((name) => {
    const part = document.createElement("p");
    part.className = name;
    turn.append(part);
    return part;
  });
  asked.textContent = text;
  $("conversation").append(turn);
  $("conversation").scrollTop = $("conversation").scrollHeight;
  return { turn, answer, note };
}

function show({ timings }) {
  const speed = (n, milliseconds) => (1000 * n / milliseconds).toFixed(n / milliseconds < 0.01 ? 1 : 0);
  if (timings?.prompt_ms) $("prefill").textContent = speed(timings.prompt_n, timings.prompt_ms);
  if (timings?.predicted_n > 1) $("decode").textContent = speed(timings.predicted_n, timings.predicted_ms);
  if (timings) count(timings.cache_n + timings.prompt_n + timings.predicted_n);
}

const STOPPED = "Stopped.";

// Writes the answer to `input`, {messages} or {prompt}. Returns what to say of how it ended, or "".
async function write(input, turn) {
  const max_tokens = Number($("length").value) || Number($("length").defaultValue);
  const options = { ...input, max_tokens, temperature: Number($("temperature").value), stream: true,
    timings_per_token: true, cache_prompt: true, abortSignal: writing.signal };
  let end;
  options.onData = (chunk) => {
    const [choice] = chunk.choices;
    turn.answer.textContent += choice.delta?.content ?? choice.text ?? "";
    const { scrollHeight, scrollTop, clientHeight } = $("conversation");
    if (scrollHeight - scrollTop - clientHeight < 120) $("conversation").scrollTop = scrollHeight;
    if (choice.finish_reason) end = { reason: choice.finish_reason, written: chunk.timings.predicted_n };
    show(chunk);
  };
  try {
    await (input.messages ? model.createChatCompletion(options) : model.createCompletion(options));
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    return STOPPED;
  }
  if (end?.reason !== "length") return "";
  return end.written < max_tokens ? `The context of ${n_ctx} tokens is full.` : `Stopped at ${end.written} tokens.`;
}

async function send() {
  const text = $("prompt").value;
  if (!text.trim() || writing) return;
  writing = new AbortController();
  errors.length = 0;
  $("prompt").value = "";
  grow();
  say("");
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  const turn = newTurn(text);
  const user = { role: "user", content: text }, conversation = messages; // `again` begins another meanwhile
  const input = answers() ? { messages: [...conversation, user] } : { prompt: text };
  try {
    if (!alive) await begin();
    turn.note.textContent = await write(input, turn);
    if (input.messages) conversation.push(user, { role: "assistant", content: turn.answer.textContent });
    ready();
  } catch (error) {
    failed(error, turn);
  }
  turn.turn.classList.remove("writing");
  writing = null;
  $("send").textContent = "Send";
  $("send").classList.remove("stop");
}

function failed(error, turn) {
  const full = error.message.match(/request \((\d+) tokens\) exceeds the available context size \((\d+) tokens\)/);
  ready();
  if (full) {
    turn.note.textContent = `The context is full: this needs ${full[1]} tokens and there are ${full[2]}.`;
    say("Start a new conversation, or write less.", { failed: true });
    return;
  }
  alive = false; // the next answer starts llama.cpp anew
  turn.note.textContent = STOPPED;
  say(`llama.cpp stopped: ${errors[0] ?? error.message}. Ask again.`, { failed: true });
}

function again() {
  writing?.abort();
  messages = [];
  $("conversation").querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("intro").hidden = false;
  $("again").hidden = true;
  count(0);
  ready();
}

// Controls

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

const warmth = () => { $("warmth").textContent = Number($("temperature").value) || "0 (greedy)"; };

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (writing) writing.abort();
  else send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") writing?.abort(); });
$("prompt").addEventListener("input", grow);
$("temperature").addEventListener("input", warmth);
$("plain").addEventListener("change", showMode);
$("again").addEventListener("click", again);
$("settings").open = matchMedia("(min-width: 761px)").matches;
warmth();
start().catch((error) => say(error.message, { failed: true }));
