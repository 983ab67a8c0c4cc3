// onnxruntime-web in the page, by transformers.js: answers the requests of ../worker.py.
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "/transformers/dist/transformers.min.js";

let model, tokenizer, context, vocab;

const DTYPES = { "model.onnx": "fp32", "model_fp16.onnx": "fp16", "model_quantized.onnx": "q8", "model_q4.onnx": "q4" };
const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

// Of a row of `ids`; `named` are ids that it need not hold.
function check(ids, named = []) {
  if (ids.length > context) throw new Error(`a row of ${ids.length} tokens in a context of ${context}`);
  const wrong = [...ids, ...named].find((id) => !(Number.isInteger(id) && id >= 0 && id < vocab));
  if (wrong !== undefined) throw new Error(`id ${wrong} is outside the vocabulary of ${vocab}`);
}

const requests = {
  async open({ url, n_ctx, threads }) {
    const [folder, , file] = url.split("/").slice(-3);
    const dtype = DTYPES[file];
    if (!dtype) throw new Error(`transformers.js cannot load ${file}: it knows ${Object.keys(DTYPES).join(", ")}`);
    env.allowRemoteModels = env.useBrowserCache = false;
    env.allowLocalModels = true;
    env.localModelPath = new URL(url).pathname.split("/").slice(0, -3).join("/");
    const ort = "/onnxruntime/dist/ort-wasm-simd-threaded.asyncify";
    const { wasm } = env.backends.onnx;
    wasm.numThreads = crossOriginIsolated ? threads : 1;
    wasm.wasmPaths = { mjs: `${ort}.mjs`, wasm: `${ort}.wasm` };
    const session_options = { logSeverityLevel: 3 };
    try {
      tokenizer = await AutoTokenizer.from_pretrained(folder);
      model = await AutoModelForCausalLM.from_pretrained(folder, { dtype, device: "wasm", session_options });
    } catch (error) {
      throw new Error(`transformers.js cannot load this file (${error.message ?? error}); export it again`);
    }
    ({ vocab_size: vocab, max_position_embeddings: context } = model.config);
    context = Math.min(context, n_ctx);
    return { runtime: `transformers.js ${env.version} (onnxruntime-web ${env.backends.onnx.versions.web}, WebAssembly)`,
      n_ctx: context, vocab_size: vocab, threads: wasm.numThreads };
  },

  async score({ ids, wanted }) {
    check(ids, wanted.flat());
    const { logits } = await model({ input_ids: row(ids), attention_mask: row(ids.map(() => 1)),
      position_ids: row([...ids.keys()]) });
    const logprobs = [], argmax = [];
    const size = logits.dims[2];
    for (let t = 0; t < ids.length; t++) {
      const values = logits.data.subarray(t * size, (t + 1) * size);
      const best = values.reduce((found, value, id) => value > values[found] ? id : found, 0);
      const norm = values[best] + Math.log(values.reduce((sum, value) => sum + Math.exp(value - values[best]), 0));
      logprobs.push(wanted[t].map((id) => values[id] - norm));
      argmax.push(best);
    }
    return { logprobs, argmax };
  },

  async generate({ ids, n_tokens, stop }) {
    check(ids);
    const made = await model.generate({ inputs: row(ids), attention_mask: row(ids.map(() => 1)), do_sample: false,
      max_new_tokens: Math.min(n_tokens, context - ids.length), eos_token_id: stop.length ? stop : null });
    const found = Array.from(made.data, Number).slice(ids.length);
    const end = found.findIndex((id) => stop.includes(id));
    return { ids: end < 0 ? found : found.slice(0, end) };
  },

  async tokenize({ texts }) {
    return { ids: texts.map((text) => Array.from(tokenizer(text).input_ids.data, Number)) };
  },
};

export const answer = ({ op, ...fields }) => requests[op](fields);
