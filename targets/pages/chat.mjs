// The page of `lrc-edge serve`: a GGUF answers here, by wllama (llama.cpp in WebAssembly). No request but to our server.
import { Wllama } from "/wllama/esm/index.js";
import { contextLength } from "./gguf.mjs";

const MAX_CONTEXT = 4096; // tokens: a longer KV cache is more than phones have room for
const $ = (id) => document.getElementById(id);
const MB = 1e6;
const quiet = () => {};

let about, model, file, wasm; // wasm: the runtime's program as a URL that also works when the server is gone
let alive = false; // whether the model can answer; it dies of an error in llama.cpp
let messages = []; // the conversation so far, for the chat template
let writing = null; // the AbortController of the answer that is being written

function say(text, { failed = false, progress = null, again = false } = {}) {
  $("message").textContent = text;
  $("status").classList.toggle("failed", failed);
  $("progress").hidden = progress === null;
  $("progress").value = progress ?? 0;
  $("again").hidden = !again;
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
  const size = `${(about.bytes / MB).toFixed(1)} MB`;
  document.title = `${about.name} · lrc-edge`;
  $("name").textContent = about.name;
  $("facts").textContent = size;
  file = await download("model.gguf", about.bytes, (share) => say(`Reading ${size}`, { progress: share }));
  say("Starting llama.cpp", { progress: 1 });
  wasm = URL.createObjectURL(await (await fetch("/wllama/esm/wasm/wllama.wasm")).blob());
  await load();
  const { meta, hparams } = model.getModelMetadata();
  const n_ctx = model.getLoadedContextInfo().n_ctx;
  const parameters = meta["general.size_label"];
  $("facts").textContent = [parameters && `${parameters} parameters`, about.encoding, size,
    `${hparams.nLayer} layers`, `${n_ctx} tokens of context`].filter(Boolean).join(" · ");
  $("mode").hidden = !model.getChatTemplate();
  const threads = model.getNumThreads();
  $("threads").textContent = `${threads} thread${threads > 1 ? "s" : ""}.` + (crossOriginIsolated ? "" :
    " Browsers give a page more only over https or on localhost.");
  showMode();
  ready();
  $("prompt").focus();
}

async function load() {
  const said = [];
  const note = (text) => said.push(String(text));
  await model?.exit();
  model = new Wllama({ default: wasm }, { logger: { debug: note, log: quiet, warn: quiet, error: note } });
  // What a browser without 64-bit memory or JSPI is given; by default wllama would ask a foreign server for it.
  model.setCompat({ worker: "/wllama-compat/wasm/wllama.js", wasm: "/wllama-compat/wasm/wllama.wasm" });
  const n_ctx = Math.min(MAX_CONTEXT, await contextLength(file).catch(() => MAX_CONTEXT));
  const n_threads = Math.max(1, Math.min(4, Math.floor(navigator.hardwareConcurrency / 2)));
  try {
    await model.loadModel([file], { n_ctx, n_threads, n_parallel: 1, n_gpu_layers: 0, jinja: true });
  } catch (error) {
    const why = said.filter((line) => /error|fail|invalid|corrupt/i.test(line) && !line.startsWith("Stack")).at(-1);
    throw new Error(`${about.file} cannot be loaded: ${(why ?? error.message).trim()}. Export it again, then reload this page.`);
  }
  const buffers = said.map((line) => line.match(/buffer size = +([\d.]+) MiB/)).filter(Boolean);
  const bytes = buffers.reduce((sum, [, mebibytes]) => sum + Number(mebibytes) * 2 ** 20, 0);
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
  say("", { again: messages.length > 0 });
  $("prompt").disabled = $("send").disabled = false;
}

function count(tokens) {
  const { n_ctx } = model.getLoadedContextInfo();
  $("used").textContent = tokens;
  $("context").textContent = `of ${n_ctx}`;
  $("meter").style.width = `${100 * Math.min(1, tokens / n_ctx)}%`;
  $("meter").classList.toggle("full", tokens >= n_ctx);
}

function newTurn(text) {
  $("intro").hidden = true;
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

function show({ timings, usage }) {
  const speed = (n, milliseconds) => (1000 * n / milliseconds).toFixed(n / milliseconds < 0.01 ? 1 : 0);
  if (timings?.prompt_ms) $("prefill").textContent = speed(timings.prompt_n, timings.prompt_ms);
  if (timings?.predicted_n > 1) $("decode").textContent = speed(timings.predicted_n, timings.predicted_ms);
  if (timings) count(timings.cache_n + timings.prompt_n + timings.predicted_n);
}

const STOPPED = "Stopped.";

// Writes the answer to `text` below it. Returns what to say of how it ended, or "".
async function write(text, turn) {
  const max_tokens = Number($("length").value), options = { max_tokens, temperature: Number($("temperature").value),
    stream: true, timings_per_token: true, cache_prompt: true, abortSignal: writing.signal };
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
    if (answers()) await model.createChatCompletion({ ...options, messages });
    else await model.createCompletion({ ...options, prompt: text });
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    return STOPPED;
  }
  if (end?.reason !== "length") return "";
  const { n_ctx } = model.getLoadedContextInfo();
  return end.written < max_tokens ? `The context of ${n_ctx} tokens is full.` : `Stopped at ${end.written} tokens.`;
}

async function send() {
  const text = $("prompt").value;
  if (!text.trim() || writing) return;
  writing = new AbortController();
  $("prompt").value = "";
  grow();
  say("");
  $("send").textContent = "Stop";
  $("send").classList.add("stop");
  const turn = newTurn(text);
  const kept = messages.length;
  if (answers()) messages.push({ role: "user", content: text });
  try {
    if (!alive) await load();
    turn.note.textContent = await write(text, turn);
    if (answers()) messages.push({ role: "assistant", content: turn.answer.textContent });
    ready();
  } catch (error) {
    messages.length = kept;
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
    say("Start a new conversation, or write less.", { failed: true, again: true });
    return;
  }
  alive = false; // the next answer starts llama.cpp anew
  turn.note.textContent = STOPPED;
  say(`llama.cpp stopped: ${error.message}`, { failed: true, again: true });
}

function again() {
  writing?.abort();
  messages = [];
  $("conversation").querySelectorAll(".turn").forEach((turn) => turn.remove());
  $("intro").hidden = false;
  count(0);
  say("");
  $("prompt").focus();
}

// Controls

function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

const warmth = () => { $("warmth").textContent = Number($("temperature").value) || "0, always the likeliest"; };

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
