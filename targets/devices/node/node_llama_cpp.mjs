// The worker of node-llama-cpp: llama.cpp in node, on the CPU, from its prebuilt program. argv: the kit's node_modules.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { peakBytes, serve } from "./lines.mjs";

const folder = join(process.argv[2], "node-llama-cpp");
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(folder, "dist", "index.js")));
const { version } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));

let model, sequence, n_ctx, vocab_size;
const errors = []; // what llama.cpp said last

// An empty context for a row of `ids`; `named` are ids that it need not hold.
async function begin(ids, named = []) {
  if (ids.length > n_ctx) throw new Error(`a row of ${ids.length} tokens in a context of ${n_ctx}`);
  const wrong = [...ids, ...named].find((id) => !(Number.isInteger(id) && id >= 0 && id < vocab_size));
  if (wrong !== undefined) throw new Error(`id ${wrong} is outside the vocabulary of ${vocab_size}`);
  await sequence.clearHistory();
}

await serve({
  async open(asked) {
    const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, progressLogs: false,
      maxThreads: asked.threads, logLevel: LlamaLogLevel.error, logger: (_, text) => errors.push(text.trim()) });
    try {
      model = await llama.loadModel({ modelPath: asked.path, gpuLayers: 0 });
    } catch (error) {
      const why = errors.at(-1) ?? error.message;
      throw new Error(`${asked.path}: node-llama-cpp cannot load this file (${why}); export it again`);
    }
    const context = await model.createContext({ contextSize: asked.n_ctx, threads: asked.threads });
    sequence = context.getSequence();
    n_ctx = Math.min(asked.n_ctx, context.contextSize);
    vocab_size = model.fileInfo.metadata.tokenizer.ggml.tokens.length;
    return { label: `node-llama-cpp ${version} (llama.cpp ${llama.llamaCppRelease.release})`, n_ctx, vocab_size };
  },

  async score({ ids, wanted }) {
    await begin(ids, wanted.flat());
    const row = ids.map((id, t) => [id, { generateNext: { totalLogitWeight: true,
      logits: { filter: { tokens: wanted[t], includeTop: 1 } } } }]);
    const logprobs = [], argmax = [];
    for (const [t, { next }] of (await sequence.controlledEvaluate(row)).entries()) {
      const [best, largest] = next.logits.entries().next().value;
      const norm = largest + Math.log(next.totalLogitWeight);
      logprobs.push(wanted[t].map((id) => next.logits.get(id) - norm));
      argmax.push(best);
    }
    return { logprobs, argmax };
  },

  async generate({ ids, n_tokens, stop }) {
    await begin(ids);
    const made = [], room = Math.min(n_tokens, n_ctx - ids.length); // past that it would forget the beginning
    if (room <= 0) return { ids: made };
    for await (const id of sequence.evaluate(ids, { temperature: 0, yieldEogToken: true })) {
      if (stop.includes(id)) break;
      made.push(id);
      if (made.length === room) break;
    }
    return { ids: made };
  },

  async tokenize({ texts }) {
    const { bos, eos, shouldPrependBosToken, shouldAppendEosToken } = model.tokens;
    const ids = (text) => [...shouldPrependBosToken ? [bos] : [], ...model.tokenize(text, true),
      ...shouldAppendEosToken ? [eos] : []];
    return { ids: texts.map(ids) };
  },

  memory: async () => ({ peak_bytes: peakBytes("self"), how: "VmHWM of node" }),
});
process.exit();
