/** Asking: one question, once with the budget and, if wanted, once dense. */

import { Failure, events, failureOf, send } from "./api.js";

const DONE = "[DONE]";

/**
 * Ask, call `onPiece` with every piece of the answer, and return its report: the `squeezed` object,
 * with `finish` beside it. With `reading`, it tells which passages were read, if the engine can.
 */
export async function ask({ model, context, question, budget, longest, reading, signal }, onPiece) {
  const body = {
    model,
    context,
    budget,
    max_tokens: longest,
    stream: true,
    messages: [{ role: "user", content: question }],
  };
  if (reading) body.squeezed = { passages: true, tokens: true };
  try {
    return await streamed(await send("v1/chat/completions", { method: "POST", body, signal }), onPiece);
  } catch (error) {
    const untold = reading && error.status === 400 && error.param === "squeezed";
    if (!untold) throw error;
    return ask({ model, context, question, budget, longest, signal }, onPiece);
  }
}

async function streamed(answer, onPiece) {
  let report = null;
  for await (const { data } of events(answer)) {
    if (data === DONE) return report;
    const chunk = JSON.parse(data);
    if (chunk.error) throw failureOf(chunk.error);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onPiece(choice.delta.content);
    if (choice?.finish_reason) report = { ...chunk.squeezed, finish: choice.finish_reason };
  }
  throw new Failure("The connection to the server broke off before the answer ended.");
}
