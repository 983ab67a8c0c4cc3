// Uses a served page as a person does, in headless Chromium, and tells what it saw.
// stdin: JSON {playwright, chromium, url, host (a name that means 127.0.0.1)} and what to do, all optional: {width,
// height, scale} of the window, dark, before (script that runs first), settings (id -> value), asks (texts to send),
// stop (each answer, early), offline (once it is loaded), evaluate (script at the end), screenshot (file). stdout: JSON.
import { readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const { width = 1280, height = 800, scale = 1, ...asked } = JSON.parse(readFileSync(0, "utf8"));
const { chromium } = await import(pathToFileURL(join(asked.playwright, "index.mjs")));
const browser = await chromium.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu",
  "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
  "--disable-sync", `--host-resolver-rules=MAP ${asked.host} 127.0.0.1`] });
const context = await browser.newContext({ viewport: { width, height }, deviceScaleFactor: scale,
  colorScheme: asked.dark ? "dark" : "light" });
const { origin } = new URL(asked.url);
const found = { turns: [], foreign: [], violations: [] };
context.on("request", (request) => {
  const url = request.url();
  if (!url.startsWith(`${origin}/`) && !/^(blob|data):/.test(url)) found.foreign.push(url);
});
const page = await context.newPage();
page.on("console", (message) => {
  if (/Content Security Policy/.test(message.text())) found.violations.push(message.text());
});
if (asked.before) await page.addInitScript(asked.before);
await page.goto(asked.url);
const loaded = () => !document.querySelector("#prompt").disabled || document.querySelector("#status.failed");
await page.waitForFunction(loaded, null, { timeout: 60000 });
if (asked.offline) await context.setOffline(true);
found.isolated = await page.evaluate(() => crossOriginIsolated);
found.intro = await page.locator("#intro").innerText();

const fold = (open) => page.locator("#settings").evaluate((details, value) => { details.open = value; }, open);
await fold(true);
for (const [id, value] of Object.entries(asked.settings ?? {})) {
  if (typeof value === "boolean") await page.setChecked(`#${id}`, value);
  else await page.fill(`#${id}`, String(value));
}
await fold(width > 760);
found.failed = await page.locator("#status.failed").count() > 0;
for (const prompt of found.failed ? [] : asked.asks ?? []) {
  await page.fill("#prompt", prompt);
  await page.press("#prompt", "Enter");
  if (asked.stop) {
    await page.waitForFunction(() => document.querySelector(".turn:last-child .answer").textContent.length > 20);
    await page.click("#send");
  }
  await page.waitForFunction(() => document.querySelector(".turn") && !document.querySelector(".writing"), null,
    { timeout: 60000 });
  const [question, answer, note] = await Promise.all(["asked", "answer", "note"].map(
    (name) => page.locator(`.turn:last-child .${name}`).textContent()));
  found.turns.push({ question, answer, note });
}
for (const id of ["name", "facts", "message", "decode", "prefill", "memory", "used", "context"])
  found[id] = await page.locator(`#${id}`).textContent();
found.failed ||= await page.locator("#status.failed").count() > 0;
found.scrolls = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
if (asked.evaluate) found.evaluated = await page.evaluate(asked.evaluate);
if (asked.screenshot) await page.screenshot({ path: asked.screenshot });
writeSync(1, JSON.stringify(found));
await browser.close();
