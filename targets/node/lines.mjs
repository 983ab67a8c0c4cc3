// Requests and answers are lines of JSON on stdin and stdout, as ../worker.py says: each asks one method of `worker`.
import { createInterface } from "node:readline";

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
