/** What an answer cost, alone or beside the dense one. */

import { make } from "./dom.js";
import { bytes, count, percent, seconds } from "./words.js";

/** The figures of one answer; an engine that does not count bytes tells the rest. */
export function figures(report) {
  const list = make("dl", "figures");
  const { total, dense } = report.bytes_per_token ?? {};
  if (dense) list.append(figure(bytes(total), "read per token", `${percent(total / dense)} of ${bytes(dense)}`, total / dense));
  const { budget_spent: spent, budget, seconds: took } = report;
  if (spent != null) list.append(figure(percent(spent), "of the keys read", `${percent(budget)} asked for`));
  if (took) list.append(figure(seconds(took.per_token), "per token", `${seconds(took.first_token)} to the first`));
  return list;
}

/** Both answers side by side, the first with `budget`; `same` of `all` words of the dense one are in it. */
export function comparison(budget, report, dense, same, all) {
  const table = make("table", "comparison");
  table.append(make("caption", "unseen", "The answer and the dense answer compared"));
  const head = table.createTHead().insertRow();
  head.append(make("td"), headed("col", percent(budget)), headed("col", "dense"), headed("col", "ratio"));
  const body = table.createTBody();
  const rows = [
    ["read per token", (of) => of.bytes_per_token?.total, bytes],
    ["first token", (of) => of.seconds?.first_token, seconds],
    ["each further token", (of) => of.seconds?.per_token, seconds],
  ];
  for (const [name, value, shown] of rows) {
    const [ours, theirs] = [value(report), value(dense)];
    if (ours === undefined || theirs === undefined) continue;
    const cells = [shown(ours), shown(theirs), ratio(theirs, ours)].map((text) => make("td", "", text));
    body.insertRow().append(headed("row", name), ...cells);
  }
  const words = make("td", "", same === all ? `all ${count(all)} alike` : `${count(same)} of ${count(all)} alike`);
  words.colSpan = 3;
  body.insertRow().append(headed("row", "words"), words);
  return table;
}

function figure(value, what, more, share) {
  const group = make("div");
  group.append(make("dt", "", what), make("dd", "value", value), make("dd", "hint", more));
  if (share === undefined) return group;
  const bar = make("dd", "bar");
  const part = make("span");
  bar.setAttribute("aria-hidden", "true");
  part.style.width = `${100 * Math.min(1, share)}%`;
  bar.append(part);
  group.append(bar);
  return group;
}

function headed(scope, text) {
  const cell = make("th", "", text);
  cell.scope = scope;
  return cell;
}

function ratio(theirs, ours) {
  return ours > 0 && theirs > 0 ? `${(theirs / ours).toFixed(1)} ×` : "";
}
