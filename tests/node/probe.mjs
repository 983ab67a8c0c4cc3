// What transformers.js makes of an ONNX folder as it lies. stdin: JSON {folder, dtypes, text, prompts, ids, n_tokens};
// stdout: JSON {text_ids, <dtype>: {dtype, generated, top5}}. A dtype of "default" names none.
import { readFileSync, writeSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoModelForCausalLM, AutoTokenizer, Tensor, env } from "@huggingface/transformers";

const asked = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.localModelPath = dirname(asked.folder);
const name = basename(asked.folder);

const row = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

// The five likeliest ids of each position, with their log-probabilities.
function top5(logits) {
  const [, length, size] = logits.dims;
  return Array.from({ length }, (_, i) => {
    const values = Array.from(logits.data.subarray(i * size, (i + 1) * size));
    const largest = values.reduce((a, b) => Math.max(a, b));
    const norm = largest + Math.log(values.reduce((sum, value) => sum + Math.exp(value - largest), 0));
    const ids = values.map((_, id) => id).sort((a, b) => values[b] - values[a]).slice(0, 5);
    return ids.map((id) => [id, values[id] - norm]);
  });
}

async function probe(dtype) {
  const options = { session_options: { intraOpNumThreads: 1, logSeverityLevel: 3 } };
  if (dtype !== "default") options.dtype = dtype;
  const model = await AutoModelForCausalLM.from_pretrained(name, options);
  const { ids, prompt, n_tokens } = asked;
  const ones = row(ids.map(() => 1));
  const { logits } = await model({ input_ids: row(ids), attention_mask: ones, position_ids: row([...ids.keys()]) });
  const made = await model.generate({ inputs: row(prompt), attention_mask: row(prompt.map(() => 1)),
    max_new_tokens: n_tokens, do_sample: false });
  const generated = Array.from(made.data, Number).slice(prompt.length);
  const used = model.sessions.model.config.dtype;
  await model.dispose();
  return { dtype: used, logits: logits.type, generated, top5: top5(logits) };
}

const tokenizer = await AutoTokenizer.from_pretrained(name);
const found = { text_ids: Array.from((await tokenizer(asked.text)).input_ids.data, Number) };
for (const dtype of asked.dtypes) found[dtype] = await probe(dtype);
writeSync(1, JSON.stringify(found));
