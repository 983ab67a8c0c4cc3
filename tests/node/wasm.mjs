// Logits of an ONNX file in onnxruntime-web, a browser's onnxruntime, with all data files handed over as buffers.
// argv: the .onnx file, ids separated by commas; stdout: JSON {dims, data} of the logits.
import { readFileSync, readdirSync, writeSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import * as ort from "onnxruntime-web";

const [file, ids] = [process.argv[2], process.argv[3].split(",").map(BigInt)];
ort.env.wasm.numThreads = 1;
const shards = readdirSync(dirname(file)).filter((name) => name.startsWith(`${basename(file)}_data`));
const externalData = shards.map((path) => ({ path, data: new Uint8Array(readFileSync(join(dirname(file), path))) }));
const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(file)),
  { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 });
const row = (values) => new ort.Tensor("int64", BigInt64Array.from(values), [1, values.length]);
const feeds = { input_ids: row(ids), attention_mask: row(ids.map(() => 1n)),
  position_ids: row(ids.map((_, i) => BigInt(i))) };
for (const { name, type, shape } of session.inputMetadata) {
  if (!name.startsWith("past_key_values.")) continue;
  const empty = type === "float16" ? new Uint16Array(0) : new Float32Array(0);
  feeds[name] = new ort.Tensor(type, empty, [1, shape[1], 0, shape[3]]);
}
const { logits } = await session.run(feeds);
writeSync(1, JSON.stringify({ dims: logits.dims, data: Array.from(logits.data) }));
