// llama.cpp in the page, by wllama: answers the requests of ../worker.py.
import { named, silent } from "./gguf.mjs";
import { llamaVersion, load, program } from "./llama.mjs";

const VIEWS = { shipped: (file) => file, named, silent };
const BIAS = 2 ** 14; // exact in float32 beside any logit, and past all of them

let file, options, wasm, model, view;

// The model with the file's tokens as `wanted` (a key of VIEWS) shows them; one at a time is in memory.
async function use(wanted) {
  if (view === wanted) return;
  await model?.exit();
  model = view = undefined;
  try {
    ({ model } = await load(await VIEWS[wanted](file), wasm, options));
  } catch (error) {
    throw new Error(`wllama cannot load this file (${error.message}); export it again`);
  }
  view = wanted;
}

// One token more after `prompt`; what was computed for the last prompt's beginning is kept unless `cold`.
async function complete(prompt, more, cold = false) {
  try {
    return await model.createCompletion({ prompt, temperature: 0, max_tokens: 1, cache_prompt: !cold, ...more });
  } catch (error) {
    view = undefined; // it may be dead
    throw new Error(`wllama: ${error.message}`);
  }
}

const name = (id) => `<${id}>`;
const names = (ids) => ids.map(name).join("");

function check(ids, named = []) {
  const { n_vocab } = model.getLoadedContextInfo();
  const wrong = [...ids, ...named].find((id) => !(Number.isInteger(id) && id >= 0 && id < n_vocab));
  if (wrong !== undefined) throw new Error(`id ${wrong} is outside the vocabulary of ${n_vocab}`);
}

const requests = {
  async open({ url, n_ctx, threads }) {
    const [weights, about] = await Promise.all([url, "/wllama/package.json"].map((address) => fetch(address)));
    if (!weights.ok) throw new Error(`wllama cannot load this file (${url}: ${weights.status})`);
    const { version } = await about.json();
    file = await weights.blob();
    wasm = await program();
    options = { n_ctx, n_threads: threads, warmup: false };
    await use("shipped");
    const info = model.getLoadedContextInfo();
    return { runtime: `wllama ${version} (llama.cpp ${llamaVersion()})`, n_ctx: info.n_ctx,
      vocab_size: info.n_vocab, threads: model.getNumThreads() };
  },

  // wllama tells log-probabilities of the likeliest tokens only, and a token at a time: as many as it takes.
  async score({ ids, wanted }) {
    await use("named");
    check(ids, wanted.flat());
    const logprobs = [], argmax = [];
    await complete(names(ids), {}, true); // the prompt at once, as a chat has it; then its positions one by one
    for (let t = 0; t < ids.length; t++) {
      const known = await likeliest(names(ids.slice(0, t + 1)), wanted[t]);
      logprobs.push(wanted[t].map((id) => known.get(id)));
      argmax.push(known.keys().next().value);
    }
    return { logprobs, argmax };
  },

  async generate({ ids, n_tokens, stop }) {
    await use("named");
    check(ids);
    const made = await complete(names(ids), { max_tokens: n_tokens, n_probs: 1, stop: stop.map(name) }, true);
    const found = made.choices[0].logprobs.content.map(({ id }) => id);
    const end = found.findIndex((id) => stop.includes(id));
    return { ids: end < 0 ? found : found.slice(0, end) };
  },

  async tokenize({ texts }) {
    await use("silent");
    const ids = [];
    for (const text of texts) ids.push(await idsOf(text));
    return { ids };
  },
};

// id -> log-probability after the prompt, likeliest first, until all of `wanted` are there.
async function likeliest(prompt, wanted) {
  const { n_vocab } = model.getLoadedContextInfo();
  for (let n_probs = Math.min(256, n_vocab); ; n_probs = Math.min(16 * n_probs, n_vocab)) {
    const { choices } = await complete(prompt, { n_probs });
    const known = new Map(choices[0].logprobs.content[0].top_logprobs.map(({ id, logprob }) => [id, logprob]));
    if (wanted.every((id) => known.has(id))) return known;
    if (n_probs === n_vocab) throw new Error(`wllama tells ${known.size} of ${n_vocab} log-probabilities`);
  }
}

// wllama has no call for it. But a bonus for each time a token stands in the prompt's last k places, less the same for
// the k - 1 that are known, makes the token in the k-th place from the end the next one.
async function idsOf(text) {
  if (!text && !model.mustAddBosToken()) return []; // nothing to complete
  const ids = [], counts = new Map();
  for (let k = 1; ; k++) {
    const logit_bias = Array.from(counts, ([id, count]) => [id, -BIAS * count]);
    const bonus = { repeat_last_n: k, frequency_penalty: -BIAS, logit_bias };
    const { choices, usage } = await complete(text, { n_probs: 1, ...bonus });
    const { id } = choices[0].logprobs.content[0];
    ids.unshift(id);
    counts.set(id, (counts.get(id) ?? 0) + 1);
    if (k === usage.prompt_tokens) return ids;
  }
}

export const answer = ({ op, ...fields }) => requests[op](fields);
