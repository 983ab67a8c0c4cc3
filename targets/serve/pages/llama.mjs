// A GGUF file (a Blob) in llama.cpp, by wllama. On the CPU: a phone's WebGPU is not what was proved.
import { Wllama } from "/wllama/esm/index.js";

export const llamaVersion = () => Wllama.getLibllamaVersion();

// The program as a URL that also works when the server cannot be reached any more.
export async function program() {
  return URL.createObjectURL(await (await fetch("/wllama/esm/wasm/wllama.wasm")).blob());
}

// {model, said, errors}: the Wllama, llama.cpp's words while it loaded, and its errors, to which later ones are added.
// Throws an Error that says why the file cannot be loaded.
export async function load(file, wasm, options) {
  const said = [], errors = [], quiet = () => {}, into = (lines) => (text) => lines.push(String(text));
  const logger = { debug: into(said), log: quiet, warn: quiet, error: into(errors) };
  const unused = {}; // wllama's own, which keep models, cannot be made on a page that is not isolated
  const model = new Wllama({ default: wasm }, { logger, cacheManager: unused, modelManager: unused });
  // For browsers without 64-bit memory or JSPI, as Safari; by default wllama would ask a foreign server for it.
  model.setCompat({ worker: "/wllama-compat/wasm/wllama.js", wasm: "/wllama-compat/wasm/wllama.wasm" });
  let why;
  try {
    await model.loadModel([file], { n_parallel: 1, n_gpu_layers: 0, ...options });
    if (model.getLoadedContextInfo().success) return { model, said, errors };
  } catch (error) {
    why = error.message;
  }
  await model.exit();
  const [first = why] = errors.filter((line) => !line.startsWith("Stack trace")); // the others follow from it
  throw new Error(first.trim().replace(/^\w+: /, "")); // without the name of llama.cpp's function
}
