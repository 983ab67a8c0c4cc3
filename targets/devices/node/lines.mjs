// Requests and answers are lines of JSON on stdin and stdout, as ../worker.py says: each asks one method of `worker`.
import { existsSync, readFileSync } from "node:fs";
import { createInterface } from "node:readline";

// The largest resident set that a process has had; null where the kernel does not tell.
export function peakBytes(pid) {
  const status = `/proc/${pid}/status`;
  return existsSync(status) ? 1024 * Number(readFileSync(status, "utf8").match(/^VmHWM:\s+(\d+) kB/m)[1]) : null;
}

export async function serve(worker) {
  for await (const line of createInterface({ input: process.stdin })) {
    const { op, ...fields } = JSON.parse(line);
    let answer;
    try {
      if (!worker[op]) throw new Error(`${op}: this runtime knows no such request`);
      answer = await worker[op](fields);
    } catch (error) {
      answer = { error: String(error?.message ?? error) };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
}
