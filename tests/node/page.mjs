// Uses a served page as a person does, in headless Chromium, and tells what it saw.
// stdin: JSON {playwright, chromium, url, width, height, scale, dark, before, asks, plain, stop_after, shot, ...}; stdout: JSON.
import { readFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { chromium } = await import(pathToFileURL(join(asked.playwright, "index.mjs")));
const browser = await chromium.launch({ executablePath: asked.chromium, args: ["--no-sandbox", "--disable-gpu",
  "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"] });
const context = await browser.newContext({ viewport: { width: asked.width ?? 1280, height: asked.height ?? 800 },
  deviceScaleFactor: asked.scale ?? 1, colorScheme: asked.dark ? "dark" : "light" });
const origin = new URL(asked.url).origin;
const foreign = [], violations = [];
context.on("request", (request) => {
  if (!request.url().startsWith(`${origin}/`) && !/^(blob|data):/.test(request.url())) foreign.push(request.url());
});
await context.route((url) => url.origin !== origin, (route) => route.abort());
const page = await context.newPage();
page.on("console", (message) => { if (/Content Security Policy/.test(message.text())) violations.push(message.text()); });
if (asked.before) await page.addInitScript(asked.before);
await page.goto(asked.url);
await page.waitForFunction(() => !document.querySelector("#prompt").disabled || document.querySelector("#status.failed"),
  null, { timeout: 60000 });
if (asked.offline) await context.setOffline(true);

const text = (selector) => page.locator(selector).allInnerTexts();
const found = { isolated: await page.evaluate(() => crossOriginIsolated), intro: await text("#intro"), turns: [] };
if (asked.settings) {
  await page.locator("#settings").evaluate((details) => { details.open = true; });
  for (const [id, value] of Object.entries(asked.settings)) {
    const control = page.locator(`#${id}`);
    if (typeof value === "boolean") await control.setChecked(value);
    else await control.fill(String(value));
  }
  await page.locator("#settings").evaluate((details, wide) => { details.open = wide; }, (asked.width ?? 1280) > 760);
}
for (const prompt of asked.asks ?? []) {
  await page.fill("#prompt", prompt);
  await page.press("#prompt", "Enter");
  if (asked.stop) {
    await page.waitForFunction(() => document.querySelector(".turn:last-child .answer").textContent.length > 40);
    await page.click("#send");
  }
  await page.waitForFunction(() => document.querySelector(".turn") && !document.querySelector(".writing"), null, { timeout: 60000 });
  const [asked_, answer, note] = await Promise.all(["asked", "answer", "note"].map(
    (name) => page.locator(`.turn:last-child .${name}`).textContent()));
  found.turns.push({ asked: asked_, answer, note });
}
for (const id of ["name", "facts", "message", "decode", "prefill", "memory", "used", "context"])
  found[id] = await page.locator(`#${id}`).textContent();
found.failed = await page.locator("#status.failed").count() > 0;
found.scroll = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth,
  document.documentElement.scrollHeight, innerHeight]);
if (asked.evaluate) found.evaluated = await page.evaluate(asked.evaluate);
if (asked.shot) await page.screenshot({ path: asked.shot });
Object.assign(found, { foreign, violations });
writeSync(1, JSON.stringify(found));
await browser.close();
