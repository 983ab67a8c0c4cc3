// The header of a GGUF file (a Blob); layout: ggml/docs/gguf.md.
// wllama takes and gives text only, and trips over tokens that are no valid UTF-8. `named` and `silent` are views of
// the file that get ids through it; hyperparameters and weights are the file's own, byte for byte.

const [INT32, STRING, ARRAY] = [5, 8, 9];
const BYTES = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8]; // of one value of each type
const HEADER_LIMIT = 2 ** 27; // a vocabulary of a million tokens with its merges fits

// The token of each id is called <id>: a prompt of "<7><12>" is exactly the ids 7 and 12, and no id ends a generation.
export async function named(file) {
  const header = await read(file);
  const name = (_, id) => string(`<${id}>`);
  // RWKV's tokenizer takes the longest name, and is the only one that has no beginning and no end of its own.
  const vocabulary = [
    string("tokenizer.ggml.model"), u32(STRING), string("rwkv"),
    string("tokenizer.ggml.tokens"), u32(ARRAY), u32(STRING), u64(header.n_tokens),
    ...Array.from({ length: header.n_tokens }, name)];
  const kept = header.pairs.filter(({ key }) => !key.startsWith("tokenizer.")).map(({ bytes }) => bytes);
  const head = new Blob([file.slice(0, 16), u64(kept.length + 2), ...kept, ...vocabulary, header.tensors]);
  const padding = new Uint8Array((header.alignment - head.size % header.alignment) % header.alignment);
  return new Blob([head, padding, header.data]);
}

// Tokens are found in a text as ever, and print nothing: of what a text is made can be asked for byte by byte.
export async function silent(file) {
  const { types } = await read(file);
  if (!types) throw new Error("no tokenizer.ggml.token_type in this file");
  const [NORMAL, UNUSED, BYTE] = [1, 5, 6];
  const values = new Int32Array(await types.arrayBuffer()).map((type) => [NORMAL, BYTE].includes(type) ? UNUSED : type);
  return new Blob([file.slice(0, types.start), values, file.slice(types.start + types.size)]);
}

// The model's name ("" where the file holds none), and tokens that it was trained to see at once.
export async function describe(file) {
  const { pairs } = await read(file);
  const find = (suffix) => pairs.find(({ key }) => key.endsWith(suffix));
  const name = await find("general.name")?.value.slice(8).text();
  return { name: name ?? "", n_ctx_train: new Uint32Array(await find(".context_length").value.arrayBuffer())[0] };
}

async function read(file) {
  const view = new DataView(await file.slice(0, HEADER_LIMIT).arrayBuffer());
  let at = 8;
  const uint32 = () => { at += 4; return view.getUint32(at - 4, true); };
  const uint64 = () => { at += 8; return Number(view.getBigUint64(at - 8, true)); };
  const text = () => { const n = uint64(); at += n; return new TextDecoder().decode(view.buffer.slice(at - n, at)); };
  const value = (type) => {
    if (type === STRING) { text(); return; }
    if (type !== ARRAY) { at += BYTES[type]; return; }
    const [item, n] = [uint32(), uint64()];
    if (BYTES[item]) at += n * BYTES[item];
    else for (let i = 0; i < n; i++) value(item);
    return { item, n };
  };
  const [n_tensors, n_pairs] = [uint64(), uint64()];
  const header = { pairs: [], alignment: 32 };
  for (let i = 0; i < n_pairs; i++) {
    const start = at, key = text(), type = uint32(), first = at, array = value(type);
    header.pairs.push({ key, bytes: file.slice(start, at), value: file.slice(first, at) });
    if (key === "general.alignment") header.alignment = view.getUint32(first, true);
    if (key === "tokenizer.ggml.tokens") header.n_tokens = array.n;
    if (key === "tokenizer.ggml.token_type" && array.item === INT32)
      header.types = Object.assign(file.slice(first + 12, at), { start: first + 12 });
  }
  const infos = at;
  for (let i = 0; i < n_tensors; i++) {
    text();
    const n_dims = uint32();
    at += 8 * n_dims + 4 + 8;
  }
  header.tensors = file.slice(infos, at);
  header.data = file.slice(Math.ceil(at / header.alignment) * header.alignment);
  return header;
}

const u32 = (n) => new Uint32Array([n]);
const u64 = (n) => new BigUint64Array([BigInt(n)]);
const string = (ascii) => new Blob([u64(ascii.length), ascii]);
