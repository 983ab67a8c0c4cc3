// The worker that is a page of headless Chromium. argv: one JSON object, as ../browser.py writes it:
// playwright (folder), chromium (program), origin, page (a module's path there), folder (what /files/model/ shows).
// The page's module exports `answer(request)`. Nobody but our own origin is reached, and after `open` nobody at all.
import { join, relative } from "node:path";
import { pathToFileURL } from "node:url";
import { peakBytes, serve } from "./lines.mjs";

const { playwright, chromium, origin, page: module, folder } = JSON.parse(process.argv[2]);
const { chromium: launcher } = await import(pathToFileURL(join(playwright, "index.mjs")));
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];

const foreign = new Set();
let network = true; // until the model is loaded

const ours = (url) => url.startsWith(`${origin}/`);
const local = (url) => /^(blob|data):/.test(url);

async function start() {
  const browser = await launcher.launch({ executablePath: chromium, args: FLAGS });
  const context = await browser.newContext();
  context.on("request", (request) => {
    if (!ours(request.url()) && !local(request.url())) foreign.add(request.url());
  });
  await context.route("**/*", (route) => network && ours(route.request().url()) ? route.continue() : route.abort());
  await context.routeWebSocket(/.*/, (socket) => { foreign.add(socket.url()); socket.close(); });
  const page = await context.newPage();
  const dead = new Promise((_, reject) => {
    page.on("crash", () => reject(new Error("the page crashed (out of memory?)")));
    browser.on("disconnected", () => reject(new Error("the browser ended")));
  });
  dead.catch(() => {}); // nobody may be waiting
  await page.goto(`${origin}/page/blank.html`);
  await page.evaluate(async (path) => {
    const { answer } = await import(path);
    window.answer = (request) => answer(request).catch((error) => ({ error: String(error?.message ?? error) }));
  }, module);
  return { browser, context, page, dead };
}

let started; // a promise of what `start` gives

async function ask(request) {
  const { page, dead } = await (started ??= start());
  const answer = await Promise.race([page.evaluate((asked) => window.answer(asked), request), dead]);
  if ("error" in answer) throw new Error(answer.error);
  return answer;
}

await serve({
  async open({ path, n_ctx, threads }) {
    const inside = relative(folder, path);
    if (inside.startsWith("..")) throw new Error(`${path}: not in ${folder}, which is all that the browser sees`);
    const url = `${origin}/files/model/${inside.split("/").map(encodeURIComponent).join("/")}`;
    const { runtime, threads: running, ...answer } = await ask({ op: "open", url, n_ctx, threads });
    const { browser, context } = await started;
    network = false;
    await context.setOffline(true);
    const label = `${runtime} in headless Chromium ${browser.version()}, ${running} thread${running > 1 ? "s" : ""}`;
    return { ...answer, label };
  },
  score: (fields) => ask({ op: "score", ...fields }),
  generate: (fields) => ask({ op: "generate", ...fields }),
  tokenize: (fields) => ask({ op: "tokenize", ...fields }),
  async memory() {
    const session = await (await started).browser.newBrowserCDPSession();
    const { processInfo } = await session.send("SystemInfo.getProcessInfo");
    const { id } = processInfo.find(({ type }) => type === "renderer");
    return { peak_bytes: peakBytes(id), how: "VmHWM of Chromium's page process" };
  },
  requests: async () => ({ foreign: [...foreign] }),
});
await (await started)?.browser.close();
